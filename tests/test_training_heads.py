"""Training of EAGLE heads: what is trained is what the adapter computes, at every unrolled step."""

import pytest
import torch
import torch.nn.functional as F
from heads import save, tiny_target

from specx.adapters.eagle import EagleModel
from specx.adapters.loader import load_eagle
from specx.cache import TreeCache
from specx.hf import HFModel
from specx.target import Target
from specx.training import eagle
from specx.training.eagle import TrainableHead, head_config

TOKENS = torch.randint(1, 60, (14,), generator=torch.Generator().manual_seed(0))


def made(version, tmp_path, vocabulary=None):
    """A head in training and, from its saved state dict, as a draft; what the target says of the tokens."""
    target = tiny_target()
    torch.manual_seed(1)
    head = TrainableHead(version, target, 80, vocabulary)
    tensors = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    folder = save(tmp_path / version, head_config(head, 1024), tensors, "model.safetensors")
    engine = HFModel(target)
    model = load_eagle(folder, folder, engine)
    found = []
    Target(engine, 32, taps=model.taps).prefill(TOKENS[:-1], found.append)
    wanted = target(TOKENS[None, :-1]).logits[0, 1:].softmax(-1)
    return head, model, model.states(model.features(found[0]))[:-1], wanted


def steps_of(model: EagleModel, states: torch.Tensor, unrolled: int) -> list[tuple[torch.Tensor, ...]]:
    """Per step s the states and logits of entries s, s + 1, ..., each grown as a chain of a tree would be."""
    ids, count, found = TOKENS[1:-1], len(states), []
    for step in range(unrolled):
        rows = []
        for last in range(step, count):  # true entries up to last - step, then `step` of the head's own
            cache = TreeCache(1, 32)
            true = torch.arange(last - step + 1)
            out = model.head(ids[true], states[true], cache, model.call(cache, true))
            cache.commit(range(len(true)))
            for entry in range(last - step + 1, last + 1):
                at = torch.tensor([entry])
                out = model.head(ids[at], out.states[-1:], cache, model.call(cache, at))
                cache.commit([0])
            rows.append((out.states[-1], model.head.logits(out.read)[-1]))
        found.append(tuple(torch.stack(each) for each in zip(*rows, strict=True)))
    return found


@torch.no_grad()
@pytest.mark.parametrize("unrolled", [1, 2, 3])
def test_eagle3_is_trained_on_what_a_chain_computes(unrolled, tmp_path):
    head, model, states, wanted = made("eagle3", tmp_path)
    head.unrolled = unrolled
    steps = steps_of(model, states, unrolled)
    losses = [F.cross_entropy(logits, wanted[step:]) for step, (_, logits) in enumerate(steps)]
    truth = sum(0.8**step * each for step, each in enumerate(losses)) / sum(0.8**step for step in range(unrolled))
    torch.testing.assert_close(head.loss(TOKENS[None]), truth, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_vocabulary_of_its_own(tmp_path):
    """It learns the target's distribution over its own tokens, and nothing where the target says another one."""
    vocabulary = torch.arange(0, 64, 2)
    head, model, states, wanted = made("eagle3", tmp_path, vocabulary)
    counts = torch.isin(wanted.argmax(-1), vocabulary).float()
    assert 0 < counts.mean() < 1
    own = wanted[:, vocabulary] / wanted[:, vocabulary].sum(-1, keepdim=True)
    steps = steps_of(model, states, 3)
    rows = [F.cross_entropy(logits, own[step:], reduction="none") for step, (_, logits) in enumerate(steps)]
    losses = [(each * counts[step:]).mean() for step, each in enumerate(rows)]
    truth = sum(0.8**step * each for step, each in enumerate(losses)) / sum(0.8**step for step in range(3))
    torch.testing.assert_close(head.loss(TOKENS[None]), truth, atol=1e-5, rtol=1e-5)
    assert set(model.vocabulary.tolist()) == set(vocabulary.tolist())


@torch.no_grad()
def test_eagle1_is_trained_on_what_the_adapter_computes(tmp_path, monkeypatch):
    monkeypatch.setattr(eagle, "NOISE", 0.0)
    head, model, states, wanted = made("eagle1", tmp_path)
    ((own, logits),) = steps_of(model, states, 1)
    engine, found = HFModel(head.target_of[0]), []
    Target(engine, 32, taps=model.taps).prefill(TOKENS[:-1], found.append)
    near = F.smooth_l1_loss(own, model.states(model.features(found[0]))[1:])
    torch.testing.assert_close(
        head.loss(TOKENS[None]), near + 0.1 * F.cross_entropy(logits, wanted), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("version", ["eagle1", "eagle3"])
def test_training_reaches_every_weight_and_not_the_target(version):
    target = tiny_target()
    head = TrainableHead(version, target, 80)
    head.loss(TOKENS[None]).backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in head.parameters())
    assert not {id(each) for each in head.parameters()} & {id(each) for each in target.parameters()}
