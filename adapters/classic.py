"""Classic drafts: any small causal LM that shares the target's tokenizer, unmodified.

Its cache holds the kept tokens at contiguous positions 0, 1, ..., so that positions and distances stay in the range it
was trained on. A refresh runs the kept tokens through the model again: right for every kind of position encoding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from specx.acceptance import Walk
from specx.hf import HFModel
from specx.tree import DraftTree, Growth, Plan, grow

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

    def __init__(self, name: str, model: HFModel, target_vocab: int, draft_context: int, context_source: str) -> None:
        self.name, self.model = name, model
        self.draft_context, self.context_source = draft_context, context_source
        self.vocab = min(target_vocab, model.vocab_size)
        rotary = any("inv_freq" in name for name, _ in model.model.named_buffers())
        tables = [m for m in model.model.modules() if isinstance(m, nn.Embedding)]
        # A learned position table ends; rotations do not.
        self.max_positions = model.max_positions if not rotary and len(tables) > 1 else None

    def start(self, capacity: int, tree_rows: int) -> "ClassicDraft":
        """Start a request; see `draft.DraftModel`."""
        return ClassicDraft(self, capacity, tree_rows)


class ClassicDraft:
    """One request's classic draft; see `draft.Draft` for the contract."""

    def __init__(self, settings: ClassicModel, capacity: int, tree_rows: int) -> None:
        self.model, self.vocab = settings.model, settings.vocab
        self.cache = self.model.new_cache(capacity + tree_rows)
        self._ids = torch.empty(0, dtype=torch.long, device=self.model.device)
        self._fed = 0  # tokens of _ids that are in the cache or were dropped from it
        self._growth: Growth | None = None

    @property
    def cached(self) -> int:
        """Committed tokens in the cache."""
        return self.cache.committed

    @property
    def waiting(self) -> int:
        """Tokens that the next tree feeds first."""
        return len(self._ids) - self._fed

    def prefill(self, ids: Tensor, keep: Tensor | None) -> None:
        """Cache the prompt, or the part of it at `keep`."""
        self._ids = ids.to(self.model.device)
        self._rebuild(self._ids if keep is None else self._ids[keep.to(self.model.device)], len(ids))

    def begin(self, root: int) -> None:
        """Take the first chosen token."""
        self._append([root])

    def refresh(self, keep: Tensor) -> None:
        """Run the kept tokens through the model again."""
        self._rebuild(self._ids[keep.to(self.model.device)], len(self._ids) - 1)

    def propose(self, plan: Plan) -> DraftTree:
        """Feed what is waiting, then grow a tree level by level."""
        logits = self._feed(self._ids[self._fed :])
        self._fed = len(self._ids)
        start, device = self.cache.committed, self.model.device
        levels: list[Tensor] = []

        def expand(tokens: Tensor, mask: Tensor, level: int) -> Tensor:
            positions = torch.full((len(tokens),), start + level, device=device)
            levels.append(positions)
            tail = torch.cat(levels) if level else positions
            out = self.model.forward(tokens, positions, self.cache, mask=mask, tail_positions=tail)
            return out.logits[:, : self.vocab]

        self._growth = grow(int(self._ids[-1]), logits, expand, plan)
        return self._growth.tree

    def accept(self, walk: Walk) -> None:
        """Keep the cached rows of the accepted nodes; deeper nodes were never fed and wait for the next tree."""
        rows: list[int] = []
        if self._growth is not None:
            row_of = self._growth.rows.tolist()
            for node in walk.path[1:]:
                if row_of[node] < 0:
                    break
                rows.append(row_of[node])
        self.cache.commit(rows)
        self._fed += len(rows)
        self._append(walk.tokens)
        self._growth = None

    def _append(self, tokens: Sequence[int]) -> None:
        self._ids = torch.cat([self._ids, torch.tensor(tokens, dtype=torch.long, device=self._ids.device)])

    def _rebuild(self, ids: Tensor, fed: int) -> None:
        self.cache.reset()
        self._feed(ids)
        self._fed = fed

    def _feed(self, ids: Tensor) -> Tensor:
        """Commit tokens at the next positions; return the logits after the last one, [V]."""
        logits, context = torch.empty(0), self.cache.committed + len(ids)
        ids = ids.clamp(max=self.model.vocab_size - 1)  # a target may know ids beyond the draft's last one
        for first in range(0, len(ids), _CHUNK):
            chunk = ids[first : first + _CHUNK]
            begin = self.cache.committed
            positions = torch.arange(begin, begin + len(chunk), device=ids.device)
            out = self.model.forward(chunk, positions, self.cache, keep_logits=1, context=context)
            logits = out.logits[0, : self.vocab]
            self.cache.commit(range(len(chunk)))
        return logits
