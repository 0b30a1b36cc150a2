"""Runs that are killed, gone on with, shared among workers: nothing measured is lost, and the figures are the same."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from specx import cli
from specx.eval import pool, summary
from specx.eval.ledger import claimed, read_ledger
from specx.eval.pool import Pool
from specx.eval.progress import Remaining, spoken
from specx.eval.units import Unit
from specx.eval.workbench import Task

pytest_plugins = ["disk"]
SOURCE = "".join(f"def name_{n}(steps, coloured):\n    return steps[{n}] + coloured\n" for n in range(80))
SMALL = ["--lengths", "64,128", "--samples", "2", "--spans", "2", "--span-tokens", "16", "--max-new-tokens", "6"]
METHODS = ["--measure", "tau,speed,trace", "--methods", "ar,full,auto", "--draft-context", "96"]
TIMES = {"load", "ttft_seconds", "decode_seconds", "decode_tokens_per_second", "ms_draft", "ms_verify",
         "ms_retrieval", "ms_other", "shared"}  # fmt: skip
TIMED = {"decode_tokens_per_second", "e2e_tokens_per_second", "ttft_seconds", "speed_up", "efficiency", "ms_per_step"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "source.jsonl"
    file.write_text("".join(json.dumps({"text": SOURCE[start:]}) + "\n" for start in (0, 100)))
    return str(file)


def invoke(*args):
    result = CliRunner().invoke(cli.main, ["eval", *(str(arg) for arg in args)])
    assert result.exception is None or isinstance(result.exception, SystemExit)  # anything else is a traceback
    return result


def rows_in(out):
    """Rows by unit, without what time did to them."""
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    return sorted(({k: v for k, v in row.items() if k not in TIMES} for row in rows), key=lambda row: row["unit"])


def summary_in(out):
    """The summary without what time and place did to it."""
    found = json.loads((out / "summary.json").read_text())
    results = [{k: v for k, v in each.items() if k not in TIMED} for each in found["results"]]
    return {k: v for k, v in found.items() if k not in ("command", "load", "workers", "notes")} | {"results": results}


@pytest.fixture(scope="module")
def unbroken(disk, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "out"
    result = invoke(*disk.pair, "--data", data, *SMALL, *METHODS, "--out", out)
    assert result.exit_code == 0, result.stderr
    return out


def killed(process, out, rows):
    """Kill a run without mercy once it has written so many rows."""
    file, began = out / "rows.jsonl", time.monotonic()
    while not file.exists() or len(file.read_bytes().splitlines()) < rows:
        assert process.poll() is None
        assert time.monotonic() - began < 120
        time.sleep(0.01)
    process.kill()
    process.communicate()


class TestKilled:
    def test_resume_gives_the_unbroken_run(self, disk, data, specx_command, tmp_path, unbroken):
        command, env = specx_command
        out = tmp_path / "out"
        options = [*disk.pair, "--data", data, *SMALL, *METHODS, "--out", str(out)]
        with subprocess.Popen([*command, "eval", *options], env=env, stdout=-3, stderr=-3) as process:
            killed(process, out, 6)
        before = read_ledger(out / "rows.jsonl")
        assert 6 <= len(before) < len(rows_in(unbroken))
        assert json.loads((out / "summary.json").read_text())["status"] == "running"
        assert "already holds results" in invoke(*options).stderr
        (out / "rows.jsonl").open("a").write('{"measure": "sp')  # as a kill in the middle of a write would leave it
        result = invoke(*options, "--resume")
        assert result.exit_code == 0, result.stderr
        assert "going on after" in result.stderr
        assert rows_in(out) == rows_in(unbroken)
        assert summary_in(out) == summary_in(unbroken)
        whole = len({row["unit"] for row in before}) - 1  # the last one may have been in flight
        assert read_ledger(out / "rows.jsonl")[:whole] == before[:whole]  # what was measured stays as it was
        done = invoke(*options, "--resume")
        assert done.exit_code == 0, done.stderr
        assert rows_in(out) == rows_in(unbroken)

    def test_where_earlier_rows_come_from_is_not_forgotten(self, disk, data, unbroken, tmp_path):
        out = shutil.copytree(unbroken, tmp_path / "moved")
        summary = json.loads((out / "summary.json").read_text())
        (out / "summary.json").write_text(json.dumps(summary | {"commit": "of another day"}))
        for _ in range(2):
            assert invoke(*disk.pair, "--data", data, *SMALL, *METHODS, "--out", out, "--resume").exit_code == 0
            notes = json.loads((out / "summary.json").read_text())["notes"]
            assert [note for note in notes if "rows before" in note] == [
                "note: rows before were measured with commit of another day"
            ]

    def test_two_runs_do_not_write_into_one_folder(self, disk, data, unbroken):
        options = [*disk.pair, "--data", data, *SMALL, *METHODS, "--out", unbroken, "--resume"]
        with claimed(unbroken):
            result = invoke(*options)
        assert result.exit_code == 2
        assert "another process measures into" in result.stderr
        assert invoke(*options).exit_code == 0

    def test_another_configuration_is_refused_and_named(self, disk, data, unbroken):
        before = (unbroken / "rows.jsonl").read_text()
        for changed, said in [
            (["--samples", 1], "--samples was 2, now 1"),
            (["--methods", "ar,full"], "--methods was ar,full,auto, now ar,full"),
            (["--nodes", 4], "loading was"),
            (["--runs", 2], "--runs was 1, now 2"),
        ]:
            result = invoke(*disk.pair, "--data", data, *SMALL, *METHODS, *changed, "--out", unbroken, "--resume")
            assert result.exit_code == 2
            assert "holds results of another configuration" in result.stderr
            assert said in result.stderr
            assert "Traceback" not in result.stderr
        assert (unbroken / "rows.jsonl").read_text() == before

    def test_other_text_under_the_same_name_is_refused(self, disk, data, tmp_path, unbroken):
        changed = tmp_path / "source.jsonl"
        changed.write_text(Path(data).read_text().replace("coloured", "colourless"))
        old = json.loads((unbroken / "summary.json").read_text())["configuration"]
        result = invoke(*disk.pair, "--data", changed, *SMALL, *METHODS, "--out", unbroken, "--resume")
        assert f"data hash was {old['data hash']}, now " in result.stderr

    def test_a_broken_line_is_named(self, disk, data, tmp_path, unbroken):
        out = tmp_path / "out"
        out.mkdir()
        lines = (unbroken / "rows.jsonl").read_text().splitlines()
        (out / "summary.json").write_text((unbroken / "summary.json").read_text())
        (out / "rows.jsonl").write_text("\n".join([lines[0], "{broken", *lines[2:]]) + "\n")
        result = invoke(*disk.pair, "--data", data, *SMALL, *METHODS, "--out", out, "--resume")
        assert result.exit_code == 2
        assert f"{out / 'rows.jsonl'} line 2 is broken" in result.stderr
        (out / "summary.json").unlink()
        result = invoke(*disk.pair, "--data", data, *SMALL, *METHODS, "--out", out, "--resume")
        assert "has rows but no summary.json to compare with" in result.stderr


class TestWorkers:
    def test_rows_are_those_of_one_though_a_worker_is_lost(self, disk, data, tmp_path, unbroken, monkeypatch):
        """The first worker dies as soon as it was given work."""
        real, victims = pool._asked, []

        def asked(process, unit):
            if not victims:
                victims.append(unit.number)
                process.kill()
            return real(process, unit)

        monkeypatch.setattr(pool, "_asked", asked)
        options = [*disk.pair, "--data", data, *SMALL, *METHODS, "--workers", 2]
        result = invoke(*options, "--out", tmp_path)
        assert result.exit_code == 0, result.stderr
        assert "note: 1 workers were lost; what they had in hand was measured again" in result.stderr
        assert len(victims) == 1
        assert "2 workers measure at the same time" in result.stderr
        assert rows_in(tmp_path) == rows_in(unbroken)
        assert summary_in(tmp_path) == summary_in(unbroken)
        assert {row["shared"] for row in read_ledger(tmp_path / "rows.jsonl")} == {2}
        assert "not timings of a quiet machine" in (tmp_path / "summary.md").read_text()

    def test_a_unit_that_ends_every_worker_ends_the_run(self, monkeypatch):
        dying = [sys.executable, "-c", "import sys; sys.stdin.readline(); sys.exit(7)"]
        monkeypatch.setattr(pool, "COMMAND", dying)
        task = Task({}, ("ar",), 4)
        with pytest.raises(RuntimeError, match=r"memory after 64 tokens ended 3 workers \(the last with status 7"):
            list(Pool(task, 1).run([Unit(0, "memory", 64, 1)]))

    def test_an_error_in_a_worker_is_told_on_one_line(self, disk, tmp_path):
        loading = {"target": str(tmp_path), "draft": None}
        with pytest.raises(RuntimeError, match="a worker cannot load the models: ") as caught:
            list(Pool(Task(loading, ("ar",), 4), 1).run([Unit(0, "memory", 64, 1)]))
        assert "\n" not in str(caught.value)

    def test_ctrl_c_ends_them_all(self, disk, data, specx_command, tmp_path):
        command, env = specx_command
        out = tmp_path / "out"
        options = [*disk.pair, "--data", data, *SMALL, *METHODS, "--spans", "500", "--workers", "2", "--out", str(out)]
        before = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            process = subprocess.Popen([*command, "eval", *options], env=env, stdout=-1, stderr=-1, text=True)
        finally:
            signal.signal(signal.SIGINT, before)
        lines = iter(process.stderr.readline, "")
        while not next(lines).startswith("speed "):
            pass
        children = [int(each) for each in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130, errors
        assert errors.splitlines()[-1] == "interrupted"
        found = json.loads((out / "summary.json").read_text())
        assert found["status"] == "interrupted"
        assert found["results"]
        assert not [each for each in children if Path(f"/proc/{each}").exists()]


class TestRay:
    def test_rows_are_those_of_one_even_if_an_actor_dies(self, disk, data, tmp_path, unbroken, monkeypatch):
        pytest.importorskip("ray", reason="ray is not installed: the cluster is not tested")
        from specx.eval import ray_pool

        class Mortal(ray_pool._Actor):
            def answer(self, packed):
                mark = tmp_path / "died"
                if packed["number"] == 1 and not mark.exists():
                    mark.write_text("")
                    os._exit(1)
                return super().answer(packed)

        monkeypatch.setattr(ray_pool, "_Actor", Mortal)
        options = [*disk.pair, "--data", data, *SMALL, *METHODS, "--ray", "local", "--workers", 2]
        result = invoke(*options, "--out", tmp_path / "out")
        assert result.exit_code == 0, result.stderr
        assert (tmp_path / "died").exists()
        assert "note: 1 workers were lost" in result.stderr
        assert rows_in(tmp_path / "out") == rows_in(unbroken)
        assert summary_in(tmp_path / "out") == summary_in(unbroken)

    def test_without_ray(self, disk, data, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "ray", None)
        options = [*disk.pair, "--data", data, *SMALL, "--methods", "ar", "--measure", "speed", "--ray", "auto"]
        result = invoke(*options, "--out", tmp_path / "out")
        assert result.exit_code == 1
        assert result.stderr == "Error: --ray needs Ray: pip install 'specx[ray]'\n"
        assert not (tmp_path / "out").exists()


class TestSummary:
    def test_is_as_its_schema_says(self, unbroken):
        jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed: the layout is not checked")
        schema = json.loads(Path(summary.__file__).with_name("summary.schema.json").read_text())
        jsonschema.Draft202012Validator.check_schema(schema)
        found = json.loads((unbroken / "summary.json").read_text())
        jsonschema.validate(found, schema)
        for breaks in ({"status": "done"}, {"results": [{}]}, {"more": 1}, {"hardware": {}}):
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(found | breaks, schema)

    def test_tells_what_ran_where_and_what_came_out(self, unbroken):
        found = json.loads((unbroken / "summary.json").read_text())
        assert (found["status"], found["ended_by"]) == ("complete", None)
        assert found["units"] == {"done": 10, "of": 10}  # 4 prompts, 2 traces, 2 ordinary spans at 2 lengths
        figures = {(each["measure"], each["context"], each["method"]): each for each in found["results"]}
        tau = figures["tau", 128, "auto"]["tau"]
        assert 1 <= tau["low"] <= tau["mean"] <= tau["high"]
        speed = figures["speed", 128, "auto"]
        assert speed["same"] == {"equal": 2, "of": 2, "largest_margin": None}
        assert speed["speed_up"]["mean"] > 0
        assert speed["e2e_tokens_per_second"] < speed["decode_tokens_per_second"]["high"]
        assert set(speed["ms_per_step"]) == {"draft", "verify", "retrieval", "other"}
        steps = sum(speed["accepted_histogram"].values())
        assert speed["accepted_per_step"] == pytest.approx(
            sum(int(n) * count for n, count in speed["accepted_histogram"].items()) / steps, abs=0.51
        )
        assert figures["trace", 128, "auto"]["policy"] == "auto"

    def test_changes_are_named(self):
        assert summary.changes({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}) == ["b was 2, now 3", "c was None, now 4"]


class TestRemaining:
    def test_the_time_left_is_guessed_from_what_is_alike(self, monkeypatch):
        now = [0.0]
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        units = [Unit(number, "speed", context, 1) for number, context in enumerate([512, 512, 2048])]
        left = Remaining(units)
        assert (left.left, left.total, left.words()) == (3, 3, "some time")
        now[0] = 2.0
        left.done(units[0])
        assert left.seconds() == 2.0 + 4 * 2.0
        now[0] = 6.0
        left.done(units[1])
        assert left.seconds() == 4 * 3.0
        assert left.words() == "about 12 s"

    def test_in_words(self):
        assert [spoken(each) for each in (5.4, 89, 90, 5399, 7200)] == ["5 s", "89 s", "2 min", "90 min", "2.0 h"]
