"""Packed linear layers: the same numbers, only while we run, and never a stale weight."""

import pytest
import torch
from conftest import tiny_llama
from torch import nn

from specx import packed
from specx.hf import HFModel
from specx.packed import PackedLinears, steady_rows

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"), reason="this torch has no oneDNN linear layers"
)


def bf16_stack() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 96), nn.SiLU(), nn.Linear(96, 32, bias=False)).to(torch.bfloat16)


@pytest.mark.parametrize("rows", [1, 5, 64, 256, 257])
def test_gives_what_the_module_gives(rows):
    model, x = bf16_stack(), torch.randn(1, rows, 48).bfloat16()
    own, truth = model(x), bf16_stack().float()(x.float())
    with PackedLinears(model).enabled():
        mine = model(x)
    assert (mine - truth).abs().max() <= (own - truth).abs().max() * 1.5 + 1e-3


def test_is_on_only_inside_and_comes_off_after_an_error():
    model = bf16_stack()
    layers = PackedLinears(model)
    with layers.enabled():
        assert "forward" in model[0].__dict__
    with pytest.raises(RuntimeError), layers.enabled():
        model(torch.zeros(1, 3))
    assert not any("forward" in module.__dict__ for module in model.modules())


@torch.no_grad()
def test_sees_weights_that_change():
    model, x = bf16_stack(), torch.randn(1, 3, 48).bfloat16()
    layers = PackedLinears(model)
    with layers.enabled():
        before = model(x)
        model[2].weight.mul_(2)
        in_place = model(x)
        model[2].weight = nn.Parameter(torch.zeros_like(model[2].weight))
        replaced = model(x)
    torch.testing.assert_close(in_place, before * 2)
    assert (replaced == 0).all()


def test_packs_only_what_it_should(monkeypatch):
    model = bf16_stack()
    assert len(PackedLinears(model)) == 2
    assert PackedLinears(model).nbytes == 2 * (48 * 96 + 96 * 32)
    assert len(PackedLinears(model, wanted=False)) == 0
    assert len(PackedLinears(bf16_stack().float(), wanted=True)) == 0
    monkeypatch.setattr(packed, "COPY_BYTES", 100)
    assert len(PackedLinears(model)) == 0
    assert len(PackedLinears(model, wanted=True)) == 2


def test_leaves_a_layer_that_somebody_else_has_wrapped():
    model = bf16_stack()
    model[0].forward = model[0].forward
    layers = PackedLinears(model)
    assert len(layers) == 1
    with layers.enabled():
        pass
    assert "forward" in model[0].__dict__


def test_leaves_a_layer_that_is_wrapped_later():
    model, x = bf16_stack(), torch.zeros(1, 48).bfloat16()
    layers, calls = PackedLinears(model), []
    own = model[0].forward
    model[0].forward = lambda x: calls.append(len(x)) or own(x)
    with layers.enabled():
        model(x)
    assert calls == [1]
    model(x)
    assert calls == [1, 1], "the wrapper is still there"
    assert "forward" not in model[2].__dict__


def test_an_enhanced_model_uses_it_and_stays_itself_outside():
    model = tiny_llama(seed=3).to(torch.bfloat16)
    engine, ids = HFModel(model), torch.arange(8)
    plain = HFModel(model, pack_weights=False)
    assert len(engine.packed) > 0
    assert len(plain.packed) == 0
    outputs = []
    for each in (engine, plain):
        outputs.append(each.forward(ids, torch.arange(8), each.new_cache(16)).logits.float())
    torch.testing.assert_close(*outputs, atol=0.05, rtol=0.05)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_few_sizes_for_products_that_are_compiled():
    cpu = torch.device("cpu")
    sizes = {steady_rows(rows, 999, torch.bfloat16, cpu) for rows in range(9, 257)}
    assert sizes == set(range(16, 257, 16))
    assert all(steady_rows(rows, 999, torch.bfloat16, cpu) >= rows for rows in range(1, 400))
    assert [steady_rows(rows, 999, torch.bfloat16, cpu) for rows in (1, 8, 16, 300)] == [1, 8, 16, 300]
    assert steady_rows(23, 999, torch.float32, cpu) == steady_rows(23, 999, torch.bfloat16, torch.device("cuda")) == 23
    assert steady_rows(23, 31, torch.bfloat16, cpu) == 23, "no room for the others"
