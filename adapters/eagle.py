"""EAGLE heads as drafts: EAGLE-1/2, EAGLE-3 and EAGLE-3.1, with a bounded cache and without touching the head.

Of one layer, keys and values are pure functions of (embedding, feature): the prompt's are projected chunk by chunk
while the target prefills, with no attention, and stored before rotation. A refresh fetches them and rotates them to
contiguous positions 0, 1, ..., inside the range that the head was trained on. Deeper heads prefill through a window.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from specx.acceptance import Walk
from specx.adapters.eagle_head import EagleHead, HeadOutput
from specx.cache import TreeCache
from specx.config import CacheConfig
from specx.cuda import sent
from specx.draft import TokenIds
from specx.hf import HFModel, Output
from specx.hf_attention import Call
from specx.packed import steady_rows
from specx.store import KeyValueStore, rows_in_place
from specx.tree import FEW, LOOK_BACK, DraftTree, Plan, grow, ranks_of

_UNFUSED = 512  # tokens whose features are kept as they are: they are larger than states
_UNSTORED = 128  # rounds whose entries are not yet in the store: writing them waits for the device


class EagleModel:
    """An EAGLE head as a draft.

    Args:
        name: What users call it.
        head: The head, on the target's device and of its dtype.
        target: The enhanced target; its backend serves the head as well.
        vocabulary: Token id of each column of the head's logits, int64; None: 0, 1, ...
        draft_context: Positions it was trained for, and `context_source`, where that is known from.
        about: What was found in its files, in words.
    """

    max_positions: int | None = None

    def __init__(
        self,
        name: str,
        head: EagleHead,
        target: HFModel,
        vocabulary: Tensor | None,
        draft_context: int,
        context_source: str,
        about: Sequence[str] = (),
    ) -> None:
        self.name, self.head, self.vocabulary, self.about = name, head, vocabulary, about
        self.draft_context, self.context_source = draft_context, context_source
        self.sources = head.head.taps(target.config.num_hidden_layers)
        self.taps: Sequence[int] = tuple(dict.fromkeys(self.sources))
        self._target = target

    def start(self, capacity: int, tree_rows: int, tokens: int, config: CacheConfig) -> "EagleDraft":
        """Start a request; see `draft.DraftModel`."""
        store = KeyValueStore(tokens, self.head.rotation, config.store) if tokens else None
        return EagleDraft(self, capacity, tree_rows, store, config.sinks)

    def features(self, output: Output, rows: Sequence[int] | None = None) -> Tensor:
        """Return what the target's layers gave for the tokens of a forward, or for those in `rows`.

        [n, sources * target_hidden], in memory of its own: the next forward may overwrite the target's.
        """
        joined = torch.cat([output.features[layer].to(self.head.device) for layer in self.sources], -1)
        if rows is None or len(rows) == len(joined):
            return joined
        return joined[sent(rows, joined.device)]

    def states(self, features: Tensor) -> Tensor:
        """Return the states, [n, hidden], of tokens with these features."""
        return self.head.fuse(features.chunk(len(self.sources), -1))

    def call(self, cache: TreeCache, positions: Tensor, mask: Tensor | None = None, tail: Tensor | None = None) -> Call:
        """Describe a forward of the head; see `hf_attention.Call`."""
        flash = self._target.flash_prefill if mask is None else self._target.hybrid
        tail = positions if tail is None else tail
        return Call(cache.committed, positions, mask, tail, self._target.backend, not flash, None)


class EagleDraft:
    """One request's EAGLE draft; see `draft.Draft` for the contract.

    Entry i of its cache belongs to token i. It needs token i + 1 as well, so that the newest token, the root, has none
    and counts as waiting.

    Args:
        store: Keys before rotation, and values, of all entries, where some of them will be dropped; None: none will.
        sinks: First tokens that every window of a deep head's prefill sees.
    """

    refill = "gather"

    def __init__(
        self, model: EagleModel, capacity: int, tree_rows: int, store: KeyValueStore | None, sinks: int
    ) -> None:
        self.model, self.head, self.store, self.sinks = model, model.head, store, sinks
        self.capacity, self.tree_rows = capacity, tree_rows
        self.cache = TreeCache(self.head.head.layers, capacity + tree_rows)
        self.head.allocate(self.cache)
        device = self.head.device
        self._ids = TokenIds(device)
        self._states = torch.empty(0, self.head.head.hidden, device=device)  # of tokens whose entries are not computed
        self.foreseen: Sequence[int] = ()
        self._features: list[Tensor] = []  # of those behind them, which have no states yet
        self._unstored: list[HeadOutput] = []  # whose keys and values the store has not got yet
        self._fed = 0  # entries computed: in the cache, or dropped from it
        # Entries cached at the last rebuild, and how many were computed by then.
        self._held, self._since = self._ids.all(), 0

    @property
    def cached(self) -> int:
        """Entries in the cache."""
        return self.cache.committed

    @property
    def waiting(self) -> int:
        """Tokens without an entry, the root included."""
        return len(self._ids) - self._fed

    @torch.no_grad()
    def observe(self, ids: Tensor, chunk: Output) -> None:
        """Compute the entries of a prompt's next chunk; its last one must wait for the token after it."""
        self._features.append(self.model.features(chunk))
        self._fuse()
        ready, self._states = self._states[:-1], self._states[-1:]
        first = self._fed + 1
        self._absorb(ids[first : first + len(ready)].to(self.head.device), ready)

    def prefill(self, ids: Tensor, keep: Tensor | None) -> None:
        """Fill the cache with the prompt's entries, or those at `keep`."""
        self._ids.start(ids)
        if self.store is not None:
            self._rebuild(self.store, torch.arange(self._fed) if keep is None else keep)
        elif keep is not None:
            raise ValueError("this draft was started to keep all tokens, so that none can be dropped")

    def begin(self, root: int) -> None:
        """Take the first chosen token."""
        self._ids.append([root])

    @torch.no_grad()
    def refresh(self, keep: Tensor) -> None:
        """Rebuild the cache from its first row on that differs.

        Entries not computed yet come with the next tree, but after rounds without a tree they may be too many for it.
        """
        if self.store is None:
            raise ValueError("this draft was started to keep all tokens, so that none can be dropped")
        kept = int((keep < self._fed).sum())
        if kept + self.waiting > max(len(keep) + 1, self.capacity - self.tree_rows - 2):
            self._catch_up()
        self._rebuild(self.store, keep)

    def _catch_up(self) -> None:
        """Compute all waiting entries but the newest, whose output the next tree needs."""
        self._fuse()
        in_cache = torch.arange(self._since, self._fed, device=self._held.device)
        self._held, self._since = torch.cat([self._held, in_cache]), self._fed
        states, self._states = self._states[:-1], self._states[-1:]
        self._absorb(self._ids.all()[self._fed + 1 : self._fed + 1 + len(states)], states)

    def _rebuild(self, store: KeyValueStore, keep: Tensor) -> None:
        self._write(store)
        keep = keep.to(self.head.device)
        keep = keep[keep < self._fed]
        same = rows_in_place(self._held, self._since, self._fed, keep)
        self.cache.truncate(same)
        store.gather(keep[same:], self.cache)
        self._held, self._since = keep, self._fed

    @torch.no_grad()
    def propose(self, plan: Plan) -> DraftTree:
        """Compute the waiting entries from true features, then grow a tree on the head's own outputs."""
        self._fuse()
        fed = self._ids.all()[len(self._ids) - len(self._states) :]
        out = self._feed(fed, self._states)
        self._states = self._states[:0]
        start, device = self.cache.committed, self.head.device
        states, levels = out.states[-1:], list[Tensor]()

        def expand(tokens: Tensor, mask: Tensor, level: int) -> Tensor:
            nonlocal states
            width = len(tokens)
            # Level 0 goes on from the root; below it, the mask over the level before says which row is the parent.
            above = mask[:, :-width][:, -len(levels[-1]) :] if level else mask
            parent = above.float().argmax(1) if level else torch.zeros_like(tokens)
            positions = torch.full((width,), start + level, device=device)
            levels.append(positions)
            call = self.model.call(self.cache, positions, mask, torch.cat(levels))
            below = self.head(tokens, states[parent], self.cache, call)
            states = below.states
            return self.head.logits(below.read)

        logits = self._logits(out.read[-LOOK_BACK if len(fed) > FEW else -1 :])
        known, vocabulary = len(logits) - 1, self.model.vocabulary
        self.foreseen = ranks_of(logits[:known], fed[len(fed) - known :], vocabulary) if known else []
        return grow(self._ids.newest, logits[-1], expand, plan, vocabulary)

    def accept(self, walk: Walk, step: Output) -> None:
        """Drop the tree's entries; those of the accepted tokens wait with the target's features."""
        self.cache.rollback()
        self._features.append(self.model.features(step, walk.path))
        self._ids.append(walk.tokens)
        if self.waiting - len(self._states) > _UNFUSED:
            self._fuse()

    def _logits(self, read: Tensor) -> Tensor:
        more = steady_rows(len(read), LOOK_BACK, read.dtype, read.device) - len(read)
        return self.head.logits(F.pad(read, (0, 0, more, 0)) if more else read)[more:]

    @torch.no_grad()
    def _fuse(self) -> None:
        """Turn features into states, as late as possible: of many tokens at once that costs hardly more than of one."""
        if self._features:
            states = self.model.states(torch.cat(self._features))
            self._states = torch.cat([self._states.to(states.dtype), states])
            self._features.clear()

    def _absorb(self, ids: Tensor, states: Tensor) -> None:
        """Compute a prompt's next entries, whose outputs nobody reads."""
        if self.head.head.layers == 1:
            keys, values = self.head.project(ids, states)
            if self.store is not None:
                self._write(self.store)
                self.store.extend(keys, values, torch.zeros(len(ids), dtype=torch.long))
                self._since += len(ids)  # not in the cache: `prefill` says which of them it holds
            else:
                first = self.cache.committed
                positions = torch.arange(first, first + len(ids), device=keys.device)
                self.cache.update(self.head.rotation.move(keys[0], positions), values[0], 0)
                self.cache.extend(len(ids))
            self._fed += len(ids)
        elif self.store is None or self.cache.committed + len(ids) <= self.capacity:
            self._feed(ids, states)
        else:
            half = max(1, self.capacity // 2)
            for piece, own in zip(ids.split(half), states.split(half), strict=True):
                past = torch.arange(max(0, self._fed - half), self._fed)
                sinks = min(self.sinks, half // 2, len(past))
                past[:sinks] = torch.arange(sinks)
                self._rebuild(self.store, past)
                self._feed(piece, own)

    def _feed(self, ids: Tensor, states: Tensor) -> HeadOutput:
        """Run the next entries and commit them."""
        first, rows = self.cache.committed, len(ids)
        run = steady_rows(rows, self.cache.capacity - first, states.dtype, states.device)
        if run > rows:
            ids, states = F.pad(ids, (0, run - rows)), F.pad(states, (0, 0, 0, run - rows))
        positions = torch.arange(first, first + run, device=self.head.device)
        out = self.head(ids, states, self.cache, self.model.call(self.cache, positions)).first(rows)
        self.cache.extend(rows)
        if self.store is not None:
            self._unstored.append(out)
            if len(self._unstored) == _UNSTORED:
                self._write(self.store)
        self._fed += rows
        return out

    def _write(self, store: KeyValueStore) -> None:
        """Write what the store has not got yet."""
        if self._unstored:
            keys = torch.cat([out.keys for out in self._unstored], 3)
            values = torch.cat([out.values for out in self._unstored], 3)
            store.extend(keys, values, torch.zeros(keys.shape[3], dtype=torch.long))
            self._unstored.clear()
