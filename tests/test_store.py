"""What a gathering draft dropped comes back as it was computed, at its new position; and the dense paths of ablation.

The draft would stay lossless whatever its cache held, only slower, so its rows are compared here: layer 0 with a fresh
forward of the tokens that should lie there, deeper layers with what was computed when they were first fed.
"""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import FIXED, noised, pair, tiny_llama
from test_lossless import assert_same, family, own_tokens

import specx.adapters.classic
import specx.hf_attention
import specx.target
from specx.acceptance import Walk
from specx.adapters.classic import ClassicDraft, ClassicModel
from specx.api import SpeculativeModel
from specx.cache import TreeCache
from specx.config import CacheConfig
from specx.hf import HFModel
from specx.hf_attention import Call
from specx.retrieval import select
from specx.rotary import Rotation, find_rotation
from specx.store import KeyValueStore
from specx.tree import Plan

PLAN = Plan(12, 3, 3)
TREE_ROWS = 9
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def engine(tiny):
    return HFModel(tiny)


@pytest.fixture(scope="module")
def rotation(engine):
    found = find_rotation(engine, 512)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def adapter(tiny):
    return pair(tiny, noised(tiny, 0.02)).draft


def fed(model: HFModel, ids: torch.Tensor, cache: TreeCache | None = None) -> TreeCache:
    """A cache behind which these tokens were committed, in one forward."""
    cache = cache or model.new_cache(len(ids))
    model.forward(ids, torch.arange(cache.committed, cache.committed + len(ids)), cache, keep_logits=1)
    cache.commit(range(len(ids)))
    return cache


def content(cache: TreeCache, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies of the committed keys and values from row `first` on, [layers, 1, G, rows, D]."""
    ((keys, values),) = cache.rows(first, cache.committed)
    return keys.clone(), values.clone()


def assert_rows_are(model: HFModel, cache: TreeCache, ids: torch.Tensor) -> None:
    """The cache holds these tokens at positions 0, 1, ...; layer 0 depends on nothing else."""
    assert cache.committed == len(ids)
    for found, own in zip(content(cache), content(fed(model, ids)), strict=True):
        torch.testing.assert_close(found[0], own[0], **CLOSE)


def stored(model: HFModel, rotation: Rotation, ids: torch.Tensor, capacity: int = 0, place: Any = "auto") -> Any:
    """A store of these tokens, and the cache that they were computed in."""
    store, cache = KeyValueStore(capacity or len(ids), rotation, place), fed(model, ids)
    store.append(cache, len(ids))
    return store, cache


def gathered(model: HFModel, store: KeyValueStore, indices: list[int]) -> TreeCache:
    """A cache that held one token, dropped it, and now holds the stored tokens at `indices`."""
    cache = fed(model, torch.tensor([5]))
    cache.truncate(0)
    store.gather(torch.tensor(indices, dtype=torch.long), cache)
    return cache


@pytest.mark.parametrize("place", ["host", "device"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_all_tokens_come_back_bit_for_bit(dtype, place, prompt_of):
    model = HFModel(tiny_llama(num_hidden_layers=2).to(dtype))
    rotation = find_rotation(model, 64)
    assert rotation is not None
    store, cache = stored(model, rotation, prompt_of(40), 50, place)
    found = gathered(model, store, list(range(40)))
    for mine, own in zip(content(found), content(cache), strict=True):
        assert mine.dtype == dtype
        assert mine.equal(own)


@pytest.mark.parametrize("indices", [[0, 1, 2], [39], [7, 8, 9, 30], list(range(0, 40, 3)), [39, 0, 12, 12]], ids=str)
def test_some_tokens_lie_at_contiguous_positions(engine, rotation, indices, prompt_of):
    ids = prompt_of(40)
    store, cache = stored(engine, rotation, ids)
    found = gathered(engine, store, indices)
    assert_rows_are(engine, found, ids[indices])
    keys, values = content(cache)
    assert content(found)[1].equal(values[:, :, :, indices]), "values have no position"
    delta = torch.arange(len(indices)) - torch.tensor(indices)
    torch.testing.assert_close(content(found)[0], rotation.move(keys[:, :, :, indices], delta), **CLOSE)


def test_tokens_are_gathered_behind_what_is_there(engine, rotation, prompt_of):
    ids = prompt_of(40)
    store, _ = stored(engine, rotation, ids)
    cache = gathered(engine, store, [0, 1])
    before = content(cache)
    store.gather(torch.tensor([20, 30, 31]), cache)
    assert_rows_are(engine, cache, ids[[0, 1, 20, 30, 31]])
    assert all(new[:, :, :, :2].equal(old) for new, old in zip(content(cache), before, strict=True))


def test_a_cache_that_is_too_small_grows(engine, rotation, prompt_of):
    ids = prompt_of(40)
    store, _ = stored(engine, rotation, ids)
    cache = gathered(engine, store, [3])
    assert cache.capacity == 1
    store.gather(torch.arange(4, 40), cache)
    assert_rows_are(engine, cache, ids[3:])


def test_nothing_is_gathered_by_no_index_or_from_nothing(engine, rotation, prompt_of):
    store, cache = stored(engine, rotation, prompt_of(9))
    before, none = content(cache), torch.empty(0, dtype=torch.long)
    store.gather(none, cache)
    empty = KeyValueStore(4, rotation)
    empty.gather(none, cache)
    empty.append(cache, 0)
    assert empty.nbytes() == 0
    store.append(cache, 0)
    assert (cache.committed, store.length) == (9, 9)
    assert all(new.equal(old) for new, old in zip(content(cache), before, strict=True))


@pytest.mark.parametrize("place", ["auto", "host", "device"])
def test_memory_is_allocated_once_and_exactly(engine, rotation, place, prompt_of):
    store, cache = KeyValueStore(12, rotation, place), fed(engine, prompt_of(5))
    assert store.nbytes() == 0
    for rows in (5, 4, 3):
        if store.length:
            fed(engine, prompt_of(rows), cache)
        store.append(cache, rows)
        assert store.nbytes() == 12 * cache.nbytes() // cache.capacity
    assert store.length == store.capacity == 12
    both = zip(content(gathered(engine, store, [*range(12)])), content(cache), strict=True)
    assert all(new.equal(old) for new, old in both)
    with pytest.raises(ValueError, match="cannot store 1 more tokens: 12 of 12 places are taken"):
        store.append(cache, 1)


@pytest.mark.parametrize(("free", "found"), [(8 * 2 * 100 * 6, "cuda:1"), (8 * 2 * 100 * 6 - 1, "cpu")])
def test_auto_takes_a_device_with_enough_free_memory(rotation, monkeypatch, free, found):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**12))
    three_rows = SimpleNamespace(device=torch.device("cuda:1"), nbytes=18, shape=(1, 1, 1, 3, 3))
    places = [
        KeyValueStore(100, rotation, place)._device(three_rows, three_rows) for place in ("auto", "host", "device")
    ]
    assert places == [torch.device(found), torch.device("cpu"), torch.device("cuda:1")]


def test_appended_in_pieces_and_from_a_tree(engine, rotation, prompt_of):
    """Prompt, then tree rows of which a path that is not the first rows is kept, then rows of a rebuilt cache."""
    ids, tree = prompt_of(20), torch.tensor([1, 2, 3, 4])
    store, cache = stored(engine, rotation, ids, 40)
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], dtype=torch.bool)
    at = torch.tensor([20, 21, 21, 22])
    engine.forward(tree, at, cache, mask=mask, tail_positions=at)
    cache.commit([0, 2, 3])
    store.append(cache, 3)
    cache.truncate(0)
    store.gather(torch.tensor([0, 1, 21, 22]), cache)
    fed(engine, prompt_of(6), cache)
    store.append(cache, 6)
    assert store.length == 29
    text = torch.cat([ids, tree[[0, 2, 3]], prompt_of(6)])
    assert_rows_are(engine, gathered(engine, store, [*range(29)]), text)
    assert_rows_are(engine, gathered(engine, store, [2, 19, 20, 21, 22, 23, 28]), text[[2, 19, 20, 21, 22, 23, 28]])


# The classic draft.


def started(
    adapter: ClassicModel, capacity: int, refill: Any = "gather", sinks: int = 4, tokens: int = 1000
) -> ClassicDraft:
    draft = adapter.start(capacity, TREE_ROWS, tokens, CacheConfig(refill=refill, sinks=sinks))
    assert draft.refill == refill
    return draft


@pytest.fixture
def watched(adapter, monkeypatch):
    """The ids and positions of every forward of the draft."""
    seen: list[tuple[list[int], list[int]]] = []
    forward = adapter.model.forward

    def watch(ids, positions, *rest, **options):
        seen.append((ids.tolist(), positions.tolist()))
        return forward(ids, positions, *rest, **options)

    monkeypatch.setattr(adapter.model, "forward", watch)
    return seen


@pytest.mark.parametrize("sinks", [0, 4, 50])
@pytest.mark.parametrize("capacity", [40, 41])
@pytest.mark.parametrize("length", [1, 2, 3, 19, 20, 21, 39, 40, 41, 42, 59, 60, 61, 100, 133])
def test_a_windowed_prefill_of_any_length_stays_in_its_window(adapter, watched, length, capacity, sinks, prompt_of):
    draft, ids = started(adapter, capacity, sinks=sinks), prompt_of(length)
    keep = select(None, length, 3, 20, 0, 8).indices
    watched.clear()  # the search for the rotation
    draft.prefill(ids, keep)
    assert [token for fed, _ in watched for token in fed] == ids.tolist(), "every token is computed once"
    assert max(max(at) for _, at in watched) < capacity
    assert draft.cache.capacity == capacity + TREE_ROWS
    assert_rows_are(adapter.model, draft.cache, ids[keep])
    draft.begin(9)
    assert (draft.cached, draft.waiting) == (len(keep), 1)
    watched.clear()
    draft.propose(PLAN)
    assert watched[0] == ([9], [len(keep)])


@pytest.mark.parametrize("length", [20, 41, 100, 133])
def test_each_chunk_of_a_windowed_prefill_sees_the_chunk_before(adapter, length, prompt_of):
    """Without sinks distances are those of the text: one forward with a banded mask over all of it does the same."""
    draft, ids, at = started(adapter, 40, sinks=0), prompt_of(length), torch.arange(length)
    draft.prefill(ids, at)  # all of it: more than would be kept, to look at
    chunk = at // 20
    mask = (at[:, None] >= at) & (chunk[:, None] - chunk <= 1)
    cache = adapter.model.new_cache(length)
    adapter.model.forward(ids, at, cache, mask=mask, tail_positions=at)
    cache.commit(range(length))
    for found, own in zip(content(draft.cache), content(cache), strict=True):
        torch.testing.assert_close(found, own, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("sinks", "seen"), [(4, 4), (50, 10)])
def test_each_chunk_of_a_windowed_prefill_sees_the_sinks(adapter, sinks, seen, prompt_of):
    """The last chunk is that of a forward behind the sinks and the rest of the chunk before, as these were stored."""
    draft, ids, at = started(adapter, 40, sinks=sinks), prompt_of(100), torch.arange(100)
    draft.prefill(ids, at)
    keys, values = content(draft.cache)
    past = torch.tensor([*range(seen), *range(60 + seen, 80)])
    assert adapter.rotation(40) is not None
    cache = fed(adapter.model, ids[past])
    ((to_keys, to_values),) = cache.rows(0, 20)
    to_keys.copy_(adapter.rotation(40).move(keys[:, :, :, past], torch.arange(20) - past))
    to_values.copy_(values[:, :, :, past])
    fed(adapter.model, ids[80:], cache)
    torch.testing.assert_close(content(cache, 20)[1], values[:, :, :, 80:], atol=1e-3, rtol=1e-3)


def marked(draft: ClassicDraft, rows: int) -> None:
    """Make the first rows recognisable: whoever writes them again removes the mark."""
    ((keys, values),) = draft.cache.rows(0, rows)
    keys.fill_(123.0)
    values.fill_(321.0)


def marks(draft: ClassicDraft) -> int:
    keys, values = content(draft.cache)
    both = (keys == 123.0).flatten(0, 2).all(-1).all(0) & (values == 321.0).flatten(0, 2).all(-1).all(0)
    return int(both.sum())


@pytest.mark.parametrize("refill", ["gather", "recompute"])
def test_a_refresh_writes_from_the_first_difference_on(adapter, watched, refill, prompt_of):
    draft, ids = started(adapter, 80, refill), prompt_of(150)
    draft.prefill(ids, torch.tensor([*range(10), *range(120, 150)]))
    draft.begin(7)
    draft.accept(Walk((0,), (8,), 0))
    for keep, same in [
        ([*range(10), *range(120, 150)], 40),
        ([*range(10), *range(120, 140)], 30),
        ([*range(10), *range(120, 130), 135, *range(141, 150)], 20),
        ([*range(9), 33, *range(120, 150)], 9),
        ([1, *range(120, 150)], 0),
        ([1, *range(120, 150)], 31),
    ]:
        before = draft.waiting
        marked(draft, draft.cached)
        watched.clear()
        draft.refresh(torch.tensor(keep))
        assert marks(draft) == same
        # The root and the bonus token were not fed: gathering leaves that to the next tree.
        if refill == "gather":
            assert watched == []
            assert (draft.cached, draft.waiting) == (len(keep), before)
        else:
            assert [at for _, at in watched] == ([[*range(same, len(keep))]] if same < len(keep) else [])
        if same == 0:
            assert_rows_are(adapter.model, draft.cache, ids[keep])


@pytest.mark.parametrize("refill", ["gather", "recompute"])
def test_a_refresh_that_changes_nothing_costs_nothing(adapter, watched, refill, prompt_of):
    draft, ids = started(adapter, 80, refill), prompt_of(150)
    keep = torch.tensor([*range(4), *range(100, 150)])
    draft.prefill(ids, keep)
    draft.begin(7)
    rows = draft.cache.rows(0, 54)[0][0].data_ptr()
    marked(draft, 54)
    watched.clear()
    for _ in range(3):
        draft.refresh(keep)
    assert (watched, marks(draft), draft.cached, draft.waiting) == ([], 54, 54, 1)
    assert draft.cache.rows(0, 54)[0][0].data_ptr() == rows
    draft.propose(PLAN)
    draft.accept(Walk((0,), (8,), 0))
    marked(draft, 55)
    watched.clear()
    draft.refresh(torch.tensor([*keep, 150]))
    assert (watched, marks(draft), draft.cached, draft.waiting) == ([], 55, 55, 1), "what was fed since is there too"


def test_the_last_window_of_a_prefill_is_not_gathered_again(adapter, prompt_of, monkeypatch):
    draft, ids, gather, sizes = started(adapter, 40), prompt_of(100), KeyValueStore.gather, []

    def watch(store, indices, cache):
        sizes.append(len(indices))
        gather(store, indices, cache)

    monkeypatch.setattr(KeyValueStore, "gather", watch)
    keep = torch.tensor([*range(4), *range(64, 98)])
    draft.prefill(ids, keep)
    assert sizes == [0, 20, 20, 20, 20, 0]
    assert_rows_are(adapter.model, draft.cache, ids[keep])


@pytest.mark.parametrize("seed", range(3))
def test_recompute_equals_a_fresh_draft_after_any_refreshes(adapter, seed, prompt_of):
    """Also where only the rows behind the first difference were computed again."""
    rng, tokens = random.Random(seed), prompt_of(60).tolist()
    draft = started(adapter, 80, "recompute")
    draft.prefill(torch.tensor(tokens), torch.arange(20, 60))
    draft.begin(3)
    tokens.append(3)
    for _ in range(6):
        tree = draft.propose(PLAN)
        path = tree.path(rng.randrange(len(tree)))
        emitted = (*tree.tokens[path[1:]].tolist(), rng.randrange(64))
        draft.accept(Walk(tuple(path), emitted, len(path) - 1))
        tokens += emitted
        keep = kept(rng, len(tokens) - 1, 40)
        draft.refresh(torch.tensor(keep))
        assert (draft.cached, draft.waiting) == (len(keep), 1)
        alone = fed(adapter.model, torch.tensor([tokens[i] for i in keep]))
        for found, own in zip(content(draft.cache), content(alone), strict=True):
            torch.testing.assert_close(found, own, atol=1e-3, rtol=1e-3)
    logits = adapter.model.forward(torch.tensor([tokens[-1]]), torch.tensor([len(keep)]), alone).logits[0]
    likely = torch.log_softmax(logits, -1).topk(3)
    tree = draft.propose(Plan(4, 0, 3))
    assert sorted(tree.tokens[1:].tolist()) == sorted(likely.indices.tolist())
    torch.testing.assert_close(tree.scores[1:].sort().values, likely.values.sort().values, atol=1e-3, rtol=1e-3)


def test_accepted_tokens_that_were_never_fed_wait_through_a_gather(adapter, watched, prompt_of):
    draft, ids = started(adapter, 80), prompt_of(150)
    draft.prefill(ids, torch.arange(100, 150))
    draft.begin(7)
    tree = draft.propose(Plan(30, 3, 3))
    path = tree.path(int(tree.depths.argmax()))
    assert len(path) == 5, "the last level is drafted, not fed"
    draft.accept(Walk(tuple(path), (*tree.tokens[path[1:]].tolist(), 8), 4))
    assert draft.waiting == 2
    text = torch.cat([ids, torch.tensor([7]), tree.tokens[path[1:]]])  # and the root 8
    keep = torch.tensor([0, 1, *range(120, 155)])
    draft.refresh(keep)
    assert (draft.cached, draft.waiting) == (len(keep) - 1, 2)
    assert_rows_are(adapter.model, draft.cache, text[keep[:-1]])
    watched.clear()
    draft.propose(PLAN)
    assert watched[0] == ([int(text[154]), 8], [36, 37])
    assert_rows_are(adapter.model, draft.cache, torch.cat([text[keep], torch.tensor([8])]))


def kept(rng: random.Random, length: int, most: int) -> list[int]:
    """Some old tokens and all of the newest, as `CachePolicy.select` keeps them."""
    recent = min(length, rng.randint(12, 20))
    older = sorted(rng.sample(range(length - recent), min(length - recent, rng.randint(0, most - recent))))
    return [*older, *range(length - recent, length)]


class Ledger:
    """What a draft's cache must hold, kept as plain lists."""

    def __init__(self, adapter: ClassicModel, draft: ClassicDraft, ids: torch.Tensor, keep: list[int] | None) -> None:
        self.model, self.draft, self.tokens = adapter.model, draft, ids.tolist()
        draft.prefill(ids, None if keep is None else torch.tensor(keep))
        self.held, self.fed = list(range(len(ids))) if keep is None else keep, len(ids)
        self.values = dict(zip(self.held, content(draft.cache)[1].unbind(3), strict=True))
        draft.begin(3)
        self.tokens.append(3)
        self.check()

    def took(self, count: int) -> None:
        """So many more tokens lie in the cache, computed just now."""
        new = range(self.fed, self.fed + count)
        self.values |= dict(zip(new, content(self.draft.cache, len(self.held))[1].unbind(3), strict=True))
        self.held, self.fed = [*self.held, *new], self.fed + count

    def step(self, rng: random.Random) -> int:
        """Propose, accept any path, and any token behind it; return how many of the path were kept."""
        tree = self.draft.propose(PLAN)
        self.took(len(self.tokens) - self.fed)
        self.check()
        path, before = tree.path(rng.randrange(len(tree))), self.draft.cached
        emitted = (*tree.tokens[path[1:]].tolist(), rng.randrange(64))
        self.draft.accept(Walk(tuple(path), emitted, len(path) - 1))
        self.tokens += emitted
        self.took(self.draft.cached - before)
        self.check()
        return self.draft.cached - before

    def skip(self, rng: random.Random) -> None:
        """A round without a draft."""
        self.draft.accept(Walk((0,), (rng.randrange(64),), 0))
        self.tokens.append(int(self.draft._ids.all()[-1]))
        self.check()

    def refresh(self, keep: list[int]) -> None:
        self.draft.refresh(torch.tensor(keep))
        if self.draft.store is None:
            self.held, self.fed = keep, len(self.tokens) - 1
            self.values = dict(zip(keep, content(self.draft.cache)[1].unbind(3), strict=True))
        else:
            self.held = [each for each in keep if each < self.fed]
            assert self.draft.store.length == self.fed
        self.check()

    def check(self) -> None:
        assert self.draft.cached == len(self.held)
        assert self.draft.waiting == len(self.tokens) - self.fed
        assert_rows_are(self.model, self.draft.cache, torch.tensor(self.tokens)[self.held])
        for value, token in zip(content(self.draft.cache)[1].unbind(3), self.held, strict=True):
            if token in self.values:
                assert value.equal(self.values[token]), "computed once, the same ever after"
            self.values[token] = value


@pytest.mark.parametrize("start", ["full", "kept"])
@pytest.mark.parametrize("refill", ["gather", "recompute"])
def test_fifty_random_rounds(adapter, watched, refill, start, prompt_of):
    """Started with all of a short prompt, or with a part of a long one, in a cache that soon is too small."""
    rng, capacity, room = random.Random(0), 80, 2 * (PLAN.depth + 2)
    draft = started(adapter, capacity, refill, tokens=600)
    length = 30 if start == "full" else 170
    ledger = Ledger(adapter, draft, prompt_of(length), None if start == "full" else kept(rng, length, 50))
    adopted = refreshed = 0
    for _ in range(50):
        if rng.random() < 0.4 or draft.cached + draft.waiting + room > capacity:
            ledger.refresh(kept(rng, len(ledger.tokens) - 1, 50))
            refreshed += 1
        if rng.random() < 0.2:
            ledger.skip(rng)
        adopted += ledger.step(rng)
    assert adopted > 20
    assert refreshed > 15
    assert draft.cache.capacity == capacity + TREE_ROWS, "a bounded draft"
    assert max(max(at) for _, at in watched) < 200  # the fresh forwards of this test are among them


@pytest.mark.parametrize("store", ["host", "device"])
def test_a_switch_in_mid_generation(tiny, prompt_of, store, monkeypatch):
    """Full while it fits, then gathered from a store that starts with what the full cache held."""
    model, refresh, waited = pair(tiny, noised(tiny, 0.01), draft_context=96), ClassicDraft.refresh, []

    def checked(draft: ClassicDraft, keep: torch.Tensor) -> None:
        waited.append(draft.waiting)
        refresh(draft, keep)
        assert draft.store is not None
        assert draft.store.place == store
        assert draft.cached + draft.waiting == len(keep) + 1
        assert_rows_are(draft.model, draft.cache, draft._ids.all()[keep[: draft.cached]])

    monkeypatch.setattr(ClassicDraft, "refresh", checked)
    options = {"policy": "auto", "refill": "gather", "store": store, "chunk_size": 8, "retrieve_every": 3, "recent": 48}
    out = model.generate(prompt_of(20), max_new_tokens=120, trace=True, **options)
    assert_same(tiny, prompt_of(20), out.tokens, own_tokens(tiny, prompt_of(20), 120))
    assert out.stats["refill"] == "gather"
    assert out.trace[0]["kept_chunks"] is None
    assert len(waited) > 5
    assert set(waited) == {1, 2}, "some were fed as tree nodes, some not"


# Attention with one dense mask, instead of flash prefill or hybrid tree attention.


@pytest.mark.parametrize("hybrid", [True, False], ids=["hybrid", "dense trees"])
@pytest.mark.parametrize("flash", [True, False], ids=["flash", "dense prefill"])
@pytest.mark.parametrize("name", ["llama-gqa", "mistral", "gemma2", "gpt-oss"])
def test_attention_switches(name, flash, hybrid, prompt_of, monkeypatch):
    monkeypatch.setattr(specx.target, "PREFILL_CHUNK", 32)
    monkeypatch.setattr(specx.adapters.classic, "_CHUNK", 32)
    target, ids = family(name), prompt_of(110)
    own = own_tokens(target, ids, 16)
    engines = [HFModel(each, hybrid=hybrid, flash_prefill=flash) for each in (target, noised(target, 0.01))]
    attend, hybrid_tree, calls = Call.attend, specx.hf_attention.attention.hybrid_tree_attention, []
    ways: dict[tuple[str, bool], set[str]] = {}

    def watch(call, query, *rest, **options):
        calls.append("dense")
        out = attend(call, query, *rest, **options)
        if query.shape[2] > 1:
            part = "tree" if call.mask is not None else "prefill"
            ways.setdefault((part, call.prefix > 0), set()).add(calls[-1])
        return out

    def watch_hybrid(*rest, **options):
        calls[-1] = "hybrid"
        return hybrid_tree(*rest, **options)

    monkeypatch.setattr(Call, "attend", watch)
    monkeypatch.setattr(specx.hf_attention.attention, "hybrid_tree_attention", watch_hybrid)
    plug = ClassicModel("tiny", engines[1], 96, 512, "the test")
    out = SpeculativeModel(engines[0], plug, None, FIXED).generate(ids, max_new_tokens=16, policy="full")
    assert_same(target, ids, out.tokens, own)
    assert out.stats["tau"] > 1.0
    prefill, tree = ("hybrid" if flash else "dense"), ("hybrid" if hybrid else "dense")
    assert ways == {("prefill", False): {prefill}, ("prefill", True): {prefill}, ("tree", True): {tree}}
