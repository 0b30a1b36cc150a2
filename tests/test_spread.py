"""A target that accelerate spreads over devices: here the CPU and the disk, whose parts are fetched as they run."""

import json

import heads
import pytest
import torch
from click.testing import CliRunner

from specx import cli
from specx.adapters import checkpoints
from specx.adapters.checkpoints import load_model
from specx.adapters.loader import load_draft
from specx.config import LoadConfig
from specx.hf import HFModel
from specx.hf_attention import Call

pytest.importorskip("accelerate", reason="accelerate is not installed: --device-map is not tested")
pytest_plugins = ["disk"]
MIXED = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}


def spread_by(monkeypatch, folder, layers=2, **places):
    """Let --device-map auto give parts to the disk, as it does where memory ends; by default all of them."""
    parts = ["model.embed_tokens", *(f"model.layers.{number}" for number in range(layers)), "model.norm", "lm_head"]
    chosen = {part: places.get(part, "disk") for part in parts} | {"model.rotary_emb": "cpu"}
    options = {"device_map": chosen, "offload_folder": str(folder)}
    monkeypatch.setattr(checkpoints, "_placement", lambda config: options if config.device_map else {})


def invoke(*args):
    result = CliRunner().invoke(cli.main, [str(arg) for arg in args])
    assert result.exit_code == 0, result.stderr
    return result


@pytest.mark.parametrize("places", [MIXED, {}], ids=["cpu and disk", "disk"])
def test_run_gives_the_same_text(disk, tmp_path, monkeypatch, places):
    spread_by(monkeypatch, tmp_path, **places)
    options = ["run", *disk.pair, "--prompt", "def name(steps):" * 20, "--no-chat", "--max-new-tokens", 24]
    options += ["--draft-context", 48, "--controller", "off", "--stats-json"]
    alone = invoke(*options, tmp_path / "alone.json")
    spread = invoke(*options, tmp_path / "spread.json", "--device-map", "auto")
    assert spread.stdout == alone.stdout
    mine, other = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("spread", "alone"))
    assert mine["accepted_histogram"] == other["accepted_histogram"]
    assert mine["policy"] == "auto"


def test_eval_finds_every_output_equal(disk, tmp_path, monkeypatch):
    spread_by(monkeypatch, tmp_path, **MIXED)
    text = "".join(f"def name_{n}(steps, coloured):\n    return steps[{n}] + coloured\n" for n in range(80))
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"text": text}) + "\n")
    options = ["--lengths", "64,128", "--samples", 1, "--spans", 1, "--span-tokens", 16, "--max-new-tokens", 6]
    options += ["--methods", "ar,full,auto", "--measure", "tau,speed,trace", "--draft-context", 96]
    invoke("eval", *disk.pair, "--data", data, *options, "--out", tmp_path / "out", "--device-map", "auto")
    results = json.loads((tmp_path / "out" / "summary.json").read_text())["results"]
    judged = [each["same"] for each in results if "same" in each]
    assert judged
    assert all(each["equal"] == each["of"] for each in judged)


@pytest.mark.parametrize("kind", [heads.EAGLE1, heads.EAGLE3])
def test_heads_read_embeddings_and_lm_head_from_the_disk(tmp_path, monkeypatch, kind):
    target = heads.tiny_target()
    target.save_pretrained(tmp_path / "target")
    folder = heads.save(tmp_path / "head", heads.flat_config(), heads.head_tensors(kind))
    prompt = heads.prompt_of(60)
    alone = heads.couple(target, folder).generate(prompt, max_new_tokens=12)
    spread_by(monkeypatch, tmp_path / "offloaded", layers=8)
    engine = HFModel(load_model(str(tmp_path / "target"), LoadConfig(device_map="auto"), "target"))
    assert engine.lm_head.weight.is_meta
    assert engine.device == engine.last_device == torch.device("cpu")
    spread = heads.couple(engine, folder).generate(prompt, max_new_tokens=12)
    assert spread.tokens == alone.tokens
    assert spread.stats["accepted_histogram"] == alone.stats["accepted_histogram"]
    with pytest.raises(ValueError, match="draft_vocab needs the target's LM head in memory"):
        load_draft(folder, folder, engine, None, LoadConfig(), torch.arange(8))


def test_masks_follow_the_queries_to_their_device():
    """Layers on a second device, which here is one without data."""
    mask = torch.ones(2, 2, dtype=torch.bool).tril()
    call = Call(4, torch.tensor([4, 5]), mask, torch.tensor([4, 5]), "reference", False, None)
    for device in ("cpu", "meta"):
        bias = call._bias("tail", None, 0, torch.zeros(1, device=device))
        assert bias.device.type == device
