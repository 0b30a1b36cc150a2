"""Classic drafts: any small causal LM that shares the target's tokenizer, unmodified.

Its cache holds the kept tokens at contiguous positions 0, 1, ..., so that positions and distances stay in the range it
was trained on. A refresh either runs the kept tokens through the model again (recompute: right for every kind of
position encoding, and needs no prefill over a long prompt) or fetches what was computed before and turns it to its new
position (gather: for rotary models; a long prompt is prefilled once, through a window).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specx.acceptance import Walk
from specx.config import CacheConfig
from specx.draft import TokenIds
from specx.hf import HFModel, Output
from specx.packed import steady_rows
from specx.rotary import Rotation, find_rotation
from specx.store import KeyValueStore, rows_in_place
from specx.tree import FEW, LOOK_BACK, DraftTree, Plan, grow, ranks_of

_CHUNK = 2048


class ClassicModel:
    """A small causal LM as a draft.

    Args:
        name: What users call it.
        model: The enhanced draft.
        target_vocab: Ids the target knows; the draft never proposes others.
        draft_context: Positions it was trained for, and `context_source`, where that is known from.
    """

    taps: Sequence[int] = ()
    about: Sequence[str] = ()

    def __init__(self, name: str, model: HFModel, target_vocab: int, draft_context: int, context_source: str) -> None:
        self.name, self.model = name, model
        self.draft_context, self.context_source = draft_context, context_source
        self.vocab = min(target_vocab, model.vocab_size)
        rotary = any("inv_freq" in name for name, _ in model.model.named_buffers())
        tables = [m for m in model.model.modules() if isinstance(m, nn.Embedding)]
        # A learned position table ends; rotations do not.
        self.max_positions = model.max_positions if not rotary and len(tables) > 1 else None
        self._rotations: dict[int, Rotation | None] = {}

    def rotation(self, positions: int) -> Rotation | None:
        """Return how stored keys move among the first `positions` positions, found by trying; None: they cannot."""
        if positions not in self._rotations:
            self._rotations[positions] = find_rotation(self.model, positions)
        return self._rotations[positions]

    def start(self, capacity: int, tree_rows: int, tokens: int, config: CacheConfig) -> "ClassicDraft":
        """Start a request; see `draft.DraftModel`."""
        rotation = self.rotation(capacity) if config.refill != "recompute" and tokens else None
        store = KeyValueStore(tokens, rotation, config.store) if rotation else None
        return ClassicDraft(self, capacity, tree_rows, store, config.sinks)


class ClassicDraft:
    """One request's classic draft; see `draft.Draft` for the contract.

    Args:
        store: Where gather finds what was computed; None recomputes.
        sinks: First tokens that every window of a gathering draft's prefill sees.
    """

    def __init__(
        self, settings: ClassicModel, capacity: int, tree_rows: int, store: KeyValueStore | None, sinks: int
    ) -> None:
        self.model, self.vocab, self.sinks = settings.model, settings.vocab, sinks
        self.capacity, self.tree_rows = capacity, tree_rows
        self.cache, self.store = self.model.new_cache(capacity + tree_rows), store
        self._ids = TokenIds(self.model.device)
        self._fed = 0  # tokens of _ids that are in the cache or were dropped from it
        self._held, self._held_fed = self._ids.all(), 0  # tokens cached at the last rebuild, and what was fed by then
        self._tree: DraftTree | None = None
        self.foreseen: Sequence[int] = ()

    @property
    def refill(self) -> str:
        """How a refresh fills the cache."""
        return "recompute" if self.store is None else "gather"

    @property
    def cached(self) -> int:
        """Committed tokens in the cache."""
        return self.cache.committed

    @property
    def waiting(self) -> int:
        """Tokens that the next tree feeds first."""
        return len(self._ids) - self._fed

    def observe(self, ids: Tensor, chunk: Output) -> None:
        """Needs nothing of the target's layers."""

    def prefill(self, ids: Tensor, keep: Tensor | None) -> None:
        """Cache the prompt, or the part of it at `keep`."""
        self._ids.start(ids)
        if keep is None:
            self._feed(self._ids.all())
            self._fed = len(ids)
            return
        if self.store is not None:
            self._compute(self.store, len(ids))
        self._refill(keep, len(ids))

    def begin(self, root: int) -> None:
        """Take the first chosen token."""
        self._ids.append([root])

    def refresh(self, keep: Tensor) -> None:
        """Rebuild the cache from its first row on that differs.

        After rounds without it, the tokens that wait may be too many for the next tree to feed.
        """
        kept = int((keep < self._fed).sum())
        if self.store is not None and kept + self.waiting > max(len(keep) + 1, self.capacity - self.tree_rows - 2):
            self.store.append(self.cache, self._fed - self.store.length)
            self._compute(self.store, len(self._ids) - 1)
        self._refill(keep, len(self._ids) - 1)

    def _refill(self, keep: Tensor, fed: int) -> None:
        keep = keep.to(self.model.device)
        if self.store is not None:
            self.store.append(self.cache, self._fed - self.store.length)
            keep, fed = keep[keep < self._fed], self._fed  # newer ones were not computed yet: the next tree feeds them
        same = rows_in_place(self._held, self._held_fed, self._fed, keep)
        self.cache.truncate(same)
        if self.store is not None:
            self.store.gather(keep[same:], self.cache)
        else:
            self._feed(self._ids.all()[keep[same:]])
        self._held, self._held_fed, self._fed = keep, fed, fed

    def propose(self, plan: Plan) -> DraftTree:
        """Feed what is waiting, then grow a tree level by level."""
        fed = self._ids.all()[self._fed :]
        logits = self._feed(fed, min(len(fed), LOOK_BACK) if len(fed) > FEW else 1)
        self._fed = len(self._ids)
        known = len(logits) - 1
        self.foreseen = ranks_of(logits[:known], fed[len(fed) - known :]) if known else []
        start, device = self.cache.committed, self.model.device
        levels: list[Tensor] = []

        def expand(tokens: Tensor, mask: Tensor, level: int) -> Tensor:
            positions = torch.full((len(tokens),), start + level, device=device)
            levels.append(positions)
            tail = torch.cat(levels) if level else positions
            out = self.model.forward(tokens, positions, self.cache, mask=mask, tail_positions=tail)
            return out.logits[:, : self.vocab]

        self._tree = grow(self._ids.newest, logits[-1], expand, plan)
        return self._tree

    def accept(self, walk: Walk, step: Output | None = None) -> None:
        """Keep the cached rows of the accepted nodes; deeper nodes were never fed and wait for the next tree."""
        rows: list[int] = []
        if self._tree is not None:
            row_of = self._tree.lists()[2]
            for node in walk.path[1:]:
                if row_of[node] < 0:
                    break
                rows.append(row_of[node])
        self.cache.commit(rows)
        self._fed += len(rows)
        self._ids.append(walk.tokens)
        self._tree = None

    def _compute(self, store: KeyValueStore, last: int) -> None:
        """Compute tokens up to `last` into the store: each chunk sees the sinks and the chunk before, at bounded
        positions.
        """
        half, ids = max(1, self.capacity // 2), self._ids.all()
        sinks = min(self.sinks, half // 2)
        while self._fed < last:
            past = torch.arange(max(0, self._fed - half), self._fed, device=ids.device)
            past[:sinks] = torch.arange(sinks, device=ids.device)[: len(past)]
            self.cache.truncate(0)
            store.gather(past, self.cache)
            chunk = ids[self._fed : min(self._fed + half, last)]
            self._feed(chunk)
            store.append(self.cache, len(chunk))
            self._held, self._held_fed, self._fed = past, self._fed, self._fed + len(chunk)

    def _feed(self, ids: Tensor, keep: int = 1) -> Tensor:
        """Commit tokens at the next positions; return the logits after the last ones, [keep, V] or fewer."""
        logits, context = torch.empty(0), self.cache.committed + len(ids)
        ids = ids.clamp(max=self.model.vocab_size - 1)  # a target may know ids beyond the draft's last one
        for first in range(0, len(ids), _CHUNK):
            chunk = ids[first : first + _CHUNK]
            begin, rows, kept = self.cache.committed, len(chunk), min(keep, len(chunk))
            positions = torch.arange(begin, begin + rows, device=ids.device)
            run = steady_rows(rows, self.cache.capacity - begin, self.model.dtype, ids.device)
            if run > rows:
                chunk = F.pad(chunk, (0, run - rows))
                positions = F.pad(positions, (0, run - rows), value=begin + rows - 1)
            read = steady_rows(kept + run - rows, run, self.model.dtype, ids.device)  # of the last rows
            out = self.model.forward(chunk, positions, self.cache, keep_logits=read, context=context)
            logits = out.logits[rows - kept - run :, : self.vocab][:kept]
            self.cache.commit(range(rows))
        return logits
