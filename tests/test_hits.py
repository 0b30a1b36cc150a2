"""How much of the target's attention the retrieved chunks held, and the generations that a report shows."""

import copy

import pytest
import torch
from conftest import pair
from test_eval import own_text, span_of, text_of

from specx.eval import acceptance, traces
from specx.eval.chosen import Prompt
from specx.eval.hits import hit_rates, mean_hit
from specx.eval.methods import parse_methods
from specx.retrieval import CachePolicy

POLICY = CachePolicy("retrieval", 100, 4, sinks=4, recent=8, top_chunks=2, chunk_size=4, every=2)


def test_the_share_by_hand():
    """30 tokens of context: chunk 0 holds sinks, chunks 5 and later reach into the last 8 tokens."""
    mass = torch.tensor([9.0, 1.0, 2.0, 3.0, 4.0, 7.0, 7.0, 7.0])
    log = [(30, mass), (31, mass), (40, torch.cat([mass, torch.tensor([5.0, 5.0])]))]
    trace = [{"kept_chunks": None}, {"kept_chunks": [0, 2, 4]}, {"kept_chunks": None}]
    # at 31: chunks 1 .. 4 were wholly before token 23; the rebuild at 40 did not happen, so that these stay
    assert hit_rates(log, trace, POLICY) == [None, pytest.approx(6 / 10), pytest.approx(6 / 10)]
    trace[2]["kept_chunks"] = [7]
    assert hit_rates(log, trace, POLICY)[2] == pytest.approx(7 / 31)  # chunks 1 .. 7 of the context of 40
    assert mean_hit([None, 0.5, 1.0]) == 0.75
    assert mean_hit([None]) is None
    assert hit_rates([(8, mass[:2])], [{"kept_chunks": [0]}], POLICY) == [None]  # everything is kept by rule


def test_the_attention_is_the_models(tiny):
    """With eager attention the model itself says what it attended to."""
    model = pair(tiny, tiny, draft_context=96)
    options = "retrieval:top_chunks=2:chunk_size=8:score_layer=1:recent=16:retrieve_every=1"
    prompt = Prompt("p", 200, text_of(200))
    (row,) = traces.measure(model, prompt, parse_methods(options), 24)
    out = model.generate(prompt.ids, max_new_tokens=24, policy="retrieval", trace=True, top_chunks=2, chunk_size=8,
                         score_layer=1, recent=16, retrieve_every=1)  # fmt: skip
    assert row["emitted"] == [len(each["path"]) for each in out.trace]
    assert row["kept"] == [(n, r["kept_chunks"]) for n, r in enumerate(out.trace) if r["kept_chunks"] is not None]
    twin = copy.deepcopy(tiny)  # what gives attentions out stays hooked to a model
    twin.set_attn_implementation("eager")
    ids = torch.cat([prompt.ids, torch.tensor(out.tokens)])
    weights = twin(ids[None], output_attentions=True).attentions[1][0].mean(0)  # [T, T]
    committed, last = 200, None
    for step, emitted in enumerate(row["emitted"]):
        if out.trace[step]["kept_chunks"] is not None:
            last = (committed - 16) // 8
            chosen = [chunk for chunk in out.trace[step]["kept_chunks"] if 1 <= chunk < last]
        attention = weights[committed + emitted - 1]  # of the last accepted node
        total = attention[8 : last * 8].sum()
        expected = sum(attention[chunk * 8 : chunk * 8 + 8].sum() for chunk in chosen) / total
        assert row["hits"][step] == pytest.approx(expected.item(), abs=2e-3)
        committed += emitted
    assert 0 < row["hit_rate"] < 1


def test_tau_rows_say_it_for_methods_that_retrieve(tiny_pair):
    spans = [span_of(own_text(tiny_pair, text_of(300), 40), 40)]
    specs = parse_methods("full,window,retrieval:chunk_size=8,auto:chunk_size=8")
    rows = {row["method"].split(":")[0]: row for row in acceptance.measure(tiny_pair, spans, [300], specs)}
    assert rows["full"]["hit_rate"] is rows["window"]["hit_rate"] is None
    assert 0 < rows["auto"]["hit_rate"] == rows["retrieval"]["hit_rate"] < 1
    for row in rows.values():
        histogram = {int(n): count for n, count in row["accepted_histogram"].items()}
        assert sum(histogram.values()) == row["steps"]
        assert sum((n + 1) * count for n, count in histogram.items()) == row["emitted"]


def test_a_trace_is_the_generation_token_by_token(tiny_pair):
    prompt = Prompt("p", 150, text_of(150))
    rows = list(traces.measure(tiny_pair, prompt, parse_methods("ar,plain,full,window,auto"), 20))
    assert [row["method"] for row in rows] == ["full", "window", "auto"]
    tokens = tiny_pair.generate(prompt.ids, max_new_tokens=20).tokens
    for row in rows:
        assert "".join(text for step in row["pieces"] for text, _ in step) == "".join(f" {token}" for token in tokens)
        drafted = [sum(drafted for _, drafted in step) for step in row["pieces"][1:]]
        assert drafted == [sum(1 for _ in step) - 1 for step in row["pieces"][1:]]
        assert sum(row["emitted"]) == 19
        assert (row["tokens"], row["context"]) == (150, 150)
    assert rows[0]["hits"] == rows[1]["hits"] == []
