"""LongSpec drafts: a window of their own keys, and the target's last layer read in place.

Its own keys and values are functions of (token, position) alone, so that accepted tokens are projected, never computed
again, and a prompt costs the projections of its last 512 tokens. The target's rows are its own past: nothing to store.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from specx import attention
from specx.acceptance import Walk
from specx.adapters.longspec_block import WINDOW, LongSpecBlock, OwnAttention, Tables
from specx.config import CacheConfig
from specx.draft import TokenIds
from specx.hf import HFModel, Output
from specx.hf_config import device_of
from specx.tree import DraftTree, Plan, grow

Rows = tuple[Tensor, Tensor]
Part = tuple[Tensor, Tensor, Tensor | None]  # keys, values [1, G, n, D], bias [T, n]


class LongSpecModel:
    """A LongSpec block as a draft.

    Args:
        name: What users call it.
        block: The block, where the target's last layer lies and of its dtype.
        target: The enhanced target; gives embeddings, LM head and attention backend.
        vocabulary: Tokens to draft, ascending ids; None: all.
        alignment: How far back a tree's nodes see: "exact", 513 keys as in training, or "reference", as LongSpec's own
            program cuts it: by the node's row in its level, a few keys earlier.
        draft_context: Positions it was trained for, and `context_source`, where that is known from.
        about: What was found in its files, in words.
    """

    max_positions: int | None = None
    taps: Sequence[int] = ()

    def __init__(
        self,
        name: str,
        block: LongSpecBlock,
        target: HFModel,
        vocabulary: Tensor | None,
        alignment: Literal["exact", "reference"],
        draft_context: int,
        context_source: str,
        about: Sequence[str] = (),
    ) -> None:
        self.name, self.block, self.vocabulary, self.about = name, block, vocabulary, about
        self.alignment, self.draft_context, self.context_source = alignment, draft_context, context_source
        self.device, self.backend = block.input_layernorm.weight.device, target.backend
        self._embedding, self._head = target.embedding, target.lm_head
        self._rows = None if vocabulary is None else target.lm_head.weight[vocabulary.to(target.lm_head.weight.device)]

    def start(self, capacity: int, tree_rows: int, tokens: int, config: CacheConfig) -> "LongSpecDraft":
        """Start a request; see `draft.DraftModel`."""
        return LongSpecDraft(self, tree_rows)

    def embed(self, ids: Tensor) -> Tensor:
        """Return the target's embeddings of ids, int64 [T], as [1, T, hidden]."""
        return self._embedding(ids.to(device_of(self._embedding)))[None].to(self.block.input_layernorm.weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [T, V] of hidden states [1, T, hidden]."""
        read = hidden[0].to(device_of(self._head))
        if self._rows is None:
            return self._head(read).to(self.device)
        bias: Tensor | None = self._head.bias
        if bias is not None and self.vocabulary is not None:
            bias = bias[self.vocabulary.to(bias.device)]
        return F.linear(read, self._rows, bias).to(self.device)

    def attend(self, query: Tensor, parts: Sequence[Part]) -> Tensor:
        """Attend to several sets of keys, values and biases as if they were one."""
        found = None
        for key, value, bias in parts:
            own = attention.attend(query, key, value, bias=bias, scale=self.block.scale, backend=self.backend)
            found = own if found is None else attention.merge_states(*found, *own)
        assert found is not None
        return found[0]


class Ring:
    """Keys and values of the newest tokens; each new one takes the place of the oldest.

    Args:
        rows: Tokens that it holds.
    """

    def __init__(self, rows: int, like: Tensor) -> None:
        self.rows, self.end = rows, 0
        self.keys = like.new_empty(*like.shape[:2], rows, like.shape[3])
        self.values = torch.empty_like(self.keys)
        self.positions = torch.zeros(rows, dtype=torch.long, device=like.device)

    @property
    def held(self) -> int:
        """Tokens in it."""
        return min(self.end, self.rows)

    def extend(self, keys: Tensor, values: Tensor, positions: Tensor, end: int) -> None:
        """Take tokens, at most `rows`, the last one at position end - 1; keys and values [1, G, n, D]."""
        slots = positions % self.rows
        self.keys.index_copy_(2, slots, keys)
        self.values.index_copy_(2, slots, values)
        self.positions.index_copy_(0, slots, positions)
        self.end = end

    def seen(self, first: Tensor, highest: int) -> Part:
        """Return keys, values and a bias for queries that see positions from `first`, int64 [T], on.

        Args:
            highest: The greatest of them.
        """
        held = self.held
        keys, values = self.keys[:, :, :held], self.values[:, :, :held]
        if self.end - held >= highest:
            return keys, values, None
        return keys, values, attention.additive(self.positions[:held] >= first[:, None], keys.dtype)


class LongSpecDraft:
    """One request's LongSpec draft; see `draft.Draft` for the contract, `draft.ReadsTarget` for what it reads in place.

    It sees every committed token of the target, or, once some were dropped, the kept ones and those committed since.

    Args:
        tree_rows: Nodes that a growing tree feeds at most.
    """

    refill = "gather"
    foreseen: Sequence[int] = ()  # rounds may pass without it at no cost: nothing waits

    def __init__(self, model: LongSpecModel, tree_rows: int) -> None:
        self.model, self.block, self.device = model, model.block, model.device
        none = self.block.keys_values(*self._entered(torch.zeros(1, dtype=torch.long), 0))[0][:, :, :0]
        self.ring = Ring(WINDOW + (tree_rows if model.alignment == "reference" else 0), none)
        self.tail = none.new_empty(2, *none.shape[:2], tree_rows, none.shape[3])
        self._ids = TokenIds(self.device)
        self._kept: tuple[Tensor, Tensor, int] | None = None  # copied rows, and how many tokens were committed then
        self._read: Callable[[], Rows] | None = None

    def attach(self, last_layer: Callable[[], Rows]) -> None:
        """Take what returns the committed rows of the target's last layer."""
        self._read = last_layer

    @property
    def kv_rows(self) -> int:
        """Tokens in the block's own cache: a window, whatever the context."""
        return self.ring.held

    @property
    def cached(self) -> int:
        """Committed tokens that it sees."""
        committed = len(self._ids) - 1
        return committed if self._kept is None else self._kept[0].shape[2] + committed - self._kept[2]

    @property
    def waiting(self) -> int:
        """The root."""
        return 1

    def observe(self, ids: Tensor, chunk: Output) -> None:
        """Needs nothing of the target's layers but the last one's keys and values, which its cache holds."""

    @torch.no_grad()
    def prefill(self, ids: Tensor, keep: Tensor | None) -> None:
        """Project the prompt's last tokens."""
        self._ids.start(ids)
        self._project()
        if keep is not None:
            self.refresh(keep)

    def begin(self, root: int) -> None:
        """Take the first chosen token."""
        self._ids.append([root])

    def refresh(self, keep: Tensor) -> None:
        """See only the tokens at `keep`, at their own positions, and those to come."""
        keys, values = self._last_layer()
        keep = keep.to(keys.device)
        self._kept = keys.index_select(2, keep), values.index_select(2, keep), keys.shape[2]

    @torch.no_grad()
    def propose(self, plan: Plan) -> DraftTree:
        """Project the accepted tokens, run the root, then grow a tree below it."""
        self._project()
        context, root, fed = self._context(), len(self._ids) - 1, 0

        def expand(tokens: Tensor, mask: Tensor, level: int) -> Tensor:
            nonlocal fed
            own = self._level_attention(fed, root, level, mask, chain=plan.beam == 1)
            fed += len(tokens)
            return self._run(tokens, root + 1 + level, own, context)

        newest = self._ids.all()[-1:]
        logits = self._run(newest, root, self._root_attention(root), context)
        return grow(self._ids.newest, logits[0], expand, plan, self.model.vocabulary)

    def accept(self, walk: Walk, step: Output) -> None:
        """Take the emitted tokens; the tree's keys are forgotten."""
        self._ids.append(walk.tokens)

    def _project(self) -> None:
        """Bring the ring up to the newest token."""
        first, end = max(self.ring.end, len(self._ids) - self.ring.rows), len(self._ids)
        x, tables = self._entered(self._ids.all()[first:], first)
        positions = torch.arange(first, end, device=self.device)
        self.ring.extend(*self.block.keys_values(x, tables), positions, end)

    def _entered(self, ids: Tensor, first: int, step: int = 1) -> tuple[Tensor, Tables]:
        """Return embeddings of tokens and the rotation at positions first, first + step, ..."""
        x = self.model.embed(ids)
        positions = first + step * torch.arange(len(ids), device=self.device)
        return x, self.block.rotary.tables(positions, x)

    def _context(self) -> list[Part]:
        """Return what cross-attention reads."""
        keys, values = self._last_layer()
        if self._kept is None:
            return [(keys, values, None)]
        kept_keys, kept_values, since = self._kept
        return [(kept_keys, kept_values, None), (keys[:, :, since:], values[:, :, since:], None)]

    def _last_layer(self) -> Rows:
        if self._read is None:
            raise RuntimeError("this draft reads the target's cache: attach it first")
        return self._read()

    def _run(self, ids: Tensor, position: int, own: OwnAttention, context: list[Part]) -> Tensor:
        """Return the logits [T, V] of tokens that all stand at `position`."""
        x, tables = self._entered(ids, position, step=0)
        return self.model.logits(self.block(x, tables, own, lambda query: self.model.attend(query, context)))

    def _root_attention(self, root: int) -> OwnAttention:
        """Return attention of the root, whose own keys are in the ring."""
        highest = root - WINDOW + 1
        first = torch.full((1,), highest, device=self.device)
        return lambda query, key, value: self.model.attend(query, [self.ring.seen(first, highest)])

    def _level_attention(self, fed: int, root: int, level: int, mask: Tensor, chain: bool) -> OwnAttention:
        """Return attention of one level's nodes, of which `fed` were fed before; `mask` bool [T, fed + T]."""
        rows, width = mask.shape[1], mask.shape[0]
        if self.model.alignment == "reference" and not chain:  # cut by the row, counted from the level's end
            highest = root - WINDOW
            first = highest + 1 - width + torch.arange(width, device=self.device)
        else:
            highest = root + 1 + level - WINDOW + 1
            first = torch.full((width,), highest, device=self.device)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            self._reserve(rows)
            for block, new in zip(self.tail, (key, value), strict=True):
                block[:, :, fed:rows] = new
            tree = attention.additive(mask, query.dtype)
            past = self.ring.seen(first, highest)
            return self.model.attend(query, [past, (self.tail[0][:, :, :rows], self.tail[1][:, :, :rows], tree)])

        return attend

    def _reserve(self, rows: int) -> None:
        """Make room for a tree that is larger than what was announced."""
        held = self.tail.shape[3]
        if rows > held:
            self.tail = F.pad(self.tail, (0, 0, 0, rows - held))
