"""Chunk scores against a naive loop, what is kept, and the budget of the draft's cache over long generations."""

import math
import random

import pytest
import torch

from specx.config import CacheConfig, TreeConfig
from specx.retrieval import CachePolicy, chunk_scores, select


def naive_scores(key, query, lse, scale, softcap, chunk_size, over_heads="mean"):
    """Mean or maximum over heads of the mean weight of a chunk's own tokens, in Python floats."""
    heads, share = query.shape[0], query.shape[0] // key.shape[0]
    found = []
    for first in range(0, key.shape[1], chunk_size):
        tokens = range(first, min(first + chunk_size, key.shape[1]))
        totals = [0.0] * heads
        for head in range(heads):
            for token in tokens:
                score = scale * float(query[head].double() @ key[head // share, token].double())
                if softcap is not None:
                    score = softcap * math.tanh(score / softcap)
                totals[head] += math.exp(score - float(lse[head])) / len(tokens)
        found.append(max(totals) if over_heads == "max" else sum(totals) / heads)
    return torch.tensor(found)


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (8, 2), (8, 1)], ids=["H/G=1", "H/G=4", "H/G=8"])
@pytest.mark.parametrize(("length", "chunk_size"), [(1, 8), (8, 8), (9, 8), (31, 8), (40, 1), (5, 64)])
def test_chunk_scores_equal_a_naive_loop(length, chunk_size, heads, groups, dtype, softcap):
    generator = torch.Generator().manual_seed(length)
    key = torch.randn(groups, length, 16, generator=generator).to(dtype)
    query = torch.randn(heads, 16, generator=generator).to(dtype)
    lse = 2 + torch.rand(heads, generator=generator)
    found = chunk_scores(key, query, lse, 0.25, softcap, chunk_size)
    assert found.dtype == torch.float32
    bound = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found, naive_scores(key, query, lse, 0.25, softcap, chunk_size), rtol=bound, atol=0)


def test_chunk_scores_by_the_keenest_head():
    generator = torch.Generator().manual_seed(0)
    key, query = torch.randn(2, 20, 16, generator=generator), torch.randn(8, 16, generator=generator)
    lse = torch.rand(8, generator=generator)
    found = chunk_scores(key, query, lse, 0.25, None, 8, "max")
    torch.testing.assert_close(found, naive_scores(key, query, lse, 0.25, None, 8, "max"), rtol=1e-5, atol=0)
    assert (found > naive_scores(key, query, lse, 0.25, None, 8)).all()


def test_chunk_scores_do_not_punish_a_partial_chunk():
    """Equal weights everywhere: the last chunk of one token scores as much as the full ones."""
    key, query = torch.zeros(1, 17, 4), torch.zeros(2, 4)
    found = chunk_scores(key, query, torch.full((2,), math.log(17.0)), 1.0, None, 8)
    torch.testing.assert_close(found, torch.full((3,), 1 / 17))


def test_chunk_scores_of_a_view_of_the_cache():
    room = torch.full((2, 30, 8), torch.nan)
    room[:, :20] = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(0))
    key, query, lse = room[:, :20], torch.ones(4, 8), torch.zeros(4)
    expected = naive_scores(key, query, lse, 0.1, None, 8)
    torch.testing.assert_close(chunk_scores(key, query, lse, 0.1, None, 8), expected)


@pytest.mark.parametrize(
    ("options", "tokens", "chunks"),
    [
        ({}, [0, 1, 8, 9, 10, 11, 16, 17, 18, 19], (2,)),
        ({"top_chunks": 2}, [0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 16, 17, 18, 19], (1, 2)),
        ({"top_chunks": 0}, [0, 1, 16, 17, 18, 19], ()),
        ({"top_chunks": 99}, list(range(20)), (0, 1, 2, 3)),
        ({"sinks": 4, "top_chunks": 99}, list(range(20)), (1, 2, 3)),
        ({"sinks": 0, "recent": 5}, [8, 9, 10, 11, 15, 16, 17, 18, 19], (2,)),
        ({"recent": 20}, list(range(20)), ()),
        ({"recent": 99, "sinks": 99}, list(range(20)), ()),
    ],
    ids=["one chunk", "two", "none", "all", "sinks fill a chunk", "no sinks", "recent is all", "rules beyond the end"],
)
def test_select_by_hand(options, tokens, chunks):
    # chunks of 4 tokens: 0-3, 4-7, 8-11, 12-15, 16-19
    scores = torch.tensor([0.1, 0.3, 0.5, 0.2, 0.9])
    kept = select(scores, 20, **({"sinks": 2, "recent": 4, "top_chunks": 1, "chunk_size": 4} | options))
    assert kept.indices.tolist() == tokens
    assert kept.chunks == chunks


def test_select_without_scores_keeps_what_the_rules_keep():
    kept = select(None, 20, sinks=2, recent=3, top_chunks=5, chunk_size=4)
    assert kept.indices.tolist() == [0, 1, 17, 18, 19]
    assert kept.chunks == ()


def test_select_keeps_the_newest_chunk_whatever_its_score():
    """Tokens 12-14 are its newest chunk; one of them is in the recent window, the others would need the best score."""
    kept = select(torch.tensor([0.4, 0.9, 0.1, 0.0]), 15, sinks=0, recent=1, top_chunks=2, chunk_size=4)
    assert kept.indices.tolist() == [4, 5, 6, 7, 12, 13, 14]
    assert kept.chunks == (1,)


@pytest.mark.parametrize("lag", [0, 1, 3])
@pytest.mark.parametrize("seed", range(40))
def test_select_properties(seed, lag):
    rng = random.Random(seed)
    length, chunk_size = rng.randint(1, 300), rng.choice([1, 3, 8, 32, 500])
    sinks, recent, top_chunks = rng.choice([0, 1, 4, 40]), rng.choice([1, 2, 7, 64]), rng.choice([1, 2, 5, 100])
    total = -(-length // chunk_size)
    scores = torch.rand(max(1, total - lag), generator=torch.Generator().manual_seed(seed))
    kept = select(scores, length, sinks, recent, top_chunks, chunk_size)
    indices = kept.indices.tolist()
    assert kept.indices.dtype == torch.long
    assert indices == sorted(set(indices))
    assert set(range(min(sinks, length))) <= set(indices)
    assert set(range(max(0, length - recent), length)) <= set(indices)
    assert set(range((total - 1) * chunk_size, length)) <= set(indices)
    assert len(indices) <= sinks + recent + top_chunks * chunk_size
    assert len(indices) <= length
    assert list(kept.chunks) == sorted(set(kept.chunks))
    assert len(kept.chunks) <= top_chunks
    assert all(0 <= chunk < len(scores) for chunk in kept.chunks)
    for chunk in kept.chunks:
        assert set(range(chunk * chunk_size, min(length, (chunk + 1) * chunk_size))) <= set(indices)
    dropped = [c for c in range(len(scores)) if not set(range(c * chunk_size, (c + 1) * chunk_size)) & set(indices)]
    if dropped and kept.chunks:
        assert max(float(scores[c]) for c in dropped) <= min(float(scores[c]) for c in kept.chunks)


def random_settings(seed):
    rng = random.Random(seed)
    tree = TreeConfig(nodes=rng.randint(2, 40), depth=rng.randint(0, 8), beam=rng.randint(1, 6))
    cache = CacheConfig(
        chunk_size=rng.choice([1, 4, 32, 100]),
        top_chunks=rng.choice([0, 1, 4, 32]),
        retrieve_every=rng.choice([1, 4, 9]),
        sinks=rng.choice([0, 4, 20]),
        recent=rng.choice([None, 1, 17, 64, 1000]),
    )
    return rng, tree, cache, rng.choice([64, 100, 256, 333])


def first_that_fits(name, cache, tree, context):
    while True:
        try:
            return CachePolicy.plan(name, cache, tree, context), context
        except ValueError:
            context += 1


class Simulation:
    """The draft's cache over one generation: counts only, in the order of `decoding.decode`."""

    def __init__(self, policy, prompt, depth):
        self.policy, self.depth = policy, depth
        self.length, self.refreshes, self.steps_since = prompt, [], 0  # length: tokens without the root
        self.cached = prompt if policy.fits(prompt + 1) else self.kept()
        self.waiting = 1

    def kept(self):
        scores = torch.rand(-(-self.length // self.policy.chunk_size), generator=torch.Generator().manual_seed(1))
        return len(self.policy.select(scores if self.policy.top_chunks else None, self.length).indices)

    @property
    def dropped(self):
        return self.length + 1 - self.cached - self.waiting

    def step(self, number, accepted):
        """Refresh if due, grow a tree, accept `accepted` drafted tokens and the bonus; return the positions used."""
        if self.policy.due(self.length, self.cached, self.waiting, self.steps_since):
            self.cached, self.waiting, self.steps_since = self.kept(), 1, 0
            self.refreshes.append(number)
        self.steps_since += 1
        self.cached, self.waiting = self.cached + self.waiting, 0
        used = self.cached + self.depth + 1  # the tree's levels, the one that is never fed too
        fed = min(accepted, self.depth)
        self.cached, self.waiting = self.cached + fed, accepted + 1 - fed
        self.length += accepted + 1
        return used


@pytest.mark.parametrize("name", ["window", "retrieval", "auto"])
@pytest.mark.parametrize("seed", range(40))
def test_policy_never_exceeds_the_draft_context(seed, name):
    rng, tree, cache, context = random_settings(seed)
    policy, context = first_that_fits(name, cache, tree, context)
    run = Simulation(policy, rng.choice([1, 5, 50, context - 1, context, context + 1, 3000]), tree.depth)
    fixed = rng.choice([None, 0, tree.depth + 1])
    for number in range(400):
        fitted = run.dropped == 0 and policy.fits(run.length + 1)
        accepted = rng.randint(0, tree.depth + 1) if fixed is None else fixed
        assert run.step(number, accepted) <= policy.limit <= context
        if fitted:
            assert run.refreshes == []
            assert run.dropped == 0
    if run.refreshes and run.dropped > 0 and policy.top_chunks and len(run.refreshes) > 1:
        gaps = [after - before for before, after in zip(run.refreshes, run.refreshes[1:], strict=False)]
        assert set(gaps) == {cache.retrieve_every}  # neither more often, for want of room, nor later


@pytest.mark.parametrize("length", [1, 50, 100])
def test_auto_drops_nothing_that_fits(length):
    """Its limit is the whole draft_context: all but the room of one tree is filled before anything is dropped."""
    tree = TreeConfig(depth=4)
    policy = CachePolicy.plan("auto", CacheConfig(), tree, 128)
    assert policy.limit == 128
    assert policy.fits(length)
    assert policy.fits(128 - 6)
    assert not policy.fits(129 - 6)


def test_full_is_never_due_and_always_fits():
    policy = CachePolicy.plan("full", CacheConfig(), TreeConfig(), 1024)
    assert not policy.due(10**6, 10**6, 3, 99)
    assert policy.fits(10**6)


def test_budget_by_hand():
    # depth 4: a round adds up to 6; reach 12, and 4 rounds between two retrievals 24: 36 kept free
    config = CacheConfig(retrieve_every=4)
    policy = CachePolicy.plan("retrieval", config, TreeConfig(depth=4), 1024)
    assert (policy.sinks, policy.recent, policy.top_chunks) == (4, 256, (1024 - 4 - 36 - 256) // 32)
    assert policy.limit == 4 + 256 + 22 * 32 + 36
    wide = CachePolicy.plan("retrieval", config, TreeConfig(depth=4), 4096)  # 32 chunks leave the rest to recent tokens
    assert (wide.recent, wide.top_chunks, wide.limit) == (4096 - 4 - 36 - 1024, 32, 4096)
    window = CachePolicy.plan("window", CacheConfig(), TreeConfig(depth=4), 1024)
    assert (window.recent, window.top_chunks, window.limit) == (1024 - 4 - 128, 0, 1024)


def test_retrieval_waits_for_its_period():
    policy = CachePolicy.plan("retrieval", CacheConfig(retrieve_every=3), TreeConfig(), 256)
    due = [policy.due(1000, 150, 1, steps) for steps in range(5)]
    assert due == [False, False, False, True, True]


def test_nothing_is_retrieved_while_nothing_was_dropped():
    policy = CachePolicy.plan("retrieval", CacheConfig(), TreeConfig(), 256)
    assert not policy.due(100, 100, 1, 99)
    assert not policy.due(100, 98, 3, 99)


@pytest.mark.parametrize("name", ["window", "retrieval", "auto"])
def test_too_small_draft_context_says_what_to_do(name):
    with pytest.raises(ValueError, match=r"draft_context 20 has no room for 4 sinks.*lower depth.*raise draft_context"):
        CachePolicy.plan(name, CacheConfig(), TreeConfig(depth=8), 20)


@pytest.mark.parametrize("name", ["window", "retrieval", "auto"])
def test_smallest_draft_context(name):
    """From some size on it works, and below it is refused: no size in between misbehaves."""
    worked = []
    for context in range(16, 120):
        try:
            policy = CachePolicy.plan(name, CacheConfig(chunk_size=8), TreeConfig(depth=3), context)
        except ValueError:
            continue
        worked.append(context)
        run = Simulation(policy, 500, 3)
        assert all(run.step(number, 4) <= context for number in range(30))
    assert worked == list(range(worked[0], 120))
