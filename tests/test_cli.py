"""The command line as a hostile, impatient user meets it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import specx
from specx import api, cli, output
from specx.api import Segment
from specx.config import CacheConfig, LoadConfig, SamplingConfig, StopConfig, TreeConfig

pytest_plugins = ["disk"]
PROMPT = "def stream(steps, coloured):"


def invoke(*args, **kwargs):
    result = CliRunner().invoke(cli.main, [str(arg) for arg in args], **kwargs)
    assert result.exception is None or isinstance(result.exception, SystemExit)  # anything else is a traceback
    return result


def fails(code, *args, **kwargs):
    """Run a command that must fail with this exit code, printing one error and no text; return the error."""
    result = invoke(*args, **kwargs)
    assert (result.exit_code, result.stdout) == (code, "")
    assert "Traceback" not in result.stderr
    return result.stderr.split("Error: ", 1)[1]


@pytest.fixture
def no_load(monkeypatch):
    """A mistake that must be found before anything is loaded."""
    monkeypatch.setattr(api, "load", lambda *args, **kwargs: pytest.fail("a model was loaded"))


class TestOutput:
    def test_stdout_is_the_text_and_a_newline(self, disk, tmp_path):
        stats = tmp_path / "stats.json"
        result = invoke(
            "run", *disk.pair, "--no-chat", "--prompt", PROMPT, "--max-new-tokens", 40, "--stats-json", stats,
            "--controller", "off",  # which goes by milliseconds
        )  # fmt: skip
        out = specx.load(disk.target, disk.draft).generate(PROMPT, max_new_tokens=40, controller="off")
        assert result.exit_code == 0
        assert result.stdout_bytes.decode() == out.text + "\n"
        written = json.loads(stats.read_text())
        assert written.keys() == out.stats.keys()
        for name in ("tau", "steps", "accepted_histogram", "new_tokens", "draft_kv_tokens", "policy", "finish_reason"):
            assert written[name] == out.stats[name]

    def test_stderr_is_short_and_without_noise(self, disk):
        result = invoke("run", *disk.pair, "--prompt", PROMPT, "--max-new-tokens", 4)
        lines = result.stderr.splitlines()
        assert [line.split()[0] for line in lines] == ["loading", "target", "4"]

    def test_every_step_is_flushed(self, monkeypatch):
        class Screen(list):
            write, flush = list.append, lambda self: self.append("|")
            isatty = staticmethod(lambda: False)

        screen = Screen()
        monkeypatch.setattr(sys, "stdout", screen)
        monkeypatch.setattr(click, "echo", lambda: screen.write("\n"))
        steps = ([Segment(text, "target")] for text in ("a", "\x1b[31mred", "b"))  # escapes are text: not stripped
        assert output.stream(steps, True) is False
        assert screen == ["a", "|", "\x1b[31mred", "|", "b", "|", "\n"]

    def test_colours_on_a_terminal_only(self, monkeypatch, capsys):
        def steps():
            yield [Segment("drafted", "draft"), Segment("chosen", "target")]

        output.stream(steps(), True)
        assert capsys.readouterr().out == "draftedchosen\n"
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        output.stream(steps(), True)
        assert capsys.readouterr().out == click.style("drafted", "green") + click.style("chosen", "blue") + "\n"

    def test_verbose_says_what_the_draft_kept(self, disk):
        options = ["--policy", "retrieval", "--draft-context", 64, "--chunk-size", 4, "--retrieve-every", 1]
        result = invoke("run", *disk.pair, "--prompt", PROMPT * 20, "--max-new-tokens", 12, "--verbose", *options)
        kept = re.search(r"^step 0: draft cache rebuilt, chunks kept: \d+ '.+'", result.stderr, re.MULTILINE)
        assert kept, result.stderr

    def test_compare(self, disk, tmp_path):
        stats = tmp_path / "stats.json"
        options = ["--max-new-tokens", 12, "--compare", "--stats-json", stats]
        result = invoke("run", *disk.pair, "--prompt", PROMPT, *options)
        assert "plain decoding of the same target" in result.stderr
        assert "output identical" in result.stderr
        compared = json.loads(stats.read_text())["compare"]
        assert compared.keys() == {"plain_decode_tokens_per_second", "ratio", "identical"}
        sampled = invoke("run", *disk.pair, "--prompt", PROMPT, *options, "--temperature", 1)
        assert "output" not in sampled.stderr  # other draws, nothing to compare
        assert "too short" in invoke("run", *disk.pair, "--prompt", PROMPT, *options[2:], "--max-new-tokens", 1).stderr

    def test_models(self):
        result = invoke("models")
        assert "vicuna-68m" in result.stdout
        assert "lmsys/vicuna-7b-v1.5-16k" in result.stdout

    def test_version(self):
        assert specx.__version__ in invoke("--version").stdout

    def test_a_character_that_the_terminal_lacks(self, disk):
        options = ["run", *disk.pair, "--no-chat", "--prompt", PROMPT, "--max-new-tokens", "40"]
        result = CliRunner(charset="ascii").invoke(cli.main, options)
        assert result.exit_code == 0
        assert b"?" in result.stdout_bytes


class TestInput:
    def lengths(self, disk, tmp_path, *args, **kwargs):
        stats = tmp_path / "stats.json"
        options = ["--max-new-tokens", 3, "--stats-json", stats, *args]
        result = invoke("run", *disk.pair, *options, **kwargs)
        assert result.exit_code == 0, result.stderr
        written = json.loads(stats.read_text())
        return [each["prompt_tokens"] for each in written] if isinstance(written, list) else written["prompt_tokens"]

    def test_file_standard_input_and_prompt_are_the_same(self, disk, tmp_path):
        file = tmp_path / "input.txt"
        file.write_text(PROMPT)
        expected = self.lengths(disk, tmp_path, "--prompt", PROMPT, "--no-chat")
        assert self.lengths(disk, tmp_path, "--input", file) == expected
        assert self.lengths(disk, tmp_path, "--input", "-", input=PROMPT) == expected

    def test_chat_is_on_for_prompts_and_off_for_files(self, disk, tmp_path):
        plain = self.lengths(disk, tmp_path, "--prompt", PROMPT, "--no-chat")
        chat = self.lengths(disk, tmp_path, "--prompt", PROMPT)
        assert chat > plain
        assert self.lengths(disk, tmp_path, "--input", "-", "--chat", input=PROMPT) == chat
        result = invoke("run", "--target", disk.no_template, "--prompt", PROMPT, "--max-new-tokens", 2)
        assert f"after {plain} " in result.stderr

    def test_json_lines(self, disk, tmp_path):
        lines = [json.dumps({"text": PROMPT * n}) for n in (1, 2, 3)]
        lengths = self.lengths(disk, tmp_path, "--input", "-", input="\n".join(lines))
        assert len(lengths) == 3
        assert lengths == sorted(lengths)
        lines[2] = "broken, but nobody asked for it"
        assert self.lengths(disk, tmp_path, "--input", "-", "--max-samples", 2, input="\n".join(lines)) == lengths[:2]
        result = invoke("run", *disk.pair, "--input", "-", "--max-new-tokens", 2, input="\n".join(lines[:2]))
        assert "[1/2]" in result.stderr
        assert "[2/2]" in result.stderr

    def test_plain_decoding_without_a_draft(self, disk, tmp_path):
        result = invoke("run", "--target", disk.target, "--prompt", PROMPT, "--max-new-tokens", 5)
        assert result.exit_code == 0
        assert "no draft" in result.stderr

    def test_the_demonstration(self, disk, monkeypatch):
        real = api.load
        monkeypatch.setattr(api, "load", lambda target, draft, **options: real(disk.target, disk.draft, **options))
        monkeypatch.setattr("specx.data.prompts.DEMO_TOKENS", 100)
        result = invoke("run", "--max-new-tokens", 3)
        assert "loading the bundled pair" in result.stderr
        assert "completing asyncio/base_events.py" in result.stderr


@pytest.mark.usefixtures("no_load")
class TestMistakesFoundBeforeLoading:
    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--prompt", ""], "the prompt is empty"),
            (["--prompt", " \n"], "the prompt is empty"),
            (["--prompt", "a \udcff"], "not valid Unicode"),
            (["--prompt", "a", "--input", "b"], "not both"),
            (["--chat"], "nothing to complete"),
            (["--target", "demo", "--draft", "vicuna-68m"], "nothing to complete"),
            (["--input", ""], "name of the input file is empty"),
            (["--input", "nowhere.txt"], "cannot read nowhere.txt: No such file"),
            (["--input", "."], "cannot read .: Is a directory"),
            (["--draft", "vicuna68m", "--prompt", "a"], "did you mean 'vicuna-68m'?"),
            (["--draft", "Vicuna-68M", "--prompt", "a"], "did you mean 'vicuna-68m'?"),
            (["--target", "vicuna-8b", "--prompt", "a"], "did you mean 'vicuna-7b'?"),
            (["--draft", "vicuna-7b", "--prompt", "a"], "'vicuna-7b' is no draft"),
            (["--target", "", "--prompt", "a"], "unknown target ''"),
            (["--target", "./nowhere", "--prompt", "a"], "target directory './nowhere' does not exist"),
            (["--target", "a/b/c", "--prompt", "a"], "target directory 'a/b/c' does not exist"),
            (["--prompt", "a", "--stats-json", "."], "--stats-json . cannot be written: Is a directory"),
            (["--prompt", "a", "--stats-json", "no/where"], "--stats-json no/where cannot be written: No such file"),
            (["--prompt", "a", "--stats-json", "/proc/x"], "--stats-json /proc/x cannot be written"),
        ],
        ids=lambda each: " ".join(each).encode("ascii", "replace").decode() if isinstance(each, list) else "",
    )
    def test_usage(self, args, message):
        assert message in fails(2, "run", *args)

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("--max-new-tokens", "0"),
            ("--max-new-tokens", "1.5"),
            ("--max-samples", "0"),
            ("--temperature", "-0.1"),
            ("--top-k", "0"),
            ("--top-p", "1.01"),
            ("--repetition-penalty", "0"),
            ("--seed", "-1"),
            ("--policy", "fulll"),
            ("--draft-context", "1"),
            ("--chunk-size", "0"),
            ("--top-chunks", "-1"),
            ("--retrieve-every", "0"),
            ("--sinks", "-1"),
            ("--recent", "0"),
            ("--refill", "x"),
            ("--score-layer", "-1"),
            ("--nodes", "0"),
            ("--nodes", "100000"),
            ("--depth", "-1"),
            ("--beam", "0"),
            ("--tree-threshold", "-1"),
            ("--backend", "x"),
            ("--dtype", "float8"),
            ("--device-map", "x"),
            ("--quantization", "2bit"),
            ("--nonsense", "1"),
        ],
    )
    def test_options_out_of_range(self, option, value):
        assert option in fails(2, "run", "--prompt", "a", option, value)

    def test_binary_file(self, tmp_path):
        file = tmp_path / "model.bin"
        file.write_bytes(b"\x80\x81")
        assert f"{file} is not UTF-8 text" in fails(2, "run", "--input", file)

    def test_bad_json_line_has_its_number(self, tmp_path):
        file = tmp_path / "prompts.jsonl"
        file.write_text('{"text": "a"}\n\n{"text": }\n')
        assert "prompts.jsonl line 3 is not JSON" in fails(2, "run", "--input", file)
        assert 'standard input line 2 has no "text" key' in fails(
            2, "run", "--input", "-", input='{"text": "a"}\n{"b": 1}'
        )

    def test_checkpoint_that_is_a_file(self, disk):
        assert "is a file" in fails(2, "run", "--target", f"{disk.target}/config.json", "--prompt", "a")
        assert "did you mean 'target'?" in fails(2, "run", "--target", f"{disk.target}x", "--prompt", "a")

    def test_an_unwritable_file_leaves_no_trace_and_a_written_one_keeps_its_content(self, tmp_path):
        old, new = tmp_path / "old.json", tmp_path / "new.json"
        old.write_text("old")
        output.check_writable(str(old))
        output.check_writable(str(new))
        assert [path.name for path in tmp_path.iterdir()] == ["old.json"]
        assert old.read_text() == "old"


class TestMistakesFoundBeforeGenerating:
    def test_too_long(self, disk):
        error = fails(2, "run", *disk.pair, "--prompt", PROMPT, "--no-chat", "--max-new-tokens", 5000)
        assert "exceeds the target's 4096 positions" in error
        assert "new tokens fit" in error

    def test_one_sample_of_several_is_too_long(self, disk, tmp_path):
        stats = tmp_path / "stats.json"
        lines = "\n".join(json.dumps({"text": PROMPT * n}) for n in (1, 1000, 1))
        error = fails(2, "run", *disk.pair, "--input", "-", "--stats-json", stats, input=lines)
        assert error.startswith("sample 2 of 3: prompt of ")
        assert not stats.exists()

    @pytest.mark.parametrize("device", ["cuda", "cuda:99"])
    def test_no_cuda(self, disk, monkeypatch, device):
        monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
        assert "0 CUDA devices here; use cpu" in fails(2, "run", *disk.pair, "--prompt", "a", "--device", device)

    @pytest.mark.parametrize("device", ["nonsense", "", "mps", "cpu:x"])
    def test_no_device(self, disk, device):
        assert f"device {device!r} is not" in fails(2, "run", *disk.pair, "--prompt", "a", "--device", device)

    @pytest.mark.parametrize(
        ("option", "value", "module"),
        [("--device-map", "auto", "accelerate"), ("--quantization", "4bit", "bitsandbytes")],
    )
    def test_extras_that_are_not_installed(self, disk, monkeypatch, option, value, module):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        error = fails(2, "run", *disk.pair, "--prompt", "a", option, value)
        assert error == f"{option} {value} needs {module}: pip install {module}\n"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--temperature", "nan"], "temperature must be at least 0.0"),
            (["--stop", ""], "stop must be non-empty"),
            (["--score-layer", 99], "score_layer must be below 2"),
        ],
        ids=lambda each: each[0] if isinstance(each, list) else "",
    )
    def test_options(self, disk, options, message):
        assert message in fails(2, "run", *disk.pair, "--prompt", "a", *options).replace("\n", "")

    def test_a_run_that_gave_nothing_writes_no_figures(self, disk, tmp_path):
        stats = tmp_path / "stats.json"
        fails(2, "run", *disk.pair, "--prompt", "a", "--score-layer", 99, "--stats-json", stats)
        assert not stats.exists()

    def test_tokenizers_that_differ(self, disk):
        error = fails(2, "run", "--target", disk.target, "--draft", disk.other_tokenizer, "--prompt", "a")
        assert "does not share the target's tokenizer: id 0 is '<s>' for the target, '</s>' for the draft" in error

    def test_no_tokenizer(self, disk):
        error = fails(2, "run", "--target", disk.no_tokenizer, "--prompt", "a")
        assert "has no tokenizer files" in error

    def test_no_chat_template(self, disk):
        error = fails(2, "run", "--target", disk.no_template, "--prompt", "a", "--chat")
        assert "use --no-chat" in error

    def test_a_broken_checkpoint_is_a_runtime_error(self, disk):
        broken = disk.copy("no_config", lambda folder: (folder / "config.json").unlink())
        assert "has no config.json" in fails(1, "run", "--target", disk.target, "--draft", broken, "--prompt", "a")

    def test_a_draft_without_known_target(self, disk):
        assert "needs a target" in fails(2, "run", "--draft", disk.draft, "--prompt", "a")


class TestErrors:
    @pytest.mark.parametrize(
        ("error", "code", "message"),
        [
            (ValueError("yours"), 2, "yours"),
            (RuntimeError("mine"), 1, "mine"),
            (RuntimeError(), 1, "unexpected RuntimeError"),
            (OSError(28, "No space left on device"), 1, "No space left"),
            (MemoryError(), 1, "out of memory"),
            (KeyError("x"), 1, "unexpected KeyError: 'x'; --debug shows where"),
        ],
        ids=repr,
    )
    def test_no_traceback_without_debug(self, monkeypatch, error, code, message):
        def load(*args, **kwargs):
            raise error

        monkeypatch.setattr(api, "load", load)
        assert message in fails(code, "run", "--prompt", "a")
        result = invoke("run", "--prompt", "a", "--debug")
        assert result.exit_code == code
        assert "Traceback" in result.stderr
        assert message in result.stderr

    def test_what_was_done_is_kept_when_a_later_sample_fails(self, disk, tmp_path, monkeypatch):
        stats, real, calls = tmp_path / "stats.json", api.decode, []

        def decode(*args, **options):
            calls.append(args)
            for number, piece in enumerate(real(*args, **options)):
                if len(calls) == 2 and number == 2:
                    raise RuntimeError("out of memory on the second sample")
                yield piece

        monkeypatch.setattr(api, "decode", decode)
        lines = "\n".join(json.dumps({"text": PROMPT}) for _ in range(3))
        result = invoke("run", *disk.pair, "--input", "-", "--max-new-tokens", 20, "--stats-json", stats, input=lines)
        assert result.exit_code == 1
        assert "second sample" in result.stderr
        assert [each["finish_reason"] for each in json.loads(stats.read_text())] == ["length", "interrupted"]


class TestInterrupts:
    def test_ctrl_c_between_steps(self, capsys):
        closed = []

        def steps():
            try:
                for text in "abc":
                    if text == "b":
                        signal.raise_signal(signal.SIGINT)
                    yield [Segment(text, "target")]
            finally:
                closed.append(True)

        before = signal.getsignal(signal.SIGINT)
        assert output.stream(steps(), False) is True
        assert capsys.readouterr().out == "ab\n"  # the running step ends, and its text is printed
        assert closed == [True]
        assert signal.getsignal(signal.SIGINT) is before

    @pytest.mark.parametrize(("first", "presses"), [("", 1), ("a", 2)], ids=["in the prefill", "twice"])
    def test_ctrl_c_that_acts_at_once(self, capsys, first, presses):
        def steps():
            if first:
                yield [Segment(first, "target")]
            for _ in range(presses):
                signal.raise_signal(signal.SIGINT)
            pytest.fail("went on")

        assert output.stream(steps(), False) is True
        assert capsys.readouterr().out == first + "\n"

    def test_ctrl_c_elsewhere(self, disk, monkeypatch, tmp_path):
        """While comparing: what was generated is counted."""
        stats = tmp_path / "stats.json"

        def generate(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr(api.SpeculativeModel, "generate", generate)
        options = ["--prompt", PROMPT, "--max-new-tokens", 5, "--compare", "--stats-json", stats]
        result = invoke("run", *disk.pair, *options)
        assert result.exit_code == 130
        assert json.loads(stats.read_text())["new_tokens"] == 5

    def test_ctrl_c_mid_stream(self, disk, specx_command, tmp_path):
        stats = tmp_path / "stats.json"
        command, env = specx_command
        options = ["run", *disk.pair, "--no-chat", "--prompt", PROMPT, "--max-new-tokens", "3900", "--nodes", "2"]
        process = start([*command, *options, "--stats-json", str(stats)], env)
        first = process.stdout.read(1)  # arrives long before the end
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
        assert process.returncode == 130
        assert b"Traceback" not in errors
        assert b"(interrupted)" in errors
        written = json.loads(stats.read_text())
        assert written["finish_reason"] == "interrupted"
        out = specx.load(disk.target, disk.draft).generate(PROMPT, max_new_tokens=written["new_tokens"], nodes=2)
        shown = (first + rest).decode().removesuffix("\n")
        assert 0 < written["new_tokens"] < 3900
        assert out.text.startswith(shown)
        assert len(out.text) - len(shown) < 20  # at most a character that was not complete yet

    def test_ctrl_c_while_loading(self, disk, specx_command):
        command, env = specx_command
        process = start([*command, "run", *disk.pair, "--prompt", PROMPT, "--max-new-tokens", "3900"], env)
        while b"loading" not in process.stderr.readline():
            pass
        process.send_signal(signal.SIGINT)
        text, errors = process.communicate(timeout=60)
        assert (process.returncode, text, errors) == (130, b"", b"interrupted\n")

    def test_a_pipe_whose_reader_went_away(self, disk, specx_command, tmp_path):
        stats = tmp_path / "stats.json"
        command, env = specx_command
        options = ["run", *disk.pair, "--prompt", PROMPT, "--max-new-tokens", "3900", "--stats-json", str(stats)]
        process = start([*command, *options], env)
        process.stdout.read(1)
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(timeout=60) == 1
        process.stderr.close()
        assert errors.count(b"\n") == 2  # what was said before the text
        assert json.loads(stats.read_text())["finish_reason"] == "interrupted"


def start(command, env):
    """Start a process that Ctrl-C reaches, even where this one runs in the background."""
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    finally:
        signal.signal(signal.SIGINT, before)


class TestStatsFile:
    def test_whole_or_not_at_all(self, tmp_path, monkeypatch):
        file = tmp_path / "stats.json"
        file.write_text("old")
        with pytest.raises(TypeError):
            output.write_json(str(file), {"a": object()})
        assert file.read_text() == "old"
        output.write_json(str(file), {"a": 1})
        assert json.loads(file.read_text()) == {"a": 1}
        assert list(tmp_path.iterdir()) == [file]

    def test_links_and_devices_are_not_replaced(self, tmp_path):
        file, link = tmp_path / "stats.json", tmp_path / "link.json"
        file.write_text("old")
        link.symlink_to(file)
        output.write_json(str(link), [1])
        assert link.is_symlink()
        assert json.loads(file.read_text()) == [1]
        output.write_json("/dev/null", [1])
        assert Path("/dev/null").is_char_device()


MODEL = {*(each.name for each in fields(LoadConfig)), "target", "draft", "use_specextend", "debug", "help"}
RUN = {each.name for config in (StopConfig, SamplingConfig, CacheConfig, TreeConfig) for each in fields(config)}
ISSUE = """target draft use-specextend no-specextend input prompt chat no-chat max-samples max-new-tokens temperature
    top-k top-p repetition-penalty seed stop policy draft-context chunk-size top-chunks retrieve-every sinks recent
     refill store score-heads score-layer nodes depth beam tree-threshold tree-shape backend dtype device device-map
     quantization
     draft-vocab draft-vocab-size window-alignment lookup no-lookup controller copy-nodes explain
     pack-weights no-pack-weights graphs no-graphs profile no-profile
    trust-remote-code flash-prefill no-flash-prefill hybrid-attention no-hybrid-attention compare stats-json verbose
    debug help"""


class TestHelp:
    def names(self, command):
        return {name for each in command.params for name in (*each.opts, *each.secondary_opts)}

    def test_the_options_of_run(self):
        assert self.names(cli.run) == {f"--{name}" for name in ISSUE.split()} - {"--help"}
        assert {name.replace("-", "_") for name in ISSUE.split()} >= MODEL | RUN

    def test_the_options_of_doctor(self):
        assert self.names(cli.doctor) - {
            f"--no-{each}" for each in ("flash-prefill", "hybrid-attention", "pack-weights", "graphs", "profile")
        } == {f"--{name.replace('_', '-')}" for name in MODEL - {"help"}} | {"--no-specextend"}

    @pytest.mark.parametrize(
        "command", [(), ("run",), ("models",), ("doctor",)], ids=lambda each: "specx " + " ".join(each)
    )
    def test_every_command_has_help(self, command):
        result = invoke(*command, "--help")
        assert result.exit_code == 0
        assert result.stderr == ""
        assert invoke(*command, "-h").stdout == result.stdout
        assert max(map(len, result.stdout.splitlines())) <= 110
        for option in self.names(cli.main.commands[command[0]]) if command else ["run", "doctor", "models"]:
            assert option in result.stdout

    def test_help_is_quick(self, specx_command):
        command, env = specx_command
        seconds = []
        for _ in range(5):  # of the processor, not of the clock: this machine may be busy
            before = os.times()
            subprocess.run([*command, "run", "--help"], env=env, capture_output=True, check=True)
            after = os.times()
            seconds.append(sum(after[2:4]) - sum(before[2:4]))
        assert min(seconds) < 0.3
