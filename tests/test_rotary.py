"""A key that was moved is the key that the model itself would have computed there, in every layer."""

import copy
from typing import Any

import pytest
import torch
import transformers
from conftest import tiny_llama
from test_lossless import BASE, FAMILIES, check, couple, family

from specx.hf import HFModel
from specx.rotary import Rotation, find_rotation

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
# Beside those of test_lossless. name: (config and model class, what differs from BASE)
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere": ("Cohere", {}),  # pairs of neighbours
    "glm4": ("Glm4", {"rope_parameters": PARTIAL}),  # pairs of neighbours in half of the dims
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "llama-dynamic": ("Llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 64}),
    "gpt2": ("GPT2", {}),
}
MOVES = ["llama-gqa", "llama-llama3", "llama-linear", "llama-yarn", "mistral", "qwen2", "qwen3", "phi3", "gemma2"]
MOVES += ["gpt-neox", "stablelm", "cohere", "glm4", "gpt-oss", "diffllama"]
FIXED = ["opt", "gpt2", "gemma3", "smollm3", "cohere2", "deepseek-v3"]


def model_of(name: str) -> Any:
    if name in FAMILIES:
        return family(name)
    kind, overrides = OTHERS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(BASE | overrides))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for path, weight in model.named_parameters():
        if name == "gpt2" and path.endswith("wpe.weight"):
            weight.data.normal_(0.0, 0.3)
    return model


def keys_at(model: HFModel, positions: torch.Tensor) -> torch.Tensor:
    """The keys [layers, 1, G, K, D] of one token that is alone at each position: other tokens than the check's."""
    cache = model.new_cache(len(positions))
    alone = torch.eye(len(positions), dtype=torch.bool)
    model.forward(torch.full_like(positions, 11), positions, cache, mask=alone, tail_positions=positions)
    ((keys, _),) = cache.rows(0, len(positions))
    return keys


def worst(model: HFModel, rotation: Rotation) -> float:
    """The largest error, in parts of its layer's largest key, over moves in both directions and none."""
    delta = torch.tensor([1, 5, 0, 150, -40, -3, -199, 0, 12])
    before = torch.tensor([0, 7, 60, 3, 100, 3, 199, 199, 187])
    there = keys_at(model, before + delta).float()
    moved = rotation.move(keys_at(model, before), delta).float()
    return ((moved - there).abs().amax((1, 2, 3, 4)) / there.abs().amax((1, 2, 3, 4))).max().item()


@pytest.mark.parametrize("name", MOVES)
def test_moved_keys_are_the_models_own_in_every_layer(name):
    model = HFModel(model_of(name))
    rotation = find_rotation(model, 200)
    assert rotation is not None
    assert worst(model, rotation) < 1e-4
    still = Rotation(torch.zeros_like(rotation.inv_freq), rotation.interleaved)
    assert worst(model, still) > 0.1, "keys that stay would pass"


@pytest.mark.parametrize("name", ["llama-gqa", "qwen2", "gemma2", "cohere"])
def test_bfloat16_keys_move(name):
    model = HFModel(copy.deepcopy(model_of(name)).to(torch.bfloat16))
    rotation = find_rotation(model, 200)
    assert rotation is not None
    assert worst(model, rotation) < 2e-2


@pytest.mark.parametrize("name", FIXED)
def test_no_rotation_moves_these(name):
    assert find_rotation(HFModel(model_of(name)), 200) is None


def test_learned_positions_are_never_overrun():
    assert find_rotation(HFModel(family("opt")), 5000) is None


@pytest.mark.parametrize("name", ["phi3-longrope", "llama-dynamic"])
def test_tables_that_change_with_the_length(name):
    """Below their border of 64 positions they are one table, whichever side of it the model ran on before."""
    model = HFModel(model_of(name))
    for positions in (64, 65, 64, 200):
        found = find_rotation(model, positions)
        assert (found is None) == (positions > 64)
        if found is not None:
            before, delta = torch.tensor([3, 40, 63]), torch.tensor([50, -39, 0])
            there = keys_at(model, before + delta)
            moved = found.move(keys_at(model, before), delta)
            torch.testing.assert_close(moved, there, atol=1e-4, rtol=1e-4)


def test_a_rotation_does_not_follow_the_models_table():
    model = HFModel(family("phi3-longrope"))
    rotation = find_rotation(model, 64)
    assert rotation is not None
    before = rotation.inv_freq.clone()
    keys_at(model, torch.tensor([0, 500]))
    assert rotation.inv_freq.equal(before)


def test_a_layer_with_small_keys_is_checked_as_well():
    """Layers without rotation would pass if their keys were measured by another layer's."""
    model = copy.deepcopy(family("smollm3"))
    loose = [layer.self_attn for layer in model.model.layers if not layer.self_attn.use_rope]
    assert 0 < len(loose) < len(model.model.layers)
    for layer in loose:
        layer.k_proj.weight.data *= 1e-5
        layer.q_proj.weight.data *= 1e5
    assert find_rotation(HFModel(model), 200) is None


def test_far_positions_are_judged_by_what_float32_can_hold():
    model = HFModel(tiny_llama(head_dim=64, num_hidden_layers=1))
    assert find_rotation(model, 1 << 18) is not None


def test_the_keys_are_tried_and_not_only_the_table_found(tiny):
    model = HFModel(copy.deepcopy(tiny))
    assert find_rotation(model, 200) is not None
    rotary = model.model.model.rotary_emb
    forward = rotary.forward
    rotary.forward = lambda x, position_ids: forward(x, position_ids * 1.01)
    assert find_rotation(model, 200) is None


@pytest.mark.parametrize("name", ["gemma3", "opt"])
def test_a_draft_whose_keys_cannot_be_moved_recomputes_and_says_so(name, prompt_of):
    draft = family(name)
    if name == "opt":  # 64 positions, and a draft_context that claims more
        draft = transformers.OPTForCausalLM(
            type(draft.config)(**(BASE | FAMILIES["opt"][2] | {"max_position_embeddings": 64}))
        )
    pair = couple(family("llama-gqa"), draft.eval(), draft_context=4096)
    options = {"policy": "auto", "chunk_size": 8, "draft_context": 96, "retrieve_every": 2}
    out = check(pair, prompt_of(150), 12, refill="gather", **options)
    assert out.stats["refill"] == "recompute"
    assert [note.split(":")[0] for note in out.notes] == ["refill gather became recompute"]
    assert check(pair, prompt_of(150), 12, refill="recompute", **options).notes == []
    assert check(pair, prompt_of(40), 8, refill="gather", **options).notes == [], "nothing had to be refilled"


def test_a_rotation_holds_as_far_as_the_request_goes(prompt_of):
    """Below 64 positions this draft's keys move; a request that gives it more of them must not rely on that."""
    pair = couple(family("llama-gqa"), family("phi3-longrope"), draft_context=64)
    refills = [
        check(pair, prompt_of(150), 12, refill="gather", policy="window", draft_context=context).stats["refill"]
        for context in (64, 96, 64)
    ]
    assert refills == ["gather", "recompute", "gather"]


def rotation_of(dim: int, interleaved: bool) -> Rotation:
    return Rotation(10000.0 ** (-torch.arange(0, dim, 2) / dim), interleaved)


@pytest.fixture(params=[True, False], ids=["neighbours", "halves"])
def rotation(request):
    """Over 12 of 16 dims."""
    return rotation_of(12, request.param)


def random_keys(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 1, 2, 9, 16, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_move_by_nothing_changes_no_bit(rotation, dtype):
    keys = random_keys(dtype)
    moved = rotation.move(keys, torch.zeros(9, dtype=torch.long))
    assert moved.dtype == dtype
    assert moved.equal(keys)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str)
def test_moves_can_be_undone_and_joined(rotation, dtype, error):
    keys, one, two = random_keys(dtype), torch.arange(9) * 17 - 60, torch.tensor([3, -9, 0, 1000, -1000, 1, 2, 3, 4])
    away = rotation.move(keys, one)
    assert (away - keys)[..., one != 0, :12].abs().mean() > 0.1
    torch.testing.assert_close(rotation.move(away, -one), keys, atol=error, rtol=error)
    joined = rotation.move(keys, one + two)
    torch.testing.assert_close(rotation.move(away, two), joined, atol=20 * error, rtol=error)


def test_dims_that_do_not_rotate_stay_and_lengths_hold(rotation):
    keys = random_keys()
    moved = rotation.move(keys, torch.full((9,), 77))
    assert moved[..., 12:].equal(keys[..., 12:])
    torch.testing.assert_close(moved.norm(dim=-1), keys.norm(dim=-1))


def test_keys_may_lie_anyhow_in_memory_and_are_not_written(rotation):
    keys, delta = random_keys(), torch.arange(9) - 4
    expected = rotation.move(keys, delta)
    for strided in (keys.transpose(2, 3).contiguous().transpose(2, 3), keys.mT.contiguous().mT, keys[:, :, :1]):
        assert not strided.is_contiguous()
        before = strided.clone()
        torch.testing.assert_close(rotation.move(strided, delta), expected[:, :, : strided.shape[2]])
        assert strided.equal(before)
    assert rotation.move(keys[..., :0, :], delta[:0]).shape == (3, 1, 2, 0, 16)
