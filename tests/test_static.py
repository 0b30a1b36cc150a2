"""Static steps give what ordinary forwards give. Without CUDA they run uncaptured, through the same buffers."""

import gc
from contextlib import nullcontext

import pytest
import torch
from conftest import FIXED, noised, tiny_llama
from test_lossless import FAMILIES, assert_same, family, own_tokens, untouched

from specx.adapters.classic import ClassicModel
from specx.api import SpeculativeModel
from specx.cache import TreeCache
from specx.hf import HFModel
from specx.static import BUCKETS
from specx.static_attention import masked_attention
from specx.target import Target
from specx.tree import DraftTree


def static_couple(name: str, draft_context: int = 64) -> SpeculativeModel:
    target = family(name)
    engine, small = HFModel(target, graphs=True), HFModel(noised(target, 0.01), graphs=True)
    return SpeculativeModel(
        engine, ClassicModel("tiny", small, engine.vocab_size, draft_context, "the test"), None, FIXED
    )


# phi3-longrope looks at its positions on the host: it must stay ordinary and right.
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_stays_exact(name, prompt_of):
    couple, positions = static_couple(name), family(name).config.max_position_embeddings
    for length in (200, 30):  # the second one takes over the memory of the first
        ids = prompt_of(min(length, positions - 64))
        out = couple.generate(ids, max_new_tokens=24, policy="auto", retrieve_every=2)
        assert_same(family(name), ids, out.tokens, own_tokens(family(name), ids, 24))
    assert untouched(family(name), family(name).config._attn_implementation)


def test_models_that_cannot_be_static_say_why():
    assert "on the host" in HFModel(family("phi3-longrope"), graphs=True).no_graphs
    assert "needs none" in HFModel(tiny_llama()).no_graphs
    assert HFModel(tiny_llama(), graphs=False).no_graphs == "not asked for"
    assert HFModel(tiny_llama(), graphs=True).no_graphs is None
    assert "dense" in HFModel(tiny_llama(), hybrid=False, graphs=True).no_graphs


def test_the_end_of_a_prompt_is_no_view_of_what_a_replay_overwrites(prompt_of):
    """A short last chunk is a static step in a padded bucket; a target goes back to its output after other steps."""
    scores, logits = [], []
    for graphs in (False, True):
        engine = HFModel(tiny_llama(), graphs=graphs)
        target, ids = Target(engine, 100, score_layer=0, taps=(0,)), prompt_of(5)
        out = target.prefill(ids)
        scores.append(target.chunk_scores(-1, 2))
        if graphs:
            for step in engine._steps[target.cache]._steps.values():
                scored = (step.scored.query, step.scored.lse) if step.scored else ()  # the self-check scores nothing
                for each in (step.logits, *step.features.values(), *scored):
                    each.fill_(torch.nan)
        assert target.prefill(ids) is out
        logits.append(out.logits)
        assert not out.features[0].isnan().any()
        assert not out.scored.query.isnan().any()
    torch.testing.assert_close(*scores)
    torch.testing.assert_close(*logits)


def random_tree(nodes: int) -> DraftTree:
    parents = torch.tensor([-1] + [int(torch.randint(0, i, ())) for i in range(1, nodes)])
    depths = torch.zeros(nodes, dtype=torch.long)
    for i in range(1, nodes):
        depths[i] = depths[parents[i]] + 1
    return DraftTree(torch.randint(0, 60, (nodes,)), parents, depths, torch.zeros(nodes))


@pytest.mark.parametrize("nodes", [1, 2, 5, 16, 33, 64])
@pytest.mark.parametrize("name", ["llama-gqa", "mistral"])
def test_a_tree_in_a_padded_bucket(name, nodes, prompt_of):
    model, ids = family(name), prompt_of(90)
    torch.manual_seed(nodes)
    tree, outs, rows = random_tree(nodes), [], []
    for graphs in (False, True):
        target = Target(HFModel(model, graphs=graphs), 400, score_layer=0, taps=(1,))
        target.prefill(ids)
        for keys, values in target.cache.memory.blocks:  # what was never written must not be read
            keys[:, :, :, 90:] = values[:, :, :, 90:] = torch.nan
        outs.append(target.verify(tree))
        path = tree.path(nodes - 1)
        target.keep(path)
        rows.append(torch.cat([target.cache.keys(layer) for layer in range(2)]))
        outs.append(target.verify(DraftTree.single(3)))
    for own, static in zip(outs[:2], outs[2:], strict=True):
        torch.testing.assert_close(static.logits, own.logits, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(static.features[1], own.features[1], atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(static.scored.query, own.scored.query, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(static.scored.lse, own.scored.lse, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(rows[1], rows[0], atol=2e-5, rtol=2e-5)


def test_shapes_do_not_depend_on_the_context(prompt_of):
    """One step a bucket, whatever the length: what a graph needs."""
    engine = HFModel(tiny_llama(), graphs=True)
    target = Target(engine, 600)
    for length in (70, 200, 450):
        target.prefill(prompt_of(length))
        for nodes in (1, 7, 8):
            target.verify(random_tree(nodes))
            target.cache.rollback()
    steps = engine._steps[target.cache]
    assert sorted(key[0] for key in steps._steps) == [1, 4, 8]  # 4: the self-check


def test_memory_goes_to_the_next_request_and_never_to_two():
    engine = HFModel(tiny_llama(), graphs=True)
    gc.collect()
    first, second = engine.new_cache(100), engine.new_cache(100)
    for each in (first, second):
        engine.forward(torch.arange(5), torch.arange(5), each)
    assert not set(first.address()) & set(second.address())
    address, steps = second.address(), engine._steps[second]
    del second, each
    gc.collect()
    third = engine.new_cache(80)
    assert third.address() == address
    assert engine._steps[third] is steps
    assert (third.committed, third.pending) == (0, 0)


def test_memory_of_an_inference_mode_serves_outside_of_it(prompt_of):
    couple, outs = static_couple("llama-gqa"), []
    for around in (torch.inference_mode, nullcontext):
        with around():
            outs.append(couple.generate(prompt_of(90), max_new_tokens=16, policy="auto").tokens)
        gc.collect()  # the caches of the first call go to the second one
    assert outs[0] == outs[1]


def test_captured_steps_are_dropped_when_a_buffer_moves(prompt_of):
    engine = HFModel(tiny_llama(), graphs=True)
    target, ids = Target(engine, 100), prompt_of(100)
    target.prefill(ids)
    before = target.verify(random_tree(4))
    held = engine._steps[target.cache]._steps.copy()
    target.cache.rollback()
    target.cache.reserve(target.cache.capacity * 2)
    torch.manual_seed(0)
    tree = random_tree(4)
    again = target.verify(tree)
    assert before is not again
    assert not set(map(id, held.values())) & set(map(id, engine._steps[target.cache]._steps.values()))
    truth = Target(HFModel(engine.model, graphs=False), 200)
    truth.prefill(ids)
    torch.testing.assert_close(again.logits, truth.verify(tree).logits, atol=2e-5, rtol=2e-5)


def test_masked_attention_reads_only_what_was_written():
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 3, 16), *torch.randn(2, 1, 2, 40, 16)
    length, mask = torch.tensor([20], dtype=torch.int32), torch.ones(3, 3, dtype=torch.bool).tril()
    options = {"scale": 0.25, "positions": torch.arange(20, 23), "window": 7, "softcap": 5.0}
    clean = masked_attention(query, key, value, length, mask, 3, **options)
    key[:, :, 23:] = value[:, :, 23:] = torch.nan
    torch.testing.assert_close(masked_attention(query, key, value, length, mask, 3, **options), clean)
    mask[2, 0] = False
    assert not torch.allclose(masked_attention(query, key, value, length, mask, 3, **options)[0], clean[0])


def test_buckets_cover_every_tree():
    assert BUCKETS[-1] == 256
    assert list(BUCKETS) == sorted(BUCKETS)
    cache = TreeCache(1, 10)
    with pytest.raises(KeyError), cache.written_at(torch.arange(2)):
        raise KeyError
    assert cache._at is None
