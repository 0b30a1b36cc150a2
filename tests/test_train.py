"""`specx train`: every kind ends as a draft that loads; killed or shared by processes, it takes the same steps."""

import json
import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from specx import cli
from specx.adapters.weights import kind_of
from specx.api import load
from specx.config import LoadConfig
from specx.training import run as training
from specx.training.data import Tokens, read_texts
from specx.training.loop import read_log, warmup_cosine
from specx.training.options import ClassicConfig, Eagle3Config, LongSpecConfig, TrainConfig
from specx.training.run import Job, train

pytest_plugins = ["disk"]  # imported by pytest first


def byte_level_bpe():
    import disk

    return disk.byte_level_bpe()


CONFIG = TrainConfig(steps=6, length=64, batch=4, learning_rate=1e-2, measure_every=0, save_seconds=1e6)
MEASURED = replace(CONFIG, measure_every=4, measure_prompts=2, measure_context=30, measure_tokens=12)
SMALL = ClassicConfig(hidden=32, heads=2, layers=1)
OWN = {"longspec": LongSpecConfig(), "eagle3": Eagle3Config(draft_vocabulary=150), "classic": SMALL}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder of this project's own source."""
    folder = tmp_path_factory.mktemp("text")
    for file in sorted(Path(__file__).parent.glob("test_[a-c]*.py")):
        (folder / file.name).write_text(file.read_text(encoding="utf-8"))
    (folder / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    return str(folder)


@pytest.fixture(scope="module")
def deep(disk):
    """A target of six layers, as EAGLE-3 needs."""
    import disk as made

    return disk.save("deep", made.llama(num_hidden_layers=6), byte_level_bpe())


def job(kind, target, text, out, config=CONFIG, own=None, init=None):
    return Job(kind, target, text, out, config, own or OWN[kind], init, LoadConfig(dtype="float32", device="cpu"))


def losses(out):
    return [row["loss"] for row in read_log(Path(out) / "log.jsonl") if "loss" in row]


@pytest.mark.parametrize("kind", OWN)
def test_a_draft_comes_out(kind, deep, text, tmp_path):
    train(job(kind, deep, text, tmp_path / "out", replace(MEASURED, steps=16)))
    found = losses(tmp_path / "out")
    assert len(found) == 16
    measured = [row for row in read_log(tmp_path / "out" / "log.jsonl") if "tau" in row]
    assert [row["step"] for row in measured] == [4, 8, 12, 16]
    assert all(row["tau"] >= 1 and row["prompts"] == 2 for row in measured)
    folder = str(tmp_path / "out" / "draft")
    assert kind_of(folder) == {"eagle3": "eagle"}.get(kind, kind)
    model = load(deep, folder, dtype="float32")
    out = model.generate("def f(", max_new_tokens=8)
    assert out.tokens == model.generate("def f(", max_new_tokens=8, plain=True).tokens
    again = tmp_path / "again"  # the first windows once more, for the draft as it was left
    train(job(kind, deep, text, again, replace(CONFIG, steps=1), init=folder))
    assert losses(again)[0] < found[0]


def test_the_published_layouts(deep, text, tmp_path):
    for kind in ("longspec", "eagle3"):
        train(job(kind, deep, text, tmp_path / kind, replace(CONFIG, steps=1)))
    block, head = (load_file(tmp_path / kind / "draft" / "model.safetensors") for kind in ("longspec", "eagle3"))
    assert len(block) == 20
    assert block["cross_attn.k_proj.weight"].shape == block["self_attn.k_proj.weight"].shape
    assert head["d2t"].shape == (150,)
    assert int(head["t2d"].sum()) == 150
    assert (head["t2d"].nonzero().flatten() == head["d2t"] + torch.arange(150)).all()
    config = json.loads((tmp_path / "eagle3" / "draft" / "config.json").read_text())
    assert (config["architectures"], config["draft_vocab_size"]) == (["LlamaForCausalLMEagle3"], 150)


def command(kind, target, text, out, config):
    given = {name: getattr(config, name) for name in ("steps", "length", "batch", "learning_rate", "measure_every")}
    given |= {"save_seconds": config.save_seconds, "device": "cpu", "dtype": "float32"}
    options = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return ["train", kind, "--target", target, "--data", text, "--out", str(out), *options]


# kill -9 at a bad moment: the fifth state is written, but not yet where states are looked for
KILLED = """
import os, signal, sys
from specx import cli
replace, states = os.replace, []
def killed(source, target):
    states.append(target)
    if len(states) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = killed
cli.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def whole(disk, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(job("longspec", disk.target, text, out, replace(CONFIG, steps=12)))
    return losses(out)


class TestTheSameSteps:
    def test_killed_and_resumed(self, whole, disk, text, tmp_path, specx_command):
        out, config = tmp_path / "out", replace(CONFIG, steps=12, save_seconds=0.0)
        (python, *_), env = specx_command
        options = command("longspec", disk.target, text, out, config)
        process = subprocess.run([python, "-c", KILLED, *options], env=env, capture_output=True)
        assert process.returncode == -signal.SIGKILL, process.stderr
        assert losses(out) == whole[:5]
        assert [each.name[-2:] for each in sorted((out / "states").iterdir())] == [
            "03",
            "04",
            "al",
        ]  # and a partial one
        train(job("longspec", disk.target, text, out, config))
        assert losses(out) == whole
        assert len(list((out / "states").glob("*.partial"))) == 0

    def test_two_processes(self, whole, disk, text, tmp_path, specx_command):
        """gloo, each with half of a step's windows."""
        (python, *module), env = specx_command
        launch = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *module]
        options = command("longspec", disk.target, text, tmp_path / "out", replace(CONFIG, steps=12))
        done = subprocess.run([*launch, *options], env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert losses(tmp_path / "out") == pytest.approx(whole, rel=1e-4)

    def test_window_by_window(self, whole, disk, text, tmp_path):
        train(job("longspec", disk.target, text, tmp_path / "out", replace(CONFIG, steps=12, rows=1)))
        found = losses(tmp_path / "out")
        assert found == pytest.approx(whole, rel=1e-4)
        assert found != whole

    def test_ctrl_c_ends_behind_a_step(self, whole, disk, text, tmp_path, monkeypatch):
        step = training.Loop._step

        def interrupted(loop, course, batch, asked):
            if loop.progress.step == 5 and not asked:
                os.kill(os.getpid(), signal.SIGINT)
                asked = True
            return step(loop, course, batch, asked)

        config = replace(CONFIG, steps=12)
        monkeypatch.setattr(training.Loop, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(job("longspec", disk.target, text, tmp_path / "out", config))
        monkeypatch.undo()
        assert losses(tmp_path / "out") == whole[:6]
        train(job("longspec", disk.target, text, tmp_path / "out", config))
        assert losses(tmp_path / "out") == whole


def test_switches_change_what_is_learnt(disk, text, tmp_path):
    found = set()
    for options in ({}, {"anchor_offset": False}, {"noisy": False}, {"distill": True}):
        out = tmp_path / str(options)
        train(job("longspec", disk.target, text, out, replace(CONFIG, steps=2), LongSpecConfig(**options)))
        found.add(tuple(losses(out)))
    assert len(found) == 4


class TestData:
    def test_a_folder(self, text):
        names = sorted(os.listdir(text))
        found = list(read_texts(text, None))
        assert len(found) == len(names) - 1  # the picture is no text
        assert found[0] == Path(text, names[0] if names[0] != "picture.png" else names[1]).read_text()

    def test_json_lines(self, tmp_path):
        rows = [{"text": "a\u2028b"}, {"messages": [{"role": "user", "content": "hello"}]}]
        (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
        found = list(read_texts(str(tmp_path / "rows.jsonl"), byte_level_bpe()))
        assert found == ["a\u2028b", "<s>user: hello\n"]

    @pytest.mark.parametrize(
        ("content", "message"),
        [('{"txt": 1}', 'line 1 has no "text"'), ('{"text": "a"}\n{', "line 2 is no JSON")],
    )
    def test_broken_lines(self, content, message, tmp_path):
        (tmp_path / "rows.jsonl").write_text(content)
        with pytest.raises(ValueError, match=message):
            list(read_texts(str(tmp_path / "rows.jsonl"), None))

    @pytest.mark.parametrize("source", ["nothing", "./nothing", "/no/such/folder"])
    def test_nothing_of_that_name(self, source):
        with pytest.raises(ValueError, match="no such file or folder; give one, stdlib, or a dataset"):
            list(read_texts(source, None))

    def test_held_out_text_is_not_trained_on(self, tmp_path):
        tokenizer = byte_level_bpe()
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"{i:04} "}) + "\n" for i in range(200)))
        tokens = Tokens(tmp_path / "text", str(tmp_path / "rows.jsonl"), tokenizer)
        held = tokenizer.decode(tokens.held_out.tolist(), skip_special_tokens=True).split()
        seen = tokenizer.decode(tokens.train.tolist(), skip_special_tokens=True).split()
        assert held == ["0025", "0075", "0125", "0175"]
        assert sorted(held + seen) == [f"{i:04}" for i in range(200)]

    def test_of_few_documents_the_end_is_held_out(self, text, tmp_path):
        tokens = Tokens(tmp_path / "text", text, byte_level_bpe())
        assert len(tokens.held_out) == pytest.approx(len(tokens.train) / 49, rel=0.01)
        assert [len(each) for each in tokens.prompts(3, 20)] == [20] * 3
        first = tokens.windows(1, 5, 3, 30)
        assert first.shape == (3, 30)
        assert (first == tokens.windows(1, 5, 3, 30)).all()
        assert (first != tokens.windows(1, 6, 3, 30)).any()
        with pytest.raises(ValueError, match="a window needs"):
            tokens.windows(1, 5, 3, 10**9)

    def test_frequent_tokens(self, text, tmp_path):
        tokens = Tokens(tmp_path / "text", text, byte_level_bpe())
        counts = torch.bincount(torch.from_numpy(tokens.train.astype("int64")), minlength=400)
        kept = torch.from_numpy(tokens.frequent(50, 400))
        dropped = torch.ones(400, dtype=torch.bool).index_fill_(0, kept, False)
        assert kept.tolist() == sorted(set(kept.tolist()))
        assert counts[kept].min() >= counts[dropped].max()


def test_learning_rate():
    rate = warmup_cosine(1.0, 1000, 0.1)
    assert rate(0) == pytest.approx(0.01)
    assert rate(100) == pytest.approx(1.0)
    assert rate(550) == pytest.approx(0.5)
    assert rate(1000) == pytest.approx(0.0)


class TestMistakes:
    def invoke(self, *args):
        return CliRunner().invoke(cli.main, ["train", *args])

    def options(self, target, text, out):
        return ["longspec", "--target", target, "--data", text, "--out", str(out), "--steps", "1", "--length", "64"]

    def test_other_options_do_not_go_on(self, disk, text, tmp_path):
        train(job("longspec", disk.target, text, tmp_path / "out", replace(CONFIG, steps=1)))
        for config, own, message in (
            (replace(CONFIG, steps=1, batch=2), None, "begun with batch 4, not 2"),
            (replace(CONFIG, steps=1), LongSpecConfig(lag=3), "begun with lag 4, not 3"),
        ):
            with pytest.raises(ValueError, match=message):
                train(job("longspec", disk.target, text, tmp_path / "out", config, own))

    def test_a_folder_of_something_else_is_left_alone(self, disk, text, tmp_path):
        (tmp_path / "mine").write_text("x")
        result = self.invoke(*self.options(disk.target, text, tmp_path))
        assert result.exit_code == 2
        assert "is not empty and holds no training" in result.stderr
        assert os.listdir(tmp_path) == ["mine"]

    @pytest.mark.parametrize("wrong", ["data", "init", "empty", "layers"])
    def test_nothing_is_left_of_a_run_that_never_began(self, wrong, disk, text, tmp_path):
        (tmp_path / "nothing").mkdir()
        options = self.options(disk.target, text, tmp_path / "out")
        if wrong == "data":
            options[4] = str(tmp_path / "no such folder")
        elif wrong == "empty":
            options[4] = str(tmp_path / "nothing")
        elif wrong == "layers":
            options[0] = "eagle3"
        else:
            options += ["--init", disk.draft]
        result = self.invoke(*options)
        assert result.exit_code in (1, 2)
        assert "Traceback" not in result.output
        expected = {"data": "no such file", "empty": "holds no text", "layers": "this target has 2", "init": "lacks"}
        assert expected[wrong] in result.stderr
        assert os.listdir(tmp_path) == ["nothing"]

    def test_windows_that_processes_cannot_share(self, disk, text, tmp_path, monkeypatch):
        monkeypatch.setattr(training.Accelerator, "num_processes", 3)
        with pytest.raises(ValueError, match="4 windows a step cannot be shared evenly by 3 processes"):
            train(job("longspec", disk.target, text, tmp_path / "out"))
