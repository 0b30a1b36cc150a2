"""EAGLE heads as drafts: output unchanged, bounded, and in every state the trees of a draft that has just begun.

A wrong draft would still be lossless, only slow, so its trees and its cache are compared with fresh ones. What the
head computes is compared with a naive forward in test_eagle_head.py and with the official one in
test_eagle_conformance.py.
"""

import random
from functools import cache

import pytest
import torch
from conftest import FIXED, tiny_llama
from heads import EAGLE1, EAGLE3, couple, fitted, flat_config, head_tensors, prompt_of, save, tiny_target
from test_lossless import assert_same, own_tokens

import specx.target
from specx.acceptance import Walk
from specx.adapters.eagle import EagleDraft
from specx.adapters.eagle_head import EagleHead
from specx.config import CacheConfig
from specx.decoding import decode
from specx.generation import Generation
from specx.target import Target
from specx.tree import Plan

PLAN = Plan(12, 3, 3)
LENGTHS = (2500, 9, 200)
KINDS = pytest.mark.parametrize("kind", [EAGLE3, EAGLE1])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(family, kind): a target of that family with a fitted head, made once."""

    @cache
    def make(family, kind):
        target = tiny_target(family)
        return couple(target, fitted(target, tmp_path_factory.mktemp("head"), kind, LENGTHS))

    return make


@pytest.fixture(scope="module", params=[EAGLE3, EAGLE1])
def model(request, made):
    return made("Llama", request.param)


class Requests:
    """Drafts that follow a target along tokens of our choice."""

    def __init__(self, model, capacity=900, tokens=900):
        self.model, self.size = model, (capacity, 60, tokens)

    def prefilled(self, ids, keep=None, sinks=4):
        """A draft and its target that have seen nothing but these ids, the last of them as root."""
        target = Target(self.model.engine, 2000, taps=self.model.draft.taps)
        draft = self.model.draft.start(*self.size, CacheConfig(sinks=sinks))
        prompt = torch.tensor(ids[:-1])
        target.prefill(prompt, lambda chunk: draft.observe(prompt, chunk))
        draft.prefill(prompt, keep)
        draft.begin(ids[-1])
        return draft, target

    @staticmethod
    def step(draft, target, rng, plan=PLAN):
        """A round that accepts the path to any node and any bonus; the tokens that it emits."""
        tree = draft.propose(plan)
        step = target.verify(tree)
        path = tree.path(rng.randrange(len(tree)))
        emitted = [*tree.tokens[path[1:]].tolist(), rng.randrange(1, 64)]
        target.keep(path)
        draft.accept(Walk(tuple(path), tuple(emitted), len(path) - 1), step)
        return emitted


def assert_same_tree(found, expected, exact=False):
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert found.parents.tolist() == expected.parents.tolist()
    torch.testing.assert_close(
        found.scores, expected.scores, **({"atol": 0, "rtol": 0} if exact else {"atol": 1e-3, "rtol": 1e-3})
    )


@pytest.mark.parametrize("tokens", [0, 900], ids=["full", "stored"])
@pytest.mark.parametrize("seed", range(3))
def test_any_steps_leave_the_state_of_a_fresh_draft(model, tokens, seed):
    """Also after rounds without a draft, and with the features of accepted nodes in the place of the head's own."""
    rng, requests = random.Random(seed), Requests(model, tokens=tokens)
    ids = prompt_of(40 + seed).tolist()
    draft, target = requests.prefilled(ids)
    for _ in range(5):
        ids += requests.step(draft, target, rng)
        if rng.random() < 0.4:
            alone = specx.target.DraftTree.single(ids[-1])
            step = target.verify(alone)
            target.keep((0,))
            draft.accept(Walk((0,), (7,), 0), step)
            ids.append(7)
        assert draft.cached + draft.waiting == len(ids)
        assert_same_tree(draft.propose(PLAN), requests.prefilled(ids)[0].propose(PLAN))
        assert (draft.cached, draft.waiting) == (len(ids) - 1, 1)
        step = target.verify(specx.target.DraftTree.single(ids[-1]))
        target.keep((0,))
        draft.accept(Walk((0,), (9,), 0), step)
        ids.append(9)


def test_the_features_of_accepted_nodes_matter(model, monkeypatch):
    requests, rng = Requests(model), random.Random(0)
    ids = prompt_of(40).tolist()
    draft, target = requests.prefilled(ids)
    states = model.draft.states
    monkeypatch.setattr(model.draft, "states", lambda *args: states(*args) * 0.5)
    ids += requests.step(draft, target, rng)
    found = draft.propose(PLAN)
    monkeypatch.undo()
    with pytest.raises(AssertionError):
        assert_same_tree(found, requests.prefilled(ids)[0].propose(PLAN))


@pytest.mark.parametrize("chunk", [1, 7, 32, 100])
def test_prompts_of_several_chunks(model, chunk, monkeypatch):
    """The last entry of a chunk waits for the first token of the next one."""
    whole, _ = Requests(model).prefilled(prompt_of(65).tolist())
    monkeypatch.setattr(specx.target, "PREFILL_CHUNK", chunk)
    parts, _ = Requests(model).prefilled(prompt_of(65).tolist())
    for mine, theirs in zip(parts.cache.rows(0, 63), whole.cache.rows(0, 63), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    assert_same_tree(parts.propose(PLAN), whole.propose(PLAN))


@pytest.mark.parametrize("seed", range(3))
def test_all_chunks_kept_equals_full_bit_for_bit(model, seed):
    ids, drafts = prompt_of(150).tolist(), []
    for requests, keeps in ((Requests(model, tokens=0), False), (Requests(model), True)):
        rng, tokens = random.Random(seed), list(ids)
        draft, target = requests.prefilled(tokens)
        for _ in range(4):
            tokens += requests.step(draft, target, rng)
            if keeps:
                few = torch.tensor(sorted(rng.sample(range(len(tokens) - 1), 20)))
                draft.refresh(few)
                assert draft.cached <= 20
                draft.refresh(torch.arange(len(tokens) - 1))
            else:
                rng.sample(range(len(tokens) - 1), 20)
        drafts.append((draft, tokens))
    (full, tokens), (gathered, same) = drafts
    assert tokens == same
    assert_same_tree(gathered.propose(PLAN), full.propose(PLAN), exact=True)
    rows = full.cached
    assert gathered.cached == rows == len(tokens) - 1
    for mine, theirs in zip(gathered.cache.rows(0, rows)[0], full.cache.rows(0, rows)[0], strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("seed", range(3))
def test_kept_entries_lie_at_contiguous_positions(model, seed):
    """Keys of kept entries are those of the full cache, moved; values are the same; the prefill keeps them likewise."""
    rng, ids = random.Random(seed), prompt_of(150).tolist()
    keep = torch.tensor(sorted({*rng.sample(range(149), 30), 148}))
    full, _ = Requests(model).prefilled(ids)
    draft, _ = Requests(model).prefilled(ids)
    draft.refresh(keep)
    early, _ = Requests(model).prefilled(ids, keep)
    ((keys, values),) = full.cache.rows(0, 148)
    computed = keep[keep < 148]  # the newest entry waits for the root
    moved = model.draft.head.rotation.move(keys[:, :, :, computed], torch.arange(len(computed)) - computed)
    for found in (draft, early):
        assert found.cached == len(computed)
        ((mine, own),) = found.cache.rows(0, len(computed))
        torch.testing.assert_close(mine, moved, atol=1e-4, rtol=1e-4)
        assert torch.equal(own, values[:, :, :, computed])
    assert_same_tree(draft.propose(PLAN), early.propose(PLAN), exact=True)


@KINDS
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Mixtral"])
def test_output_is_unchanged(made, monkeypatch, family, kind):
    """Prompts far beyond the draft's range, each followed by a shorter one, under every policy."""
    pair, forward, reached = made(family, kind), EagleHead.forward, []

    def watched(head, ids, states, cache, call):
        reached.append(int(call.positions.max()))
        return forward(head, ids, states, cache, call)

    monkeypatch.setattr(EagleHead, "forward", watched)
    for length in LENGTHS:
        own = own_tokens(pair.target, prompt_of(length), 48)
        assert len(set(own)) > 5
        for policy in ("full", "window", "retrieval", "auto") if family == "Llama" else ("full", "auto"):
            reached.clear()
            out = pair.generate(
                prompt_of(length), max_new_tokens=48, policy=policy, chunk_size=8, draft_context=96, trace=True
            )
            assert_same(pair.target, prompt_of(length), out.tokens, own)
            assert out.stats["tau"] > 1.3
            assert out.stats["refill"] == "gather"
            assert policy == "full" or max(reached) < 96
            assert (out.draft_kv_tokens > 96) == (policy == "full" and length > 96)
            kept = [step["kept_chunks"] for step in out.trace if step["kept_chunks"]]
            assert bool(kept) == (policy in ("retrieval", "auto") and length > 96)


def test_a_default_prompt_beyond_the_heads_positions(made):
    """2500 tokens, of which the head's config claims 2048."""
    pair = made("Llama", EAGLE3)
    assert (pair.draft.draft_context, pair.draft.context_source) == (2048, "its config's max_position_embeddings")
    out = pair.generate(prompt_of(2500), max_new_tokens=48)
    assert_same(pair.target, prompt_of(2500), out.tokens, own_tokens(pair.target, prompt_of(2500), 48))
    assert out.stats["tau"] > 1.3
    assert out.draft_kv_tokens < 2048


@KINDS
def test_a_long_answer_to_a_short_prompt(made, kind):
    pair, ids = made("Llama", kind), prompt_of(9)
    options = {"draft_context": 96, "chunk_size": 8, "retrieve_every": 2, "depth": 2}
    out = pair.generate(ids, max_new_tokens=300, policy="auto", trace=True, **options)
    assert_same(pair.target, ids, out.tokens, own_tokens(pair.target, ids, 300))
    refreshed = [step["kept_chunks"] is not None for step in out.trace]
    emitted = sum(len(step["path"]) for step in out.trace[: refreshed.index(True)])
    assert 60 < emitted < 96, "full while it fits"
    assert sum(refreshed) > 10
    assert out.draft_kv_tokens <= 96


def test_a_short_prompt_is_served_as_by_full(made):
    pair = made("Llama", EAGLE3)
    traces = [
        pair.generate(prompt_of(200), max_new_tokens=40, policy=policy, draft_context=context, trace=True).trace
        for policy, context in (("full", 512), ("auto", 512), ("window", 512), ("full", 2048))
    ]
    assert traces[0] == traces[1] == traces[2] == traces[3]


def test_random_heads_on_a_target_without_room_to_spare(tmp_path):
    """Nothing is accepted, prompts of one and two tokens, one new token."""
    target = tiny_target()
    pair = couple(target, save(tmp_path, flat_config(), head_tensors()))
    for length, new in ((1, 20), (2, 20), (5, 1), (5, 2)):
        out = pair.generate(prompt_of(length), max_new_tokens=new)
        assert out.tokens == own_tokens(target, prompt_of(length), new)


def test_recompute_is_not_possible(made):
    pair = made("Llama", EAGLE3)
    out = pair.generate(prompt_of(200), max_new_tokens=8, draft_context=96, refill="recompute")
    assert out.notes == ["refill recompute became gather: what this draft computes its keys from is not kept"]
    assert pair.generate(prompt_of(9), max_new_tokens=8, refill="recompute").notes == []


@pytest.mark.parametrize("store", ["host", "device"])
def test_the_store_makes_no_difference(made, store):
    pair = made("Llama", EAGLE3)
    out = pair.generate(prompt_of(200), max_new_tokens=30, draft_context=96, chunk_size=8, store=store, trace=True)
    assert (
        out.trace == pair.generate(prompt_of(200), max_new_tokens=30, draft_context=96, chunk_size=8, trace=True).trace
    )


class TestSharedTargets:
    """Several runs after one prefill, as measurements make them."""

    def run(self, pair, ids, target):
        out = Generation(len(ids), trace=[])
        settings = FIXED.override(max_new_tokens=30, draft_context=96, chunk_size=8)
        for _ in decode(pair.engine, pair.draft, ids, settings, out, lambda _: False, target=target):
            pass
        return out

    @pytest.mark.parametrize("record", [True, False])
    def test_every_run_is_like_the_first(self, made, monkeypatch, record):
        pair, ids = made("Llama", EAGLE3), prompt_of(200)
        monkeypatch.setattr(specx.target, "PREFILL_CHUNK", 64)
        forward, forwards = pair.engine.forward, []
        monkeypatch.setattr(
            pair.engine, "forward", lambda tokens, *a, **k: forwards.append(len(tokens)) or forward(tokens, *a, **k)
        )
        target = Target(pair.engine, 300, pair.engine.score_layer(), pair.draft.taps, record=record)
        first = self.run(pair, ids, target)
        assert forwards.count(64) == 3
        for _ in range(2):
            again = self.run(pair, ids, target)
            assert again.trace == first.trace
            assert again.tokens == first.tokens
        assert forwards.count(64) == (3 if record else 9)
        other = prompt_of(150)
        assert self.run(pair, other, target).tokens == own_tokens(pair.target, other, 30)

    def test_a_target_without_the_taps_is_refused(self, made):
        pair, ids = made("Llama", EAGLE3), prompt_of(20)
        with pytest.raises(ValueError, match=r"the draft reads layers \(1, 3, 4\) of the target"):
            self.run(pair, ids, Target(pair.engine, 300, taps=(1, 3)))


def test_a_draft_that_keeps_all_refuses_to_drop(model):
    draft, _ = Requests(model, tokens=0).prefilled(prompt_of(20).tolist())
    with pytest.raises(ValueError, match="none can be dropped"):
        draft.refresh(torch.arange(5))
    assert isinstance(draft, EagleDraft)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    target, folder = tiny_target(), tmp_path_factory.mktemp("deep")
    return couple(target, fitted(target, folder, EAGLE3, (300, 9), layers=2))


class TestDeepHeads:
    """Of several layers, keys depend on attention: a long prompt is prefilled through a window."""

    @pytest.mark.parametrize("policy", ["full", "window", "retrieval", "auto"])
    def test_output_is_unchanged(self, deep, policy, monkeypatch):
        monkeypatch.setattr(specx.target, "PREFILL_CHUNK", 70)
        forward, reached = EagleHead.forward, []

        def watched(head, ids, states, cache, call):
            reached.append(int(call.positions.max()))
            return forward(head, ids, states, cache, call)

        monkeypatch.setattr(EagleHead, "forward", watched)
        for length in (300, 9):
            reached.clear()
            out = deep.generate(prompt_of(length), max_new_tokens=48, policy=policy, draft_context=96, chunk_size=8)
            assert_same(deep.target, prompt_of(length), out.tokens, own_tokens(deep.target, prompt_of(length), 48))
            assert out.stats["tau"] > 1.3
            assert (max(reached) < 96) == (policy != "full" or length < 96)

    def test_a_prompt_that_fits_is_served_as_by_full(self, deep, monkeypatch):
        monkeypatch.setattr(specx.target, "PREFILL_CHUNK", 32)
        traces = [
            deep.generate(prompt_of(90), max_new_tokens=100, policy=policy, draft_context=128, trace=True).trace
            for policy in ("full", "auto")
        ]
        assert traces[0][:8] == traces[1][:8]

    @pytest.mark.parametrize("seed", range(2))
    def test_any_steps_leave_the_state_of_a_fresh_draft(self, deep, seed):
        rng, requests, ids = random.Random(seed), Requests(deep), prompt_of(40 + seed).tolist()
        draft, target = requests.prefilled(ids)
        for _ in range(4):
            ids += requests.step(draft, target, rng)
        draft.refresh(torch.arange(20))
        draft.refresh(torch.arange(len(ids) - 1))
        assert_same_tree(draft.propose(PLAN), requests.prefilled(ids)[0].propose(PLAN))

    def test_windows_hold_the_sinks_and_the_piece_before(self, deep, monkeypatch):
        ids, forward, seen = prompt_of(101).tolist(), EagleHead.forward, []

        def watched(head, ids, states, cache, call):
            ((_, values),) = cache.rows(0, cache.committed)
            seen.append((values[0].clone(), len(ids)))
            return forward(head, ids, states, cache, call)

        monkeypatch.setattr(EagleHead, "forward", watched)
        draft, target = Requests(deep, capacity=40).prefilled(ids, torch.arange(60, 100))
        assert [count for _, count in seen] == [20, 20, 20, 20, 19]
        _, values = deep.draft.head.project(
            torch.tensor(ids)[1:100], deep.draft.states(deep.draft.features(target.prefill(torch.tensor(ids[:99]))))
        )
        for (found, _), first in zip(seen, (0, 20, 40, 60, 80), strict=True):
            past = [*range(4), *range(first - 16, first)] if first else []
            torch.testing.assert_close(found, values[0, :, :, past], atol=1e-4, rtol=1e-4)
        assert (draft.cached, draft.store.length) == (39, 99)


def test_nothing_of_the_features_is_kept(made, monkeypatch):
    """While the target prefills, the draft holds one row of features and no keys beyond its store."""
    pair, sizes = made("Llama", EAGLE3), []
    monkeypatch.setattr(specx.target, "PREFILL_CHUNK", 64)
    observe = EagleDraft.observe

    def watched(draft, ids, chunk):
        observe(draft, ids, chunk)
        sizes.append((len(draft._states), draft.cached))

    monkeypatch.setattr(EagleDraft, "observe", watched)
    pair.generate(prompt_of(300), max_new_tokens=4, draft_context=96)
    assert sizes == [(1, 0)] * 5


def test_a_target_of_another_shape_is_refused(tmp_path):
    folder = save(tmp_path, flat_config(), head_tensors())
    with pytest.raises(ValueError, match="made for a target of hidden size 48; this target's is 64"):
        couple(tiny_llama(num_hidden_layers=8), folder)
    with pytest.raises(ValueError, match="reads 3 layers, but in this target of 3 layers"):
        couple(tiny_target(num_hidden_layers=3), folder)
