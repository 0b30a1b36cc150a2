"""Checkpoints that are damaged, incomplete, foreign or far away, and names."""

import json
import logging
import os
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM, T5Config
from transformers.utils import logging as hf_logging

import specx
from specx.adapters import hub, names
from specx.adapters.checkpoints import compare_tokenizers, load_model, load_tokenizer
from specx.adapters.hub import brief, fetch
from specx.adapters.names import DRAFTS, TARGETS, known_draft, locate
from specx.config import LoadConfig

pytest_plugins = ["disk"]


def edit(**values):
    """A change to config.json; None removes a key."""

    def change(folder):
        config = json.loads((folder / "config.json").read_text()) | values
        kept = {key: value for key, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))

    return change


def write(name, content, instead_of="model.safetensors"):
    def change(folder):
        (folder / instead_of).unlink(missing_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def without(*weights):
    def change(folder):
        kept = {name: value for name, value in load_file(folder / "model.safetensors").items() if name not in weights}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})

    return change


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def shards(folder):
    """An index that names two shards, one of which is not there."""
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    weights = sorted(load_file(folder / "model-1.safetensors"))
    index = {name: f"model-{1 + number % 2}.safetensors" for number, name in enumerate(weights)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


class Command:
    def __reduce__(self):
        return (os.mkdir, ("pickled-code-has-run",))


def pickled(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Command()}, folder / "pytorch_model.bin")


BROKEN = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "config cut": (write("config.json", '{"model_type":', "config.json"), "its config.json is broken: Expecting value"),
    "config binary": (write("config.json", b"\xff\0", "config.json"), "its config.json is broken: 'utf-8' codec"),
    "config a list": (write("config.json", "[1]", "config.json"), "config.json is broken: a JSON object is expected"),
    "no model type": (edit(model_type=None, architectures=None), "Should have a `model_type` key"),
    "unknown model type": (edit(model_type="zorglub"), "model type `zorglub` but Transformers does not recognize"),
    "wrong value": (edit(num_hidden_layers="three"), "'num_hidden_layers' expected int, got str"),
    "code of its own": (
        edit(model_type="own", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}),
        "brings its own Python code; read that, then allow it with --trust-remote-code",
    ),
    "generation config cut": (write("generation_config.json", "{", "x"), "its generation_config.json is broken"),
    "no weights": (write("README.md", ""), r"has no weights \(model.safetensors or pytorch_model.bin\)"),
    "weights cut": (cut, "model.safetensors is damaged or cut off .*; download it again"),
    "weights empty": (write("model.safetensors", b""), "model.safetensors is damaged or cut off"),
    "weights garbage": (write("model.safetensors", bytes(range(256)) * 9), "model.safetensors is damaged or cut off"),
    "weights a pointer": (
        write("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "model.safetensors is a Git LFS pointer, not the weights; run `git lfs pull` there",
    ),
    "shard missing": (shards, "lacks model-2.safetensors, which its model.safetensors.index.json names"),
    "index cut": (write("model.safetensors.index.json", "{"), "its model.safetensors.index.json is broken"),
    "bin garbage": (write("pytorch_model.bin", b"garbage"), "is damaged or holds pickled code, which is never run"),
    "bin with code": (pickled, "is damaged or holds pickled code, which is never run"),
    "weights missing": (
        without("lm_head.weight", "model.norm.weight"),
        "lacks 2 of the weights its config asks for, the first one lm_head.weight",
    ),
    "layers missing": (edit(num_hidden_layers=3), "lacks 9 of the weights .*, the first one model.layers.2"),
    "other vocabulary": (
        edit(vocab_size=500),
        r"2 weights do not fit .*; lm_head.weight is \[400, 32\], not \[500, 32\]",
    ),
    "other width": (edit(intermediate_size=80), r"6 weights do not fit its config; .*down_proj.weight is \[32, 64\]"),
    "not a causal model": (edit(**T5Config(num_layers=1).to_dict()), "is no causal language model"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("role", ["target", "draft"])
def test_broken_checkpoints(disk, request, case, role):
    change, message = BROKEN[case]
    name = f"broken {case}"
    folder = str(disk.root / name) if (disk.root / name).is_dir() else disk.copy(name, change)
    given = (folder, disk.draft) if role == "target" else (disk.target, folder)
    with pytest.raises(RuntimeError, match=message) as caught:
        specx.load(*given)
    assert role in str(caught.value)
    assert folder in str(caught.value)
    assert not Path("pickled-code-has-run").exists()


def test_a_broken_draft_is_found_before_the_target_is_read(disk, monkeypatch):
    broken = disk.copy("cut draft", cut)
    monkeypatch.setattr("specx.api.load_model", lambda *args: pytest.fail("weights were read"))
    for draft, error in ((broken, RuntimeError), (disk.other_tokenizer, ValueError)):
        with pytest.raises(error):
            specx.load(disk.target, draft)


def test_weights_that_the_config_does_not_use_are_told(disk, caplog):
    folder = disk.copy("a layer too many", edit(num_hidden_layers=1))
    specx.load(folder)
    assert "9 weights of the checkpoint are not used, the first one model.layers.1" in caplog.text
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_loading_leaves_the_logging_of_transformers_as_it_was(disk, capfd):
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    load_model(disk.target, LoadConfig(), "target")
    load_tokenizer(disk.target)
    assert (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()) == (verbosity, bars)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(disk, dtype):
    model = load_model(disk.target, LoadConfig(dtype=dtype), "target")
    assert model.dtype == getattr(torch, dtype)
    assert not model.training


@pytest.mark.parametrize(
    "model",
    [
        BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2)),
        MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2)),
    ],
    ids=lambda model: type(model).__name__,
)
def test_models_that_cannot_be_enhanced(tmp_path, model):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{type(model).__name__} cannot be enhanced: "):
        specx.load(tmp_path)


class TestTokenizers:
    def test_none(self, disk):
        assert load_tokenizer(disk.no_tokenizer) is None
        assert specx.load(disk.no_tokenizer, disk.draft).tokenizer is None

    @pytest.mark.parametrize("content", ['{"a":', '{"a": 1}', ""])
    def test_broken(self, disk, tmp_path, content):
        (tmp_path / "config.json").write_text((Path(disk.target) / "config.json").read_text())
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(RuntimeError, match=f"the tokenizer in {tmp_path} cannot be read: "):
            load_tokenizer(str(tmp_path))

    def test_a_sentencepiece_model_alone_is_enough(self, tmp_path):
        corpus = tmp_path / "corpus.txt"
        corpus.write_text("def f(x):\n    return x + 1\nthe quick brown fox jumps over the lazy dog\n" * 50)
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus), model_prefix=str(tmp_path / "tokenizer"), vocab_size=320, model_type="bpe",
            byte_fallback=True, pad_id=-1, minloglevel=2,
        )  # fmt: skip
        config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = load_tokenizer(str(tmp_path))
        plain = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
        assert tokenizer.encode("the quick fox \u00e9") == [plain.bos_id(), *plain.encode("the quick fox \u00e9")]

    def test_sentencepiece_needs_its_packages(self, disk, tmp_path, monkeypatch):
        (tmp_path / "config.json").write_text((Path(disk.target) / "config.json").read_text())
        (tmp_path / "tokenizer.model").write_bytes(b"unreadable")
        monkeypatch.setattr("specx.adapters.checkpoints._installed", lambda name: name != "sentencepiece")
        with pytest.raises(RuntimeError, match="pip install sentencepiece protobuf"):
            load_tokenizer(str(tmp_path))

    def test_are_compared_id_by_id(self):
        def tokenizer(*tokens):
            return SimpleNamespace(get_vocab=lambda: {token: index for index, token in enumerate(tokens)})

        assert compare_tokenizers(tokenizer(*"abc"), tokenizer(*"abcde")) == (3, [])
        assert compare_tokenizers(tokenizer(*"abcde"), tokenizer(*"abc")) == (3, [])
        shared, wrong = compare_tokenizers(tokenizer(*"abc"), tokenizer(*"acb"))
        assert (shared, wrong[0]) == (3, "id 1 is 'b' for the target, 'c' for the draft")
        assert len(compare_tokenizers(tokenizer(*"abcdefgh"), tokenizer(*"hgfedcba"))[1]) == 5


class TestNames:
    def test_every_known_draft_has_a_known_target(self):
        assert {known.target for known in DRAFTS.values()} <= TARGETS.keys()

    def test_known_names(self):
        assert locate("vicuna-68m", "draft") == "double7/vicuna-68m"
        assert locate("vicuna-7b", "target") == "lmsys/vicuna-7b-v1.5-16k"
        assert Path(locate("demo", "target")).name == "demo-target"
        assert known_draft("double7/vicuna-68m") is known_draft("vicuna-68m")
        assert known_draft("JackFram/unknown") is None

    def test_directories_and_hub_ids(self, tmp_path, monkeypatch):
        (tmp_path / "owner" / "model").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert locate("owner/model", "target") == "owner/model"
        assert locate("~/owner", "target") == str(tmp_path / "owner")
        assert locate("other-owner/model-1.5_x", "draft") == "other-owner/model-1.5_x"
        for name in ("./model", "/no/where", "a/b/c", "nobody/", "~/nowhere", "a b/c"):
            with pytest.raises(ValueError, match=r"directory .* does not exist"):
                locate(name, "target")
        with pytest.raises(ValueError, match="does not exist; did you mean 'model'"):
            locate(f"{tmp_path}/owner/modell", "target")

    def test_a_missing_bundled_pair_is_said(self, monkeypatch, tmp_path):
        monkeypatch.setattr(names, "files", lambda package: tmp_path)
        with pytest.raises(RuntimeError, match="the bundled demo-target is not in this installation"):
            specx.load()


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def answers(monkeypatch):
    """answers(x): the hub's answer to a question about a repository, an error to raise or its list of files."""

    def set_answer(answer):
        def model_info(self, repo, timeout):
            if isinstance(answer, Exception):
                raise answer
            return SimpleNamespace(sha="1" * 40, siblings=[SimpleNamespace(rfilename=name) for name in answer])

        monkeypatch.setattr(hub.HfApi, "model_info", model_info)

    return set_answer


@pytest.mark.usefixtures("empty_cache")
class TestHub:
    def test_unreachable_is_said_at_once(self, monkeypatch):
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
        began = time.perf_counter()
        with pytest.raises(RuntimeError) as caught:
            specx.load(None, "vicuna-68m")
        assert time.perf_counter() - began < 5
        assert "target lmsys/vicuna-7b-v1.5-16k: no such directory here, and the hub cannot be reached" in str(
            caught.value
        )
        assert "Offline you can use the bundled pair" in str(caught.value)

    def test_offline_mode_is_said(self, monkeypatch):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(RuntimeError, match="HF_HUB_OFFLINE is set with nothing of it in the cache"):
            fetch("owner/model", "draft")

    @pytest.mark.parametrize(
        ("kind", "message"),
        [(RepositoryNotFoundError, "no such repository on the hub"), (GatedRepoError, "the hub restricts access")],
    )
    def test_refusals(self, answers, kind, message):
        answers(kind.__new__(kind))  # making one takes a response of the HTTP client in use
        with pytest.raises(RuntimeError, match=message):
            fetch("owner/model", "draft")

    def test_downloads_what_is_needed(self, answers, monkeypatch):
        beside = ["config.json", "tokenizer.model", "generation_config.json"]
        weights = ["model-1.safetensors", "model-2.safetensors"]
        other = ["pytorch_model.bin", "README.md", "onnx/model.safetensors", "original/params.json", "consolidated.pth"]
        answers([*other, *weights, *beside])
        asked = {}
        monkeypatch.setattr(hub, "snapshot_download", lambda repo, **options: asked.update(options) or "folder")
        assert fetch("owner/model", "draft") == "folder"
        assert sorted(asked["allow_patterns"]) == sorted(weights + beside)
        answers(["pytorch_model.bin", *beside])
        fetch("owner/model", "draft")
        assert sorted(asked["allow_patterns"]) == sorted(["pytorch_model.bin", *beside])

    def test_a_download_that_breaks_off(self, answers, monkeypatch):
        answers(["config.json"])

        def broken(repo, **options):
            raise ConnectionError("reset by peer")

        monkeypatch.setattr(hub, "snapshot_download", broken)
        with pytest.raises(RuntimeError, match=r"the download broke off \(reset by peer\); run again to resume"):
            fetch("owner/model", "draft")

    def test_the_cache_is_used(self, answers, monkeypatch, empty_cache):
        folder = empty_cache / "models--owner--model" / "snapshots" / ("1" * 40)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder.parent.parent / "refs").mkdir()
        (folder.parent.parent / "refs" / "main").write_text("1" * 40)
        downloads = []
        monkeypatch.setattr(hub, "snapshot_download", lambda repo, **options: downloads.append(repo) or "folder")
        for answer, expected in (
            (ConnectionError("no network"), str(folder)),
            (["config.json", "picture.png"], str(folder)),
            (["config.json", "model.safetensors"], "folder"),  # not complete
        ):
            answers(answer)
            assert fetch("owner/model", "draft") == expected
        assert downloads == ["owner/model"]


def test_brief_errors():
    assert brief(ValueError("a\n  b")) == "a b"
    assert brief(ValueError()) == "ValueError"
    assert brief(KeyError("a")) == "KeyError: 'a'"
    assert len(brief(ValueError("a" * 1000))) < 310


class TestTheUsersCommand:
    """`specx run --draft vicuna-68m --use-specextend --input FILE`, on stand-ins in the hub's cache."""

    def run(self, hub_home, specx_command, tmp_path, *args):
        command, env = specx_command
        file, stats = tmp_path / "report.txt", tmp_path / "stats.json"
        file.write_text("the thing in a tree " * 150)
        options = ["run", "--draft", "vicuna-68m", "--use-specextend", "--input", str(file), *args]
        done = subprocess.run(
            [*command, *options, "--max-new-tokens", "48", "--stats-json", str(stats)],
            env=env | {"HF_HOME": str(hub_home), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done, json.loads(stats.read_text())

    def test_as_it_stands(self, hub_home, specx_command, tmp_path):
        done, stats = self.run(hub_home, specx_command, tmp_path)
        assert [line.split()[0] for line in done.stderr.splitlines()] == ["loading", "target", "48"]
        assert "float16 on cpu, draft vicuna-68m (context 2048, the table of known names)" in done.stderr
        assert stats["prompt_tokens"] > 1024  # more than max_position_embeddings, which a factor of 4 stretches
        assert stats["finish_reason"] == "length"
        assert stats["tau"] > 1.2
        assert len(done.stdout) > 20

    def test_with_retrieval(self, hub_home, tmp_path):
        folders = [next((hub_home / "hub" / f"models--{name}" / "snapshots").iterdir()) for name in REPOSITORIES]
        model = specx.load(*folders, draft_context=512, policy="retrieval", dtype="float32")
        prompt = "the thing in a tree " * 150
        out = model.generate(prompt, max_new_tokens=40, trace=True)
        assert any(record["kept_chunks"] for record in out.trace)
        assert out.stats["draft_kv_tokens"] <= 512
        ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
        own = model.target.generate(ids, max_new_tokens=40, do_sample=False)
        assert out.tokens == own[0, ids.shape[1] :].tolist()
        assert out.text == model.tokenizer.decode(out.tokens, skip_special_tokens=True)


REPOSITORIES = ("lmsys--vicuna-7b-v1.5-16k", "double7--vicuna-68m")
