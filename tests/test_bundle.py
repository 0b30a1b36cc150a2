"""The pair that ships with the package."""

import json
from pathlib import Path

import pytest
import torch

import specx
from specx.adapters.names import locate
from specx.data.prompts import demo_prompt

MODELS = Path(locate("demo", "target")).parent
pytestmark = pytest.mark.skipif(not MODELS.is_dir(), reason="the bundled pair is not in this checkout")


def test_sizes():
    weights = {path.parent.name: path.stat().st_size for path in MODELS.glob("*/model.safetensors")}
    assert weights["demo-target"] <= 20e6
    assert sum(weights.values()) <= 32e6
    assert len(weights) == 5
    for name in ("demo-target", "demo-draft"):
        assert json.loads((MODELS / name / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
        assert "Loss in nats" in (MODELS / name / "README.md").read_text()


@pytest.mark.parametrize(
    ("draft", "kind", "trained", "held"),
    [
        ("demo-eagle1", "EAGLE-1", 2048, 2048),
        ("demo-eagle3", "EAGLE-3", 2048, 2048),
        ("demo-longspec", "LongSpec", 16384, 513),
    ],
)
def test_heads(draft, kind, trained, held):
    model = specx.load(draft=draft, dtype="float32")  # the target follows from the name
    assert model.draft.draft_context == trained
    assert any(kind in line for line in model.draft.about)
    _, ids = demo_prompt(model.tokenizer, 2100)
    out = model.generate(ids, max_new_tokens=48)
    own = model.target.generate(torch.tensor([ids]), max_new_tokens=48, do_sample=False)[0, len(ids) :]
    assert out.tokens == own.tolist()
    assert out.stats["tau"] > 1.5
    assert out.stats["draft_kv_tokens"] <= held


@pytest.mark.parametrize("policy", ["full", "auto"])
def test_greedy_in_float32_equals_generate(policy):
    model = specx.load(dtype="float32")
    _, ids = demo_prompt(model.tokenizer, 1500)
    out = model.generate(ids, max_new_tokens=48, policy=policy)
    own = model.target.generate(torch.tensor([ids]), max_new_tokens=48, do_sample=False)[0, len(ids) :]
    assert out.tokens == own.tolist()
    assert out.stats["tau"] > 1.0


def test_the_draft_is_bounded():
    model = specx.load()
    _, ids = demo_prompt(model.tokenizer, 3000)
    out = model.generate(ids, max_new_tokens=32)
    assert out.stats["draft_kv_tokens"] <= model.draft.draft_context == 1024
