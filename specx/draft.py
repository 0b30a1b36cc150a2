"""The socket that every adapter fits."""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from specx.acceptance import Walk
from specx.config import CacheConfig
from specx.cuda import sent
from specx.hf import Output
from specx.tree import DraftTree, Plan


class TokenIds:
    """All token ids of a request, taken in constant time each and moved to the draft's device when they are read.

    Attributes:
        newest: The one taken last.
    """

    def __init__(self, device: torch.device) -> None:
        self._ids, self._new = torch.empty(0, dtype=torch.long, device=device), list[int]()
        self.newest = -1

    def __len__(self) -> int:
        return len(self._ids) + len(self._new)

    def start(self, ids: Tensor) -> None:
        """Take a prompt, int64 [L], in place of all."""
        self._ids = ids.to(self._ids.device)
        self._new.clear()

    def append(self, tokens: Sequence[int]) -> None:
        """Take the next tokens, at least one."""
        self._new.extend(tokens)
        self.newest = tokens[-1]

    def all(self) -> Tensor:
        """Return them, int64 [n]."""
        if self._new:
            self._ids = torch.cat([self._ids, sent(self._new, self._ids.device)])
            self._new.clear()
        return self._ids


class Draft(Protocol):
    """One request's draft: knows all tokens so far, caches some of them, proposes trees."""

    @property
    def cached(self) -> int:
        """Committed tokens that the draft sees: in its own cache, or in the target's."""
        ...

    @property
    def waiting(self) -> int:
        """Accepted tokens that the next `propose` must feed first, the root included."""
        ...

    @property
    def refill(self) -> str:
        """How a refresh fills the cache: "recompute" or "gather"."""
        ...

    @property
    def foreseen(self) -> Sequence[int]:
        """What the last `propose` would have guessed of tokens that had waited, the newest last: `tree.ranks_of` each.

        Of the newest few only, the root among them; empty if hardly any had waited, or where nothing of the kind is
        computed.
        """
        ...

    def observe(self, ids: Tensor, chunk: Output) -> None:
        """Take what the target's layers gave for the next tokens of the prompt `ids`, int64 [L], while it prefills.

        Called before `prefill`, once for every chunk in order, and only where the model names `taps`.
        """
        ...

    def prefill(self, ids: Tensor, keep: Tensor | None) -> None:
        """Take the prompt, int64 [L]; cache the tokens at the ascending indices `keep`, or all of them."""
        ...

    def begin(self, root: int) -> None:
        """Take the first token that the target chose."""
        ...

    def propose(self, plan: Plan) -> DraftTree:
        """Feed what is waiting, then grow a tree whose root is the newest token, by `tree.grow`.

        Rounds may pass without it: their tokens wait.
        """
        ...

    def accept(self, walk: Walk, step: Output) -> None:
        """Take over a verified step: the path through the tree proposed last, and the tokens it emitted.

        The tree was another's if nothing was proposed since the last step. Nodes whose row is -1 were never fed.

        Args:
            step: What the target gave for the tree's nodes, the tapped layers' outputs among it.
        """
        ...

    def refresh(self, keep: Tensor) -> None:
        """Rebuild the cache from the tokens at `keep`, ascending indices into all tokens but the root."""
        ...


@runtime_checkable
class ReadsTarget(Protocol):
    """What a `Draft` has in addition if it reads the target's own keys and values."""

    @property
    def kv_rows(self) -> int:
        """Committed tokens in the draft's own key/value cache."""
        ...

    def attach(self, last_layer: Callable[[], tuple[Tensor, Tensor]]) -> None:
        """Take what returns the last layer's committed keys and values, views [1, G, L, D]; called before `prefill`.

        They are read in place: only while a tree is grown, and none is pending in the target then.
        """
        ...


class DraftModel(Protocol):
    """A loaded draft, from which each request starts a `Draft`.

    Attributes:
        name: What users call it.
        draft_context: Positions it was trained for.
        context_source: Where that number comes from, in words.
        max_positions: Positions that it can compute at all; None: no limit.
        taps: Target layers whose outputs it needs (see `hf.HFModel.forward`).
        about: What was found in its files, in words, for `specx doctor`.
    """

    name: str
    draft_context: int
    context_source: str
    max_positions: int | None
    taps: Sequence[int]
    about: Sequence[str]

    def start(self, capacity: int, tree_rows: int, tokens: int, config: CacheConfig) -> Draft | None:
        """Start a request whose cache reaches `capacity` tokens, plus `tree_rows` rows of a growing tree.

        None: it has no model, and the context is all that drafts.

        Args:
            tokens: Prompt and new tokens together if some of them will be dropped, 0 if all stay cached.
            config: How dropped tokens come back (refill, store), and the sinks.
        """
        ...
