"""The GPU suite without a GPU: its dry run gives every row, and neither an error, a dead process nor time ends it."""

import json
import sys
import time

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("triton")

from specx.eval import gpu, gpu_setup, gpu_worker
from specx.eval.gpu_rows import SHARES, Job, append_row, failed_row, read_rows
from specx.eval.gpu_setup import Task, setup_of
from specx.eval.gpu_tables import aims, markdown, tables


def job_of(folder, *sections, seconds=600.0):
    deadline = time.time() + seconds
    return Job(
        [(name, deadline) for name in sections], str(folder / "rows.jsonl"), str(folder / "marker"), True, "test"
    )


def worked(job, setup=None):
    said = []
    assert gpu_worker.work(job, setup or setup_of(True), said.append)
    return read_rows(gpu.Path(job.rows)), said


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The whole dry run, in this process."""
    found, _ = worked(job_of(tmp_path_factory.mktemp("dry"), *SHARES))
    return found


def of(rows, section, **wanted):
    return [r for r in rows if r["section"] == section and all(r.get(key) == value for key, value in wanted.items())]


class TestDryRun:
    def test_every_row_is_there_and_right(self, rows):
        assert [row for row in rows if row.get("status") not in ("ok", None)] == []
        assert [row["section"] for row in rows if "name" not in row] == ["facts"]
        setup = setup_of(True)
        assert len(of(rows, "numbers", check="tree_attention")) >= 3
        assert len(of(rows, "numbers", check="output")) == 9
        assert len(of(rows, "numbers", check="commit_rows")) == 6
        assert {row["name"] for row in of(rows, "numbers", check="backend")} == {"backend cpu"}
        sizes = len(setup.lengths) * 2
        assert len(of(rows, "step", part="verify")) == sizes * len(setup.nodes)
        assert len(of(rows, "step", part="draft")) == len(of(rows, "step", part="loop")) == sizes
        assert {row["method"] for row in of(rows, "kernel")} == {"specx", "cpu", "reference", "sdpa"}
        methods = {row["method"] for row in of(rows, "end-to-end")}
        assert methods == {"plain", "auto", "window", "full", "ar", "ar-static"}
        assert len(of(rows, "end-to-end")) == len(methods) * len(setup.lengths)

    def test_rows_say_what_ran(self, rows):
        for row in of(rows, "step") + of(rows, "end-to-end"):
            assert row["backend"] == "cpu"
            assert "flash attention" in row["backend_reason"]
        assert {row["no_graphs"] for row in of(rows, "step", graphs=True)} == {None}
        assert {row["no_graphs"] for row in of(rows, "step", graphs=False)} == {"not asked for"}

    def test_figures_agree_with_their_definitions(self, rows):
        setup = setup_of(True)
        shape = setup.pairs[0].target
        attention = 2 * shape.hidden * shape.head_dim * (shape.heads + shape.kv_heads)
        norms = shape.hidden * (2 * shape.layers + 1)
        weights = shape.vocab * shape.hidden + shape.layers * (attention + 3 * shape.hidden * shape.ffn) + norms
        for row in of(rows, "step", part="verify"):
            cache = 2 * shape.layers * shape.kv_heads * shape.head_dim * (row["length"] + row["nodes"])
            assert row["bytes"] == 4 * (weights + cache)
            assert row["ratio"] == pytest.approx(row["ms"] * row["bandwidth"] / 1000 / row["bytes"])
        for row in of(rows, "kernel"):
            assert row["bytes"] == 2 * 4 * (row["length"] + row["rows"]) * row["groups"] * row["dim"]
            assert row["share"] == pytest.approx(row["bytes"] / (row["ms"] / 1000) / row["bandwidth"])
        for row in of(rows, "end-to-end"):
            (plain,) = of(rows, "end-to-end", method="plain", length=row["length"])
            assert row["speed_up"] == pytest.approx(row["tokens_per_second"] / plain["tokens_per_second"])
            assert row["differs_at"] is None
            if row["tau"]:
                assert row["efficiency"] == pytest.approx(row["speed_up"] / row["tau"])

    def test_a_bounded_draft_stays_bounded(self, rows):
        setup = setup_of(True)
        for method in ("window", "auto"):
            for row in of(rows, "end-to-end", method=method):
                assert row["draft_kv_tokens"] <= setup.draft_context
        (full,) = of(rows, "end-to-end", method="full", length=setup.lengths[-1])
        assert full["draft_kv_tokens"] > setup.lengths[-1]

    def test_the_table(self, rows):
        text = markdown(rows)
        for title in ("Aims", "Kernels", "Backends", "Outputs", "Verify", "Draft and retrieval", "Loop", "Attention",
                      "End to end"):  # fmt: skip
            assert f"\n## {title}\n" in text
        assert "Wrong, failed or skipped" not in text
        assert "not that of real models" in text
        assert text.splitlines()[2] == "- command: test"


def section_of(*tasks):
    """A section made of (name, what it does) that a test names."""

    def made(setup):
        for name, run in tasks:
            yield Task(name, run, "kind", about=0.0)

    return made


def error(message, kind=RuntimeError):
    def run():
        raise kind(message)

    return run


class TestFailures:
    def test_an_error_is_a_row_and_ends_nothing(self, monkeypatch, tmp_path):
        first = section_of(("a", dict), ("b", error("no | memory\nleft")), ("c", lambda: {"ok": False, "error": 2}))
        broken = section_of(("d", error("of a generator")))
        monkeypatch.setitem(gpu_worker.SECTIONS, "numbers", first)
        monkeypatch.setitem(gpu_worker.SECTIONS, "step", lambda setup: (error("no pair")() for _ in range(1)))
        monkeypatch.setitem(gpu_worker.SECTIONS, "kernel", broken)
        found, said = worked(job_of(tmp_path, "numbers", "step", "kernel"))
        states = {(row["section"], row["name"]): row["status"] for row in found[1:]}
        assert states == {
            ("numbers", "a"): "ok", ("numbers", "b"): "failed", ("numbers", "c"): "wrong",
            ("step", "its preparation"): "failed", ("kernel", "d"): "failed",
        }  # fmt: skip
        assert found[2]["message"] == "RuntimeError: no | memory left"
        assert "numbers: b: failed RuntimeError" in said[1]
        (table,) = tables(found[2:3])
        assert table.rows == [["numbers", "b", "failed", "RuntimeError: no / memory left"]]

    def test_a_broken_device_ends_the_process_and_the_next_one_goes_on(self, monkeypatch, tmp_path):
        ran = []
        made = section_of(
            ("a", lambda: ran.append("a") or {}), ("b", error("fault")), ("c", lambda: ran.append("c") or {})
        )
        monkeypatch.setitem(gpu_worker.SECTIONS, "numbers", made)
        monkeypatch.setattr(gpu_worker, "healthy", lambda device: False)
        job = job_of(tmp_path, "numbers")
        assert not gpu_worker.work(job, setup_of(True), lambda line: None)
        assert ran == ["a"]
        assert gpu_worker.work(job, setup_of(True), lambda line: None)
        assert ran == ["a", "c"]
        assert [row.get("name") for row in read_rows(gpu.Path(job.rows))] == [None, "a", "b", "c"]

    def test_a_cpu_is_healthy(self):
        assert gpu_worker.healthy(torch.device("cpu"))

    def test_the_budget_skips(self, monkeypatch, tmp_path):
        def slow():
            time.sleep(0.2)
            return {}

        tasks = [Task(name, slow, "slow", about=0.0, cost=cost) for name, cost in (("a", 1), ("b", 1), ("c", 100))]
        tasks += [
            Task("d", dict, "fast", about=5.0),
            Task("e", dict, "quick", about=0.0, extra=9.0),
            Task("f", dict, "f"),
        ]
        monkeypatch.setitem(gpu_worker.SECTIONS, "numbers", lambda setup: iter(tasks))
        found, _ = worked(job_of(tmp_path, "numbers", seconds=4.5))
        assert [row["status"] for row in found[1:]] == ["ok", "ok", "skipped", "skipped", "skipped", "ok"]
        assert "of its budget are left" in found[3]["message"]
        assert "| numbers | c | skipped |" in markdown([row for row in found if row.get("status") != "ok"])

    def test_sections_share_the_budget(self):
        assert gpu.deadlines(list(SHARES), 100.0, 420.0)[-1] == ("end-to-end", pytest.approx(520.0))
        found = gpu.deadlines(["step", "end-to-end"], 0.0, 110.0)
        assert found == [("step", pytest.approx(60.0)), ("end-to-end", pytest.approx(110.0))]


WORKER = """
import json, os, sys
job = json.load(sys.stdin)
names = [json.loads(line)["name"] for line in open(job["rows"])] if os.path.exists(job["rows"]) else []
for name in "abc":
    if name not in names:
        open(job["marker"], "w").write(json.dumps(["numbers", name]))
        if name == "b":
            {death}
        open(job["rows"], "a").write(json.dumps({{"section": "numbers", "name": name, "status": "ok"}}) + "\\n")
"""


class TestProcesses:
    def states(self, tmp_path, death, seconds=60.0):
        rows, worker = tmp_path / "rows.jsonl", (sys.executable, "-c", WORKER.format(death=death))
        gpu.supervise(rows, [("numbers", time.time() + seconds)], True, "test", worker)
        return [(row["name"], row["status"], row.get("message")) for row in read_rows(rows)]

    def test_a_death_costs_one_row(self, tmp_path):
        found = self.states(tmp_path, "os.abort()")
        assert found == [("a", "ok", None), ("b", "failed", "the process was killed by signal 6"), ("c", "ok", None)]

    def test_what_does_not_end_is_ended(self, tmp_path, monkeypatch):
        monkeypatch.setattr(gpu, "GRACE", 0.0)
        found = self.states(tmp_path, "import time; time.sleep(60)", seconds=1.0)
        assert found == [("a", "ok", None), ("b", "failed", "it did not end in time")]

    def test_a_process_that_cannot_start_is_not_started_again(self, tmp_path):
        rows = tmp_path / "rows.jsonl"
        gpu.supervise(rows, [("numbers", time.time() + 60)], True, "test", (sys.executable, "-c", "1 / 0"))
        assert [row["name"] for row in read_rows(rows)] == ["its start"]

    def test_the_command(self, tmp_path, monkeypatch):
        """Through a process of its own, as it will run."""
        made = CliRunner().invoke(
            gpu.main, ["--dry-run", "--section", "kernel", "--out", str(tmp_path), "--budget", 90]
        )
        assert made.exit_code == 0, made.output
        (rows,) = tmp_path.glob("gpu-dry-run-*.jsonl")
        assert len(of(read_rows(rows), "kernel", status="ok")) >= 16
        assert "## Attention" in rows.with_suffix(".md").read_text()
        assert "## Attention" in made.stdout
        again = gpu.unused(tmp_path, "dry run")
        assert again != rows
        assert again.stem == f"{rows.stem}-2"

    def test_without_cuda(self, monkeypatch, tmp_path):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        made = CliRunner().invoke(gpu.main, ["--out", str(tmp_path)])
        assert made.exit_code == 2
        assert "no CUDA device here; --dry-run tries the suite on a CPU" in made.stderr
        assert not list(tmp_path.iterdir())

    def test_an_unknown_section(self):
        made = CliRunner().invoke(gpu.main, ["--dry-run", "--section", "numbers,steps"])
        assert made.exit_code == 2
        assert "--section takes numbers, step, kernel, end-to-end" in made.stderr


def test_rows_survive_a_cut_line(tmp_path):
    file = tmp_path / "rows.jsonl"
    append_row(file, failed_row("numbers", "a", "why", 1.234))
    with file.open("a") as log:
        log.write('{"section": "num')
    assert read_rows(file) == [
        {"section": "numbers", "name": "a", "status": "failed", "message": "why", "seconds": 1.23}
    ]
    assert read_rows(tmp_path / "none") == []


def test_aims_count_the_rows_that_meet_them():
    kernels = [{"method": "specx", "length": length, "share": share} for length, share in
               ((2048, 0.1), (32768, 0.85), (131072, 0.7))]  # fmt: skip
    captured = {"no_graphs": None, "draft_no_graphs": None}
    runs = [captured | {"method": "auto", "length": length, "share_draft": 0.1, "efficiency": value} for length, value
            in ((2048, 0.2), (15872, 0.8))]  # fmt: skip
    runs.append(runs[-1] | {"draft_no_graphs": "a host read"})
    steps = [captured | {"part": "verify", "graphs": graphs, "ratio": 1.2} for graphs in (True, False)]
    steps.append(steps[0] | {"no_graphs": "a host read"})
    (table,) = aims({"kernel": kernels, "end-to-end": runs, "step": steps})
    assert [line[1:] for line in table.rows] == [
        ["1 of 2", "0.85", "0.70"], ["1 of 1", "1.20", "1.20"], ["2 of 2", "0.10", "0.10"], ["1 of 1", "0.80", "0.80"],
    ]  # fmt: skip
    assert aims({}) == []


def test_the_real_sizes_are_those_of_the_plan():
    setup = setup_of(False)
    assert (setup.device.type, setup.dtype, setup.new) == ("cuda", torch.bfloat16, 64)
    assert setup.lengths[-1] + setup.new + 256 < 16384
    assert [pair.name for pair in setup.pairs] == ["7B", "8B"]


def test_rows_are_plain_json(rows):
    assert json.loads(json.dumps(rows)) == rows
    assert gpu_setup.Setup.__doc__
