"""`specx bench` and what it measures with: shapes, bytes, masks and refusals; times only so far as they are times."""

import json
import time
from contextlib import nullcontext

import pytest
import torch
from click.testing import CliRunner
from conftest import noised, pair, tiny_llama

from specx import cli
from specx.attention import reference
from specx.cuda import GraphPool
from specx.eval import bench
from specx.eval.bench import Inputs, Problem, attention_row, contenders, inputs_of, median_ms, sdpa, tree_mask
from specx.eval.bench_step import StepBench, SyncedGeneration, binary_tree, cache_bytes, context_of, weight_bytes

pytest_plugins = ["disk"]
CPU = torch.device("cpu")
SMALL = Problem(40, 5, 4, 2, 32, torch.float32)


def invoke(*args):
    result = CliRunner().invoke(cli.main, ["bench", *map(str, args)])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def truth(inputs: Inputs):
    problem = inputs.problem
    seen = torch.cat([torch.ones(problem.rows, problem.length, dtype=torch.bool), inputs.mask], 1)
    bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    key, value = inputs.keys[0], inputs.values[0]
    return reference(inputs.query, key, value, problem.dim**-0.5, bias, False, None)[0]


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("name", ["cpu", "reference", "sdpa"])
def test_every_way_computes_the_same(name, rows):
    inputs = inputs_of(Problem(40, rows, 4, 2, 32, torch.float32), CPU)
    found = contenders(CPU)[name](inputs)(inputs.keys[0], inputs.values[0])
    torch.testing.assert_close(found[0] if isinstance(found, tuple) else found, truth(inputs), atol=1e-5, rtol=1e-5)


def test_our_kernel_by_its_stand_in():
    pytest.importorskip("triton")
    from specx.eval.gpu_stand_ins import tree_attention

    inputs = inputs_of(SMALL, CPU)
    out, _ = bench.fused(tree_attention)(inputs)(inputs.keys[0], inputs.values[0])
    torch.testing.assert_close(out, truth(inputs), atol=1e-5, rtol=1e-5)


def test_only_what_runs_here_is_compared():
    assert list(contenders(CPU)) == ["cpu", "reference", "sdpa"]


def test_cold_keys_are_as_many_as_wanted():
    assert SMALL.nbytes == 2 * 45 * 2 * 32 * 4
    assert len(inputs_of(SMALL, CPU).keys) == 1
    assert inputs_of(SMALL, CPU, cold=3 * SMALL.nbytes).keys.shape == (3, 1, 2, 45, 32)
    assert len(inputs_of(SMALL, CPU, cold=1 << 40).keys) == 64


def test_a_row_is_per_call_and_relative_to_the_copy():
    calls = []

    def slow(inputs):
        return lambda key, value: (calls.append(key.data_ptr()), time.sleep(0.002))

    row = attention_row(SMALL, slow, CPU, 1e9, repeats=2, cold=4 * SMALL.nbytes)
    assert len(set(calls)) == 4
    assert 2 <= row["ms"] < 10
    assert row["share"] == pytest.approx(SMALL.nbytes / (row["ms"] / 1000) / 1e9)
    assert not row["graph"]


def test_the_median_is_of_the_measured_runs_only():
    naps = iter([0.05, 0.05, 0.001, 0.03, 0.002])
    assert 1 <= median_ms(lambda: time.sleep(next(naps)), CPU, 3) < 20


def test_bandwidth_counts_both_ways():
    assert 1e8 < bench.copy_bandwidth(CPU, 1 << 22, 3) < 1e13


def test_masks_and_trees_agree():
    tree = binary_tree(7, 3, CPU)
    assert torch.equal(tree.mask(), tree_mask(7))
    assert tree.parents.tolist() == [-1, 0, 0, 1, 1, 2, 2]
    assert tree.depths.tolist() == [0, 1, 1, 2, 2, 2, 2]


def test_bytes_of_weights_and_cache():
    tied, untied = tiny_llama(tie_word_embeddings=True), tiny_llama(tie_word_embeddings=False)
    table = untied.get_input_embeddings().weight.nbytes
    assert weight_bytes(untied) == sum(each.nbytes for each in untied.parameters()) - table
    assert weight_bytes(tied) == weight_bytes(untied)
    assert cache_bytes(untied.config, 10, torch.bfloat16) == 2 * 10 * 3 * 2 * 16 * 2


@pytest.mark.parametrize("refill", ["gather", "recompute"])
def test_steps_of_a_tiny_pair(tiny, refill, prompt_of):
    model = pair(tiny, noised(tiny, 0.02))
    model.settings = model.settings.override(refill=refill)
    bed = StepBench(model, prompt_of(300), 2)
    for length in (300, 120):
        row = bed.verify(length, 5, 1e9)
        assert row["ms"] > 0
        assert row["bytes"] == weight_bytes(tiny) + cache_bytes(tiny.config, length + 5, torch.float32)
        assert bed.target.cache.committed == length
        drafting = bed.drafting(length)
        assert all(drafting[key] > 0 for key in ("ms_level", "ms_tree", "ms_scores", "ms_select", "ms_refresh"))
        assert drafting["refill"] == refill
        assert 0 < drafting["draft_kv_tokens"] <= 128
        loop = bed.loop(length, 12)
        assert loop["ms"] == pytest.approx(
            sum(loop[f"ms_{part}"] for part in ("draft", "verify", "retrieval", "other"))
        )
    with pytest.raises(ValueError, match="tokens long; 300 cannot be measured after that"):
        bed.verify(300, 1, 1e9)


def test_steps_without_a_draft(tiny, prompt_of):
    model = pair(tiny, tiny)
    model.draft = None
    bed = StepBench(model, prompt_of(50), 1)
    assert bed.verify(50, 1, 1e9)["ms"] > 0
    with pytest.raises(ValueError, match="no draft to measure"):
        bed.drafting(50)
    model.draft = object()
    with pytest.raises(ValueError, match="with a classic draft or none; got object"):
        StepBench(model, prompt_of(50), 1)


def test_contexts_are_as_long_as_wanted(tiny):
    model = pair(tiny, tiny)
    assert context_of(model, 100).shape == (100,)
    with pytest.raises(ValueError, match="exceed the target's 8192 positions"):
        context_of(model, 8190)


class TestCommand:
    SMALL = ("--heads", 4, "--groups", 2, "--dim", 32, "--repeats", 1, "--device", "cpu")

    def test_attention(self):
        result = invoke("attention", "--max-length", "1.5K", "--nodes", "1,4", *self.SMALL, "--json")
        assert result.exit_code == 0, result.stderr
        rows = json.loads(result.stdout)
        assert {row["length"] for row in rows} == {1024, 1536}
        assert {row["method"] for row in rows} == {"cpu", "reference", "sdpa"}
        assert len(rows) == 2 * 2 * 3
        shown = invoke("attention", "--max-length", "64", "--nodes", "2", *self.SMALL)
        assert "Attention" in shown.stdout
        assert "64" in shown.stdout

    def test_step(self, disk):
        result = invoke("step", *disk.pair, "--lengths", "64,128", "--nodes", "1,3", "--repeats", 1, "--json")
        assert result.exit_code == 0, result.stderr
        rows = json.loads(result.stdout)
        assert [(row["length"], row["part"]) for row in rows] == [
            (length, part) for length in (128, 64) for part in ("verify", "verify", "draft")
        ]
        shown = invoke("step", *disk.pair, "--lengths", "64", "--nodes", "2", "--repeats", 1)
        assert "Verify" in shown.stdout
        assert "Draft and retrieval" in shown.stdout

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (("attention", "--nodes", "0"), "--nodes takes numbers from 1 to 256, joined by commas; got '0'"),
            (("attention", "--heads", 6, "--groups", 4), "--heads must be a multiple of --groups; got 6 and 4"),
            (("attention", "--max-length", "long"), "a length must be a whole number of tokens"),
            (("step", "--nodes", "1,65"), "--nodes takes numbers from 1 to 64"),
            (("step", "--lengths", "x"), "a length must be a whole number"),
            (("step", "--target", "nonesuch"), "unknown target 'nonesuch'"),
        ],
    )
    def test_mistakes(self, args, message):
        result = invoke(*args)
        assert result.exit_code == 2
        assert message in result.stderr
        assert result.stdout == ""

    def test_without_cuda(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        result = invoke("attention", "--device", "cuda")
        assert result.exit_code == 2
        assert "there is no CUDA device here" in result.stderr


def test_sdpa_repeats_heads_as_transformers_does():
    inputs = inputs_of(SMALL, CPU)
    assert sdpa(inputs)(inputs.keys[0], inputs.values[0]).shape == (1, 4, 5, 32)


class TestOnCuda:
    """The lines that only a GPU reaches, with a CUDA that only counts."""

    @pytest.fixture
    def calls(self, monkeypatch):
        made = []

        class Stream:
            def __init__(self, device):
                assert device.type == "cuda"

            def wait_stream(self, other):
                made.append("wait")

        class Graph:
            def replay(self):
                made.append("replay")

        class Capture:
            """As torch's: a capture that fails to end leaves its stream the current one."""

            def __init__(self, graph, **options):
                self.stream = options["stream"]

            def __enter__(self):
                made.append("begin")

            def __exit__(self, kind, error, trace):
                made.append("end")
                if error is not None:
                    raise RuntimeError("operation failed due to a previous error during capture")

        def note(name):
            monkeypatch.setattr(torch._C, f"_cuda_{name}", lambda *which: made.append(name), raising=False)

        note("clearCublasWorkspaces")
        note("endAllocateToPool")
        note("releasePool")
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "graph", Capture)
        monkeypatch.setattr(torch.cuda, "stream", lambda given: nullcontext())
        monkeypatch.setattr(torch.cuda, "device", lambda given: nullcontext())
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
        monkeypatch.setattr(torch.cuda, "set_stream", lambda given: made.append("main stream"))
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: made.append("sync"))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: made.append("empty"))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda number: number)  # nothing on the first one
        return made

    def test_graphs(self, calls):
        replay = bench.captured(lambda: calls.append("run"), torch.device("cuda"))
        own_workspace = ["clearCublasWorkspaces", "begin", "run", "end", "clearCublasWorkspaces"]
        assert calls == ["wait", "run", "wait", *own_workspace]
        calls.clear()
        assert median_ms(replay, torch.device("cuda"), 1, warm=0) >= 0
        assert calls == ["sync", "replay", "sync"]

    def test_what_cannot_be_captured(self, calls):
        def run():
            if calls[-1] == "begin":
                raise RuntimeError("a host read\nand where")

        assert bench.captured(run, torch.device("cuda")) is None
        assert calls[-5:] == ["main stream", "sync", "endAllocateToPool", "releasePool", "clearCublasWorkspaces"]
        with pytest.raises(RuntimeError, match=r"^a host read$"):  # not what ending the capture says
            GraphPool(torch.device("cuda")).capture(run)

    def test_ways_and_memory(self, calls, monkeypatch):
        pytest.importorskip("triton")
        from specx.eval.gpu_setup import free

        monkeypatch.setattr(bench, "trouble_with", lambda name, device: "absent" if name == "flash" else None)
        assert list(contenders(torch.device("cuda"))) == ["specx", "torch", "sdpa"]
        assert bench.copy_bytes(torch.device("cuda")) == 1 << 30
        free(torch.device("cuda"))
        assert calls == ["empty"]

    def test_parts_wait(self, calls):
        out = SyncedGeneration(10)
        with out.clock("draft"):
            calls.append("work")
        assert calls == ["sync", "work", "sync"]
        assert out.seconds["draft"] > 0
