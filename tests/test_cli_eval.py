"""`specx eval` as a hostile, impatient user meets it."""

import json
import re
import signal
import subprocess
import sys
from collections import Counter

import pytest
from click.testing import CliRunner

from specx import api, cli
from specx.eval import memory, speed

pytest_plugins = ["disk"]
SOURCE = "".join(f"def name_{n}(steps, coloured):\n    return steps[{n}] + coloured\n" for n in range(80))
SMALL = ["--lengths", "64,128", "--samples", 1, "--spans", 1, "--span-tokens", 16, "--max-new-tokens", 4]
TITLE = re.compile(r"^ *(tau|Speed|Peak)")


def invoke(*args):
    result = CliRunner().invoke(cli.main, ["eval", *(str(arg) for arg in args)])
    assert result.exception is None or isinstance(result.exception, SystemExit)  # anything else is a traceback
    return result


def fails(code, *args):
    """Run a command that must fail with this exit code, printing one error and no table; return the error."""
    result = invoke(*args)
    assert (result.exit_code, result.stdout) == (code, "")
    assert "Traceback" not in result.stderr
    return result.stderr.split("Error: ", 1)[1]


@pytest.fixture
def no_load(monkeypatch):
    """A mistake that must be found before anything is loaded."""
    monkeypatch.setattr(api, "load", lambda *args, **kwargs: pytest.fail("a model was loaded"))


@pytest.fixture
def no_measure(monkeypatch):
    """A mistake that must be found before anything is measured."""
    monkeypatch.setattr("specx.eval.runner.measured", lambda *args: pytest.fail("measured"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "source.jsonl"
    file.write_text("".join(json.dumps({"text": SOURCE[start:]}) + "\n" for start in (0, 100)))
    return file


def rows_in(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


class TestOutput:
    def test_tables_on_stdout_rows_and_a_summary_on_disk(self, disk, data, tmp_path):
        out = tmp_path / "new" / "out"
        options = ["--measure", "tau,speed", "--methods", "ar,hf-assisted,full,window:nodes=4", "--draft-context", 96]
        result = invoke(*disk.pair, "--data", data, *SMALL, *options, "--out", out)
        assert result.exit_code == 0, result.stderr
        lines = [line for line in result.stdout.splitlines() if line.strip()]
        titles = [line.strip() for line in lines if TITLE.match(line)]
        assert titles[0] == "tau, ordinary spans"
        assert titles[-1] == "Speed"
        assert "tokens/s" not in lines[0]
        assert not any(line.startswith(("speed ", "loading", "written", "warning", "note")) for line in lines)
        rows, summary = rows_in(out), (out / "summary.md").read_text()
        speeds = [row for row in rows if row["measure"] == "speed"]
        assert [row["method"] for row in speeds] == ["ar", "ar-static", "hf-assisted", "full", "window:nodes=4"] * 2
        assert all(row["same"] and row["new"] == 4 for row in speeds)
        taus = [row for row in rows if row["measure"] == "tau"]
        assert {(row["method"], row["context"]) for row in taus} == {
            (method, context) for method in ("full", "window:nodes=4") for context in (64, 128)
        }
        assert all(row["steps"] >= 2 for row in taus)
        assert {row["draft_kv_tokens"] > 96 for row in taus if row["method"] == "full"} == {True, False}
        assert all(row["draft_kv_tokens"] <= 96 for row in taus if row["method"] != "full")
        assert all(f"## {title}\n" in summary for title in titles)
        assert "context 96 (asked for)" in summary
        assert result.stderr.splitlines()[-1].startswith(f"written: {out / 'rows.jsonl'}, {out / 'summary.md'}, ")
        assert "already holds results: give another one, or remove" in fails(
            2, *disk.pair, "--data", data, *SMALL, "--out", out
        )
        assert rows_in(out) == rows

    def test_outputs_are_compared_with_reference_answers(self, disk, data, tmp_path):
        (tmp_path / "asked_64.jsonl").write_text(json.dumps({"text": SOURCE, "answer": "return steps"}) + "\n")
        options = ["--measure", "speed,tau", "--methods", "ar,full", "--max-new-tokens", 8, "--samples", 1]
        for source, lengths, key in ((tmp_path / "asked_64.jsonl", 64, "rouge_l"), ("needle", 500, "found")):
            out = tmp_path / key
            result = invoke(*disk.pair, "--data", source, "--lengths", lengths, *options, "--spans", 1, "--out", out)
            assert result.exit_code == 0, result.stderr
            speeds = [row for row in rows_in(out) if row["measure"] == "speed"]
            assert len({row[key] for row in speeds}) == 1
            assert len(speeds) == 3
            assert ("ROUGE-L" if key == "rouge_l" else "Answers found") in result.stdout
        assert "note: tau walks along a text, and needle has none to continue; it is left out" in result.stderr
        assert {row["measure"] for row in rows_in(out)} == {"speed"}

    def test_all_methods(self, disk, data, tmp_path):
        options = ["--lengths", 64, "--samples", 1, "--max-new-tokens", 3, "--methods", "all", "--measure", "speed"]
        result = invoke(*disk.pair, "--data", data, *options, "--runs", 2, "--draft-context", 64, "--out", tmp_path)
        assert result.exit_code == 0, result.stderr
        rows = rows_in(tmp_path)
        names = ["ar", "ar-static", "hf-assisted", "hf-lookup", "plain", "lookup", "tree", "tree+flash", "tree+hybrid",
                 "tree+retrieval", "full", "window", "retrieval", "auto", "specx"]  # fmt: skip
        assert [(row["run"], row["method"]) for row in rows] == [(run, name) for run in (0, 1) for name in names]
        assert all(row["same"] for row in rows)
        assert "ran as" not in result.stdout
        assert "| 64 | tree+flash | 1 |" in (tmp_path / "summary.md").read_text()  # one prompt, timed twice

    def test_lengths_by_default_are_those_of_the_data_and_fit_the_target(self, disk, tmp_path):
        for label in ("32", "8K"):
            (tmp_path / f"source_{label}.jsonl").write_text(json.dumps({"text": SOURCE}) + "\n")
        options = ["--measure", "speed", "--methods", "plain", "--samples", 1, "--max-new-tokens", 2]
        result = invoke("--target", disk.target, "--data", tmp_path, *options, "--out", tmp_path / "out")
        assert result.exit_code == 0, result.stderr
        assert "note: the target has 4096 positions: prompts of 3584 instead of longer ones" in result.stderr
        assert [row["context"] for row in rows_in(tmp_path / "out")] == [32, 3584]

    def test_without_a_draft(self, disk, data, tmp_path):
        options = ["--measure", "speed", "--methods", "ar,plain", "--out", tmp_path]
        result = invoke("--target", disk.target, "--data", data, *SMALL, *options)
        assert result.exit_code == 0, result.stderr
        assert {row["method"] for row in rows_in(tmp_path)} == {"ar", "ar-static", "plain"}
        assert "no draft" in (tmp_path / "summary.md").read_text()

    def test_generation_options_reach_every_method_and_process(self, disk, data, tmp_path, monkeypatch):
        seen = []

        def measure(loading, prompts, methods, new):
            seen.append((loading, methods, new))
            yield {"measure": "memory", "context": 64, "method": methods[0], "peak_bytes": 2**21, "before_bytes": 2**20}

        monkeypatch.setattr(memory, "measure", measure)
        options = ["--measure", "memory,speed", "--temperature", 0.5, "--nodes", 5, "--refill", "gather", "--methods"]
        result = invoke(*disk.pair, "--data", data, *SMALL, *options, "ar,window", "--out", tmp_path, "--no-specextend")
        assert result.exit_code == 0, result.stderr
        assert [(methods, new) for _, methods, new in seen] == [(["ar"], 4), (["window"], 4)] * 2
        loading = seen[0][0]
        assert json.loads(json.dumps(loading)) == loading  # it goes to other processes
        assert (loading["temperature"], loading["nodes"], loading["refill"]) == (0.5, 5, "gather")
        assert (loading["target"], loading["draft"], loading["specextend"]) == (disk.target, disk.draft, False)
        assert not {"max_new_tokens", "policy", "stop"} & loading.keys()
        assert not any("same" in row for row in rows_in(tmp_path))


@pytest.mark.usefixtures("no_load")
class TestMistakesFoundBeforeLoading:
    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--measure", "taus"], "--measure takes tau, speed, memory, trace, joined by commas; got 'taus'; did you"),
            (["--measure", "tau,sped"], "did you mean 'speed'?"),
            (["--measure", " , "], "--measure takes tau, speed, memory"),
            (["--methods", "retrival"], "unknown method 'retrival'; did you mean 'retrieval'?"),
            (["--methods", "full:recnt=3"], "did you mean 'recent'?"),
            (["--methods", ""], "no method given"),
            (["--lengths", "2M"], "a length must be a whole number of tokens like 512, 2K or 1.5K; got '2M'"),
            (["--lengths", ""], "got ''"),
            (["--lengths", "0"], "got '0'"),
            (["--samples", 0], "--samples"),
            (["--spans", 0], "--spans"),
            (["--span-tokens", 15], "--span-tokens"),
            (["--max-new-tokens", 0], "--max-new-tokens"),
            (["--policy", "full"], "No such option '--policy'"),
            (["--stop", "a"], "No such option '--stop'"),
            (["--data", "govrepot"], "repobench-p, pg19, booksum, aime24; did you mean 'govreport'?"),
            (["--data", "nowhere"], "data must be stdlib, a JSONL file or a folder of them; got 'nowhere'"),
            (["--data", "."], "without .jsonl files"),
            (["--out", "/proc/x"], "--out /proc/x cannot be written: No such file"),
            (["--out", "/dev/null"], "--out /dev/null cannot be written"),
            (["--draft", "vicuna68m"], "did you mean 'vicuna-68m'?"),
            (["--target", "vicuna-7b"], "method hf-assisted needs a draft: give --draft, or only ar, hf-lookup"),
            (["--target", "vicuna-7b", "--methods", "ar,auto"], "method auto needs a draft"),
        ],
        ids=lambda each: " ".join(map(str, each)) if isinstance(each, list) else "",
    )  # fmt: skip
    def test_usage(self, data, tmp_path, monkeypatch, args, message):
        monkeypatch.chdir(tmp_path)
        assert message in fails(2, "--data", data, *args)
        assert list(tmp_path.iterdir()) == []

    def test_data_must_be_given(self):
        assert "Missing option '--data'" in fails(2)

    def test_data_that_cannot_be_read(self, tmp_path):
        file = tmp_path / "data.jsonl"
        file.write_text('{"text": "a"}\n{"txt": "b"}\n')
        assert 'data.jsonl line 2 has no "text" key' in fails(2, "--data", file)
        file.write_bytes(b"\x80")
        assert "is not UTF-8 text" in fails(2, "--data", file)

    def test_a_folder_that_is_a_file(self, data):
        assert "cannot be written: Not a directory" in fails(2, "--data", data, "--out", f"{data}/out")
        assert "cannot be written" in fails(2, "--data", data, "--out", data)


@pytest.mark.usefixtures("no_measure")
class TestMistakesFoundBeforeMeasuring:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--lengths", "64,4000"], "no document has the 4016 tokens"),
            (["--lengths", 64, "--max-new-tokens", 4090, "--measure", "speed"], "no document has the 4154 tokens"),
            (["--methods", "ar,full:nodes=300"], "method full:nodes=300: nodes must be between 1 and 256; got 300"),
            (["--methods", "auto:score_layer=2"], "method auto:score_layer=2: score_layer must be below 2"),
            (["--methods", "ar", "--measure", "tau"], "tau needs a method with a draft"),
            (["--depth", 15], "--span-tokens 16 leaves no round"),
        ],
        ids=lambda each: " ".join(map(str, each)) if isinstance(each, list) else "",
    )
    def test_options(self, disk, data, tmp_path, options, message):
        assert message in fails(2, *disk.pair, "--data", data, *SMALL, "--out", tmp_path / "out", *options)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("measure", ["tau", "speed", "memory", "tau,speed,memory"])
    def test_more_tokens_than_the_target_has_positions(self, disk, tmp_path, measure):
        file = tmp_path / "data.jsonl"
        file.write_text(json.dumps({"text": SOURCE * 3}) + "\n")
        lengths = ["--lengths", "64,4090", "--measure", measure, "--span-tokens", 16, "--max-new-tokens", 16]
        error = fails(2, *disk.pair, "--data", file, *lengths, "--out", tmp_path / "out")
        option = "--span-tokens" if measure == "tau" else "--max-new-tokens"
        assert "prompt of 4090 tokens plus max_new_tokens 16 exceeds the target's 4096 positions" in error
        assert f"lower --lengths or {option}, which is 16" in error
        assert not (tmp_path / "out").exists()

    def test_labelled_files_without_a_length(self, disk, data, tmp_path):
        for label in ("64", "1K"):
            (tmp_path / f"source_{label}.jsonl").write_text(data.read_text())
        options = [*disk.pair, "--data", tmp_path, *SMALL, "--measure", "speed", "--out", tmp_path / "out"]
        error = fails(2, *options, "--lengths", "64,2K")
        assert f"{tmp_path} has no file for length 2K; its files have --lengths 64,1K" in error

    def test_no_tokenizer(self, disk, data):
        error = fails(2, "--target", disk.no_tokenizer, "--methods", "ar", "--data", data)
        assert f"target {disk.no_tokenizer} has no tokenizer files; save its tokenizer" in error


class TestFailures:
    @pytest.mark.parametrize(
        ("error", "code", "said"),
        [(KeyboardInterrupt(), 130, "interrupted"), (RuntimeError("the disk is gone"), 1, "Error: the disk is gone")],
        ids=repr,
    )
    def test_what_was_measured_is_printed_and_kept(self, disk, data, tmp_path, monkeypatch, error, code, said):
        real = speed.one

        def one(*args):
            yield from list(real(*args))[:3]
            raise error

        monkeypatch.setattr(speed, "one", one)
        options = ["--methods", "ar,full", "--out", tmp_path / "out"]
        result = invoke(*disk.pair, "--data", data, *SMALL, *options)
        assert result.exit_code == code
        assert said in result.stderr
        assert "Traceback" not in result.stderr
        assert result.stdout.split()[0] == "Speed"
        assert "ar-static" in result.stdout
        assert len(rows_in(tmp_path / "out")) == 3
        summary = (tmp_path / "out" / "summary.md").read_text()
        assert f"INCOMPLETE: ended by {type(error).__name__}" in summary
        assert "| ar-static |" in summary

    @pytest.mark.parametrize(
        ("number", "status", "said", "name"),
        [
            (signal.SIGINT, 130, "interrupted", "KeyboardInterrupt"),
            (signal.SIGTERM, 143, "terminated", "Terminated"),
        ],
        ids=["ctrl-c", "sigterm"],
    )
    def test_a_signal_in_the_middle(self, disk, data, specx_command, tmp_path, number, status, said, name):
        command, env = specx_command
        out = tmp_path / "out"
        options = ["--measure", "tau", "--methods", "full,auto", "--lengths", "64,128", "--spans", "1000"]
        command = [*command, "eval", *disk.pair, "--data", str(data), *options, "--out", str(out)]
        before = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what Ctrl-C reaches, even in the background
        try:
            process = subprocess.Popen(command, env=env, stdout=-1, stderr=-1, text=True)
        finally:
            signal.signal(signal.SIGINT, before)
        lines = iter(process.stderr.readline, "")
        seen = 0
        while seen < 6:
            seen += next(lines).startswith("tau ")
        process.send_signal(number)
        text, errors = process.communicate(timeout=60)
        assert process.returncode == status
        assert "Traceback" not in errors
        assert errors.splitlines()[-1] == said
        found = json.loads((out / "summary.json").read_text())
        assert (found["status"], found["ended_by"]) == ("interrupted", name)
        per_unit = Counter(row["unit"] for row in rows_in(out))
        whole = sum(count == 2 for count in per_unit.values())  # full and auto
        assert whole >= 2
        assert whole - found["units"]["done"] in (0, 1)  # 1: the signal came between a row and the count
        assert len(per_unit) <= whole + 1  # what was in flight
        assert text.split()[:3] == ["tau,", "ordinary", "spans"]
        assert f"INCOMPLETE: ended by {name}" in (out / "summary.md").read_text()


class TestWhole:
    def test_documents_are_measured_as_they_are(self, disk, data, tmp_path):
        options = [*disk.pair, "--data", data, "--lengths", "whole", "--max-new-tokens", 4, "--draft-context", 96]
        options += ["--samples", 2, "--methods", "ar,auto", "--out", tmp_path / "out"]
        result = invoke(*options, "--measure", "tau,speed")
        assert result.exit_code == 0, result.stderr
        assert "note: tau compares lengths of one text, and --lengths whole gives each its own" in result.stderr
        found = json.loads((tmp_path / "out" / "summary.json").read_text())
        assert found["configuration"]["--lengths"] == "whole"
        rows = rows_in(tmp_path / "out")
        assert {row["measure"] for row in rows} == {"speed"}
        assert len({row["context"] for row in rows}) == 1
        assert len({row["tokens"] for row in rows}) == len({row["prompt"] for row in rows}) > 0
        resumed = invoke(*options, "--measure", "tau,speed", "--resume")
        assert "going on after" in resumed.stderr
        result = invoke(*options[:-1], tmp_path / "none", "--measure", "tau")
        assert result.exit_code == 2
        assert not (tmp_path / "none").exists()


class TestHelp:
    def test_imports_no_torch(self):
        code = (
            "import sys; from specx.cli import main\n"
            "try: main(['eval', '--help'], prog_name='specx')\n"
            "except SystemExit as end: assert not end.code\n"
            "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def test_offers_what_applies_to_all_methods(self):
        options = {name for each in cli.main.commands["eval"].params for name in each.opts}
        assert not options & {"--policy", "--stop", "--input", "--prompt"}
        assert {
            "--data",
            "--lengths",
            "--nodes",
            "--draft-context",
            "--temperature",
            "--target",
            "--backend",
        } <= options
        result = invoke("--help")
        assert result.exit_code == 0
        assert result.stdout.count("--max-new-tokens") == 1
        assert max(map(len, result.stdout.splitlines())) <= 110
        for option in options:
            assert option in result.stdout

    def test_hugging_face_gets_its_best_setting(self, specx_command, tmp_path):
        """transformers reads it when it is imported, so that specx eval must set it before."""
        command, env = specx_command
        code = (
            "import os, sys\n"
            "class Watch:\n"
            "    def find_spec(self, name, *args):\n"
            "        if name == 'transformers':\n"
            "            print(os.environ.get('TRANSFORMERS_SDPA_FORCE_GQA'), flush=True)\n"
            "            os._exit(0)\n"
            "sys.meta_path.insert(0, Watch())\n"
            "from specx.cli import main\n"
            f"main(['eval', '--data', {__file__!r}, '--methods', 'ar', '--out', {str(tmp_path / 'out')!r}])"
        )
        env = {name: value for name, value in env.items() if name != "TRANSFORMERS_SDPA_FORCE_GQA"}
        done = subprocess.run([command[0], "-c", code], env=env, capture_output=True, text=True)
        assert done.stdout == "1\n", done.stderr
