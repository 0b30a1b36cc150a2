"""Training of LongSpec drafts: what is trained is what the adapter computes, at every lag and at shifted positions."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from blocks import LINEAR, block_tensors, couple, prompt_of, save, tiny_target

from specx.adapters.longspec_block import WINDOW
from specx.config import CacheConfig
from specx.training.longspec import LongSpecLoss, LongSpecTask, banded

FAMILIES = {"llama": ("Llama", {}), "linear rope": ("Llama", LINEAR), "qwen2": ("Qwen2", {})}


def made(family, tmp_path, **options):
    """A block in training and, with the same weights, as a draft."""
    kind, changed = FAMILIES[family]
    target = tiny_target(kind, **changed)
    model = couple(target, save(tmp_path / family, block_tensors()))
    return LongSpecTask(target, model.draft.block, LongSpecLoss(**options)), model


def drafted(model, ids, positions, at, lag):
    """The adapter's logits after token `at` where the target's rows end `lag` tokens before it."""
    target = model.target
    rows = LongSpecTask(target, model.draft.block, LongSpecLoss()).watch(ids[None, :-1], positions)
    draft = model.draft.start(len(ids), 8, 0, CacheConfig())
    draft.attach(lambda: tuple(each[:, :, : at - lag + 1] for each in rows[:2]))
    first = max(0, at - WINDOW + 1)
    x = model.draft.embed(ids[first : at + 1])
    tables = draft.block.rotary.tables(positions[first : at + 1], x)
    draft.ring.extend(*draft.block.keys_values(x, tables), torch.arange(first, at + 1), at + 1)
    newest = (x[:, -1:], tuple(each[:, :, -1:] for each in tables))
    hidden = draft.block(*newest, draft._root_attention(at), lambda query: model.draft.attend(query, draft._context()))
    return model.draft.logits(hidden)[0]


@torch.no_grad()
@pytest.mark.parametrize("lag", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_trained_on_what_the_adapter_computes(family, lag, tmp_path):
    task, model = made(family, tmp_path)
    ids, positions = prompt_of(19), torch.arange(18)
    positions[3:] += 900
    rows = [drafted(model, ids, positions, at, lag) for at in range(lag, 18)]
    # The first rows, which see nothing of the target, are not what any draft computes.
    whole = 18 * task.loss(ids[None], positions, lag)
    few = lag * task.loss(ids[None, : lag + 1], positions[:lag], lag)
    truth = F.cross_entropy(torch.stack(rows), ids[lag + 1 :], reduction="sum")
    torch.testing.assert_close(whole - few, truth, atol=1e-3, rtol=1e-5)


@torch.no_grad()
def test_windows_longer_than_the_block_s(tmp_path):
    task, model = made("llama", tmp_path)
    ids, positions = prompt_of(701), torch.arange(700)
    whole, shorter = (count * task.loss(ids[None, : count + 1], positions[:count], 1) for count in (700, 699))
    last = drafted(model, ids, positions, 699, 1)
    torch.testing.assert_close(whole - shorter, F.cross_entropy(last, ids[700]), atol=5e-3, rtol=1e-4)


@pytest.mark.parametrize("rows", [3, WINDOW, WINDOW + 1, 1024, 1300])
def test_banded_attention_is_a_mask(rows):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, rows, 8, generator=generator) for heads in (4, 2, 2))
    distance = torch.arange(rows)[:, None] - torch.arange(rows)
    mask = (distance >= 0) & (distance < WINDOW)
    truth = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(banded(query, key, value, 0.3), truth, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_distillation_learns_the_target_s_distribution(tmp_path):
    task, model = made("llama", tmp_path, distill=True)
    ids, positions = prompt_of(19), torch.arange(18)
    wanted = model.target(ids[None, :-1]).logits[0].softmax(-1)
    rows = torch.stack([drafted(model, ids, positions, at, 1) for at in range(1, 18)])
    whole, few = 18 * task.loss(ids[None], positions, 1), task.loss(ids[None, :2], positions[:1], 1)
    torch.testing.assert_close(whole - few, F.cross_entropy(rows, wanted[1:], reduction="sum"), atol=1e-3, rtol=1e-5)


def test_anchor_offset():
    how, plain = LongSpecLoss(positions=4000), LongSpecLoss(anchor_offset=False)
    seen, sinks, starts = np.random.default_rng(0), set(), []
    for _ in range(300):
        positions = how.place(100, seen)
        steps = np.diff(positions)
        jumps = np.flatnonzero(steps != 1)
        assert len(jumps) <= 1  # the others are contiguous
        assert positions.max() < 4000
        sinks.add(int(jumps[0]) + 1 if len(jumps) else 0)
        starts.append(int(positions[-1]))
    assert sinks == {0, 1, 2, 3, 4}
    assert min(starts) < 300
    assert max(starts) > 3700
    assert (plain.place(100, seen) == np.arange(100)).all()
    assert (how.place(5000, seen) == np.arange(5000)).all()  # no room to shift


def test_lags():
    rng = np.random.default_rng(0)
    assert {LongSpecLoss().late(rng) for _ in range(100)} == {1, 2, 3, 4}
    assert {LongSpecLoss(lag=6).late(rng) for _ in range(200)} == {1, 2, 3, 4, 5, 6}
    assert {LongSpecLoss(noisy=False).late(rng) for _ in range(100)} == {1}


def test_training_reaches_every_weight_and_not_the_target(tmp_path):
    task, model = made("llama", tmp_path)
    task.requires_grad_(True)
    for weight in model.target.parameters():
        weight.requires_grad_(False)
    task(prompt_of(20)[None], (0, 1)).backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in task.parameters())
    assert not {id(each) for each in task.parameters()} & {id(each) for each in model.target.parameters()}


@pytest.mark.parametrize("teacher", [False, True])
def test_sliced_losses_have_the_gradients_of_whole_ones(teacher, monkeypatch):
    from specx.training import loss

    head, torch_seed = torch.nn.Linear(8, 11), torch.manual_seed(0)
    hidden, other = torch.randn(2, 50, 8, generator=torch_seed)
    wanted = other if teacher else torch.randint(0, 11, (50,), generator=torch_seed)
    found = []
    for elements in (1 << 20, 11 * 7):
        monkeypatch.setattr(loss, "_ELEMENTS", elements)
        own = hidden.clone().requires_grad_()
        value = loss.cross_entropy(own, head, wanted, 11, head if teacher else None)
        value.backward()
        found.append((value, own.grad))
    law = head(other).softmax(-1) if teacher else wanted
    torch.testing.assert_close(found[0][0], F.cross_entropy(head(hidden), law))
    for whole, sliced in zip(*found, strict=True):
        torch.testing.assert_close(whole, sliced)
