"""Drafts side by side: what an entry is, bytes of each kind's cache, and tau as `specx eval` measures it."""

import json
from xml.etree import ElementTree

import heads
import pytest
import torch
from blocks import block_tensors, save
from click.testing import CliRunner
from conftest import FIXED, noised, pair, tiny_llama

from specx.adapters.loader import load_draft
from specx.adapters.lookup import LookupModel
from specx.api import SpeculativeModel
from specx.config import CacheConfig, LoadConfig
from specx.eval import acceptance, drafting, drafts, losses
from specx.eval.methods import parse_methods
from specx.eval.spans import Span
from specx.hf import HFModel

pytest_plugins = ["disk"]


@pytest.fixture(scope="module")
def engine():
    return HFModel(heads.tiny_target("Llama"))


@pytest.fixture(scope="module")
def kinds(engine, tmp_path_factory):
    """A draft of each kind for one target."""
    folder = tmp_path_factory.mktemp("kinds")
    made = {
        "eagle3": heads.save(folder / "eagle3", heads.flat_config(), heads.head_tensors()),
        "longspec": save(folder / "longspec", block_tensors()),
    }
    plain = LoadConfig(dtype="float32", device="cpu")
    found = {name: load_draft(path, path, engine, None, plain) for name, path in made.items()}
    return found | {"classic": pair(engine.model, noised(engine.model, 0.02)).draft}


@pytest.mark.parametrize("kind", ["classic", "eagle3", "longspec"])
def test_bytes_of_a_token_are_those_of_the_tensors(engine, kinds, kind):
    model = SpeculativeModel(engine, kinds[kind], None, FIXED)
    draft = kinds[kind].start(600, 12, 0, CacheConfig())
    if kind == "longspec":
        held = draft.ring.keys.nbytes + draft.ring.values.nbytes
        assert held == 513 * drafting.token_bytes(kinds[kind])
        for length in (700, 900):
            assert model.generate(heads.prompt_of(length), max_new_tokens=8).stats["draft_kv_tokens"] == 513
        return
    config = draft.cache
    small = kinds[kind].model.forward if kind == "classic" else None
    if small:
        small(heads.prompt_of(5), torch.arange(5), config)
    blocks = [each for both in config.memory.blocks for each in both]
    assert sum(each.nbytes for each in blocks) == config.capacity * drafting.token_bytes(kinds[kind])


def test_a_draft_without_a_cache():
    with pytest.raises(ValueError, match="has no keys and values of its own"):
        drafting.token_bytes(LookupModel())


def test_tau_is_that_of_each_alone(engine, kinds):
    ids = heads.prompt_of(170)
    span = Span("a.py", 150, ids, 20, 0.0, "ordinary")
    entries = [
        drafting.Entry(f"{kind} {method}", SpeculativeModel(engine, draft, None, FIXED), parse_methods(method)[0])
        for kind, draft in kinds.items()
        for method in ("full", "retrieval:draft_context=64")
    ]
    rows = list(drafting.taus(entries, [span], [40, 150]))
    assert [(row["context"], row["method"]) for row in rows] == [(c, e.label) for c in (40, 150) for e in entries]
    for each in entries:
        own = [row | {"method": ""} for row in rows if row["method"] == each.label]
        alone = acceptance.measure(each.model, [span], [40, 150], [each.spec])
        assert own == [row | {"method": ""} for row in alone]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("demo", "an entry is"),
        ("=demo,full", "an entry is"),
        ("demo,ar", "needs one method with a draft"),
        ("demo,full:nonesuch=1", "no option 'nonesuch'"),
        ("nonesuch,full", "unknown draft 'nonesuch'"),
    ],
)
def test_entries_that_are_none(entry, message, tmp_path):
    result = CliRunner().invoke(drafts.main, [entry, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_labels():
    label, draft, spec = drafting.parse_entry("short=runs/a/draft,retrieval:draft_context=512")
    assert (label, draft, spec.options) == ("short", "runs/a/draft", {"draft_context": 512})
    assert drafting.parse_entry("demo,full")[0] == "demo full"
    target = SpeculativeModel(HFModel(tiny_llama()), None, None)
    with pytest.raises(ValueError, match="a label is given twice"):
        drafting.entries_of(["demo,full", "demo,full"], target)


def test_tables_of_speed():
    def row(method, rate, **more):
        place = {"measure": "speed", "prompt": "a", "context": 512, "method": method}
        return place | {"decode_tokens_per_second": rate} | more

    rows = [row("ar", 10.0), row("ar-static", 8.0), row("x full", 25.0, draft_kv_bytes=2048, ms_forward=1.5)]
    assert [table.rows for table in drafts.side_by_side(rows, "speed")] == [
        [["x full", "2"]],
        [["x full", "1.50"]],
        [["x full", "2.50"]],
    ]
    assert drafts.side_by_side(rows[:2], "speed") == []


def test_loss_curves(tmp_path):
    log = tmp_path / "run" / "log.jsonl"
    log.parent.mkdir()
    rows = [{"step": 1, "loss": 9.0}, {"step": 2, "loss": 7.0}, {"step": 2, "tau": 1.5}, {"step": 3, "loss": 5.0}]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert losses.smooth(losses.read_losses(str(log.parent)), 2) == [(2, 8.0), (3, 6.0)]
    out, wrong = tmp_path / "out.svg", CliRunner().invoke(losses.main, ["a=nothing", "--out", str(tmp_path / "no.svg")])
    assert wrong.exit_code == 2
    assert "nothing holds no losses" in wrong.stderr
    assert not (tmp_path / "no.svg").exists()
    made = CliRunner().invoke(losses.main, [f"a={log.parent}", f"b={log}", "--over", "2", "--out", str(out)])
    assert made.exit_code == 0, made.stderr
    lines = [each.get("points") for each in ElementTree.parse(out).iter() if each.tag.endswith("polyline")]
    assert len(lines) == 2
    assert lines[0] == lines[1]
    (_, high), (_, low) = (map(float, point.split(",")) for point in lines[0].split())
    assert high < low  # y grows downwards


def test_the_command(disk, tmp_path):
    source = "".join(f"def name_{n}(steps, coloured):\n    return steps[{n}] + coloured\n" for n in range(80))
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": source}) + "\n")
    given = ["--target", disk.target, "--data", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "out")]
    sizes = ["--lengths", "64,128", "--spans", "1", "--samples", "1", "--max-new-tokens", "8"]
    sizes += ["--measure", "tau,speed,cpu"]
    entries = [f"a={disk.draft},full", f"b={disk.draft},window:draft_context=64"]
    result = CliRunner().invoke(drafts.main, [*entries, *given, *sizes], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    kinds = [("tau", c, m) for c in (64, 128) for m in "ab"]
    kinds += [("speed", c, m) for c in (64, 128) for m in ("ar", "ar-static", "a", "b")]
    kinds += [("cpu", c, m) for c in (64, 128) for m in "ab"]
    assert [(row["measure"], row["context"], row["method"]) for row in rows] == kinds
    bytes_of = {m: [row["draft_kv_bytes"] for row in rows if row["method"] == m and "ms_forward" in row] for m in "ab"}
    assert bytes_of["a"][:2] == bytes_of["a"][2:]  # by either measure
    assert bytes_of["a"][1] > bytes_of["b"][1]
    assert all(row["ms_forward"] > 0 and row["ms_verify"] > 0 for row in rows if row["measure"] == "cpu")
    assert all(row["same"] for row in rows if row["measure"] == "speed")
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert all(each in summary for each in ("## tau, ordinary spans", "## Decode ratio", "| a | ", "| b | "))
    again = CliRunner().invoke(drafts.main, [*entries, *given, *sizes])
    assert "already holds results" in again.stderr
