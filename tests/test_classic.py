"""A classic draft's own state, compared with a fresh draft: a broken one would still be lossless, only slow."""

import copy
import random

import pytest
import torch
from conftest import pair
from transformers import MistralConfig, MistralForCausalLM

from specx.acceptance import Walk
from specx.adapters import classic
from specx.adapters.classic import ClassicModel
from specx.config import CacheConfig
from specx.hf import HFModel
from specx.tree import Plan

PLAN = Plan(12, 3, 3)


@pytest.fixture(scope="module")
def adapter(tiny):
    return pair(tiny, copy.deepcopy(tiny)).draft


def prefilled(adapter, tokens, keep=None):
    """A draft that has seen nothing but these tokens, the last of them as root."""
    draft = adapter.start(1000, 50, 0, CacheConfig())
    draft.prefill(torch.tensor(tokens[:-1]), keep)
    draft.begin(tokens[-1])
    return draft


def assert_same_tree(found, expected):
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert found.parents.tolist() == expected.parents.tolist()
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-3, rtol=1e-3)


def random_tokens(count, seed):
    return torch.randint(1, 64, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def accept_something(draft, tree, rng):
    """Accept the path to any node and any bonus; return the tokens that were emitted."""
    path = tree.path(rng.randrange(len(tree)))
    emitted = (*tree.tokens[path[1:]].tolist(), rng.randrange(64))
    draft.accept(Walk(tuple(path), emitted, len(path) - 1))
    return list(emitted)


@pytest.mark.parametrize("depth", [0, 1, 4, 7])
def test_a_draft_that_is_the_target_is_accepted_whole(tiny, prompt_of, depth):
    model = pair(tiny, copy.deepcopy(tiny))
    out = model.generate(prompt_of(50), max_new_tokens=1 + 3 * (depth + 2), policy="full", beam=1, depth=depth)
    assert out.accepted == {depth + 1: 3}
    assert out.stats["tau"] == depth + 2


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("count", [9, 17, 30])
def test_rows_that_are_run_for_nothing_change_nothing(tiny, monkeypatch, flash, count):
    """As in bfloat16 on a CPU, where rows are padded; here in float32."""
    model = HFModel(tiny, flash_prefill=flash)
    adapter, tokens = ClassicModel("tiny", model, 64, 128, "the test"), random_tokens(count + 1, 1)
    trees = []
    for padded in (False, True):
        if padded:
            monkeypatch.setattr(classic, "steady_rows", lambda rows, room, *_: min(-(-rows // 16) * 16, room))
        draft = prefilled(adapter, tokens)
        trees.append((draft.propose(PLAN), draft.foreseen))
    assert_same_tree(trees[0][0], trees[1][0])
    assert trees[0][1] == trees[1][1]


@pytest.mark.parametrize("window", [4, 20])
def test_a_draft_that_slides_is_accepted_whole(prompt_of, window):
    """Its levels see each other, and the prefix, through the window; the tree is deeper than the smaller one."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        sliding_window=window,
        eos_token_id=None,
    )
    target = MistralForCausalLM(config).eval()
    out = pair(target, copy.deepcopy(target)).generate(prompt_of(50), max_new_tokens=28, policy="full", beam=1, depth=7)
    assert out.accepted == {8: 3}


@pytest.mark.parametrize("seed", range(5))
def test_any_steps_leave_the_state_of_a_fresh_draft(adapter, seed):
    rng = random.Random(seed)
    tokens = random_tokens(30, seed)
    draft = prefilled(adapter, tokens)
    for _ in range(5):
        tree = draft.propose(PLAN)
        assert_same_tree(tree, prefilled(adapter, tokens).propose(PLAN))
        tokens += accept_something(draft, tree, rng)
        if rng.random() < 0.3:  # a round without a draft
            draft.accept(Walk((0,), (7,), 0))
            tokens.append(7)
        assert draft.cached + draft.waiting == len(tokens)


@pytest.mark.parametrize("seed", range(5))
def test_refresh_equals_a_fresh_draft_of_the_kept_tokens(adapter, seed):
    rng = random.Random(seed)
    tokens = random_tokens(60, seed)
    draft = prefilled(adapter, tokens)
    tokens += accept_something(draft, draft.propose(PLAN), rng)
    keep = torch.tensor(sorted(rng.sample(range(len(tokens) - 1), 20)))
    draft.refresh(keep)
    assert (draft.cached, draft.waiting) == (20, 1)
    alone = prefilled(adapter, [*(tokens[i] for i in keep.tolist()), tokens[-1]]).propose(PLAN)
    assert_same_tree(draft.propose(PLAN), alone)
    assert_same_tree(prefilled(adapter, tokens, keep).propose(PLAN), alone)


@pytest.mark.parametrize("policy", ["window", "retrieval", "auto"])
@pytest.mark.parametrize("prompt", [5, 75, 300])
def test_positions_stay_in_the_draft_context(tiny, prompt_of, monkeypatch, policy, prompt):
    """Also where a short prompt grows a long answer. 80 positions, of which the largest is 79."""
    model, positions = pair(tiny, copy.deepcopy(tiny), draft_context=80), []
    forward = model.draft.model.forward

    def watched(ids, at, cache, **options):
        positions.append(int(at.max()))
        return forward(ids, at, cache, **options)

    monkeypatch.setattr(model.draft.model, "forward", watched)
    out = model.generate(prompt_of(prompt), max_new_tokens=70, policy=policy, chunk_size=4, top_chunks=3)
    assert len(out.tokens) == 70
    assert max(positions) < 80
    assert out.draft_kv_tokens <= 80
