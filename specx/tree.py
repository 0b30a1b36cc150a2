"""Draft trees: tokens with parents, and how a draft grows one.

Growth is that of EAGLE-2 (arXiv 2406.16858, section 4): level by level the `beam` most likely nodes are expanded, and
at the end the `nodes` best of all candidates are kept. The optional early stop is OPT-Tree's (arXiv 2406.17276).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Plan:
    """What one round may spend: `nodes` with the root (1: no draft), levels = depth + 1, branching `beam`.

    With a `shape`, nodes a level, all nodes of a level are expanded and the best children of all of them kept.
    """

    nodes: int
    depth: int
    beam: int
    threshold: float | None = None
    shape: tuple[int, ...] | None = None

    def within(self, remaining: int) -> "Plan":
        """Return the plan without levels that no kept node or no token still wanted could lie on."""
        if self.nodes == 1 or remaining <= 1:
            return Plan(1, 0, 1)
        if self.shape is not None:
            shape = self.shape[: remaining - 1]
            return Plan(1 + sum(shape), len(shape) - 1, self.beam, None, shape)
        return Plan(self.nodes, min(self.depth, self.nodes - 2, remaining - 2), self.beam, self.threshold)


@dataclass(frozen=True, slots=True)
class DraftTree:
    """Nodes in an order in which every parent precedes its children; node 0 is the root, the last emitted token.

    Attributes:
        tokens: Token ids, int64 [T].
        parents: Node index of each node's parent, int64 [T]; -1 for the root.
        depths: Distance from the root, int64 [T].
        scores: Cumulative draft log-probability, float32 [T]; 0 for the root.
        rows: The draft's pending row of each node, int64 [T]; -1: never fed to the draft. None: of no draft.
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    scores: Tensor
    rows: Tensor | None = None
    _lists: list[list[int]] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def single(cls, root: int, device: torch.device | str = "cpu") -> "DraftTree":
        """Return the tree of the root alone: verifying it is one step of plain decoding."""
        zero = torch.zeros(1, dtype=torch.long, device=device)
        return cls(zero + root, zero - 1, zero, zero.float())

    def to(self, device: torch.device) -> "DraftTree":
        """Return the tree on `device`."""
        if self.tokens.device == device:
            return self
        parts = (self.tokens, self.parents, self.depths, self.scores)
        tokens, parents, depths, scores = (part.to(device) for part in parts)
        return DraftTree(tokens, parents, depths, scores, self.rows, self._lists)

    def lists(self, more: Tensor | None = None) -> list[list[int]]:
        """Return tokens, parents, rows and `more`, int64 [T], as lists: one transfer from the device for all of them.

        Without `more` they are those of the last call.
        """
        if more is not None or not self._lists:
            rows = self.parents if self.rows is None else self.rows.to(self.tokens.device)
            parts = [self.tokens, self.parents, rows, *([] if more is None else [more.to(self.tokens.device)])]
            self._lists[:] = torch.stack(parts).tolist()
        return self._lists

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def mask(self) -> Tensor:
        """Return bool [T, T]: row i marks node i and its ancestors."""
        size = len(self)
        itself = torch.eye(size, dtype=torch.bool, device=self.tokens.device)
        mask = itself | itself[self.parents.clamp(min=0)]
        reach = 1
        while reach < size - 1:  # squaring the relation doubles the generations that a row reaches
            mask, reach = (mask.float() @ mask.float()) > 0, reach * 2
        return mask

    def path(self, node: int) -> list[int]:
        """Return the node indices from the root to `node`, both included."""
        parents, found = self.parents.tolist(), []
        while node >= 0:
            found.append(node)
            node = parents[node]
        return found[::-1]


def grow(
    root: int,
    root_logits: Tensor,
    expand: Callable[[Tensor, Tensor, int], Tensor],
    plan: Plan,
    vocabulary: Tensor | None = None,
) -> DraftTree:
    """Grow a draft tree best-first.

    Args:
        root: Token id of the root.
        root_logits: The draft's logits after the root, [V].
        expand: expand(tokens [W], mask [W, R], level) feeds one level's W nodes to the draft and returns logits
            [W, V]. Its rows follow those of earlier levels; `mask` (bool) says which of the R rows each node sees.
        plan: Size of the tree. At most plan.depth calls of `expand` are made, and the candidates of the last one
            take part in the selection.
        vocabulary: Token id of each column of the logits, int64 [V], where they are not 0, 1, ...
    """
    if plan.shape is not None:
        return _grow_shape(root, root_logits, expand, plan, plan.shape, vocabulary)
    beam = min(plan.beam, root_logits.shape[-1])
    device = root_logits.device
    scores, columns = torch.log_softmax(root_logits.float(), -1).topk(beam)
    tokens = columns if vocabulary is None else vocabulary[columns]
    pool = _Pool(tokens, scores, torch.zeros(beam, dtype=torch.long, device=device))
    frontier = torch.arange(1, beam + 1, device=device)  # candidate ids; 0 is the root
    eye = torch.eye(beam, dtype=torch.bool, device=device)
    mask, expanded = eye, []
    gain = pool.expected_tokens(plan) if plan.threshold is not None else 0.0
    for level in range(plan.depth):
        child_scores, columns = torch.log_softmax(expand(tokens, mask, level).float(), -1).topk(beam)
        child_tokens = columns if vocabulary is None else vocabulary[columns]
        expanded.append(frontier)
        first = pool.add(
            child_tokens.flatten(), (scores[:, None] + child_scores).flatten(), frontier.repeat_interleave(beam)
        )
        if plan.threshold is not None:
            before, gain = gain, pool.expected_tokens(plan)
            if gain - before < plan.threshold:
                break
        scores, picked = pool.scores[-1].topk(beam)
        tokens, frontier = child_tokens.flatten()[picked], first + picked
        mask = torch.cat([mask[picked // beam], eye], dim=1)
    return pool.select(root, plan, expanded)


def _grow_shape(
    root: int,
    root_logits: Tensor,
    expand: Callable[[Tensor, Tensor, int], Tensor],
    plan: Plan,
    shape: tuple[int, ...],
    vocabulary: Tensor | None,
) -> DraftTree:
    """Grow a tree of so many nodes a level, the best by score of all children of the level above (LongSpec's)."""
    device, columns = root_logits.device, root_logits.shape[-1]
    scores, picked = torch.log_softmax(root_logits.float(), -1).topk(min(shape[0], columns))
    pool = _Pool(picked if vocabulary is None else vocabulary[picked], scores, torch.zeros_like(picked))
    mask, expanded = torch.eye(len(picked), dtype=torch.bool, device=device), []
    for level, width in enumerate(shape[1:]):
        tokens, first = pool.tokens[-1], pool.size + 1
        expanded.append(torch.arange(first - len(tokens), first, device=device))
        total = (scores[:, None] + torch.log_softmax(expand(tokens, mask, level).float(), -1)).flatten()
        scores, picked = total.topk(min(width, len(total)))
        above, column = picked // columns, picked % columns
        pool.add(column if vocabulary is None else vocabulary[column], scores, expanded[-1][above])
        mask = torch.cat([mask[above], torch.eye(len(picked), dtype=torch.bool, device=device)], dim=1)
    return pool.select(root, Plan(pool.size + 1, plan.depth, plan.beam), expanded)


class _Pool:
    """All candidates of a growing tree in level order. Ids count from 1; 0 is the root."""

    def __init__(self, tokens: Tensor, scores: Tensor, parents: Tensor) -> None:
        self.tokens, self.scores, self.parents = [tokens], [scores], [parents]
        self.size = tokens.shape[0]

    def add(self, tokens: Tensor, scores: Tensor, parents: Tensor) -> int:
        """Append one level and return the id of its first candidate."""
        self.tokens.append(tokens)
        self.scores.append(scores)
        self.parents.append(parents)
        self.size += tokens.shape[0]
        return self.size - tokens.shape[0] + 1

    def expected_tokens(self, plan: Plan) -> float:
        """OPT-Tree's E(A): the sum of the path probabilities of the nodes that would be kept."""
        scores = torch.cat(self.scores)
        return scores.topk(min(plan.nodes - 1, len(scores))).values.exp().sum().item()

    def select(self, root: int, plan: Plan, expanded: list[Tensor]) -> DraftTree:
        """Keep the best nodes. The stable sort of level order never ranks a child above its parent on a tie."""
        scores, device = torch.cat(self.scores), self.scores[0].device
        kept = torch.sort(scores, descending=True, stable=True).indices[: plan.nodes - 1].sort().values
        index = torch.zeros(self.size + 1, dtype=torch.long, device=device)
        index[kept + 1] = torch.arange(1, len(kept) + 1, device=device)
        levels = torch.cat([torch.full_like(each, i + 1) for i, each in enumerate(self.tokens)])
        zero = torch.zeros(1, dtype=torch.long, device=device)
        row_of = torch.full_like(index, -1)
        if expanded:
            fed = torch.cat(expanded)
            row_of[fed] = torch.arange(len(fed), device=device)
        return DraftTree(
            tokens=torch.cat([zero + root, torch.cat(self.tokens)[kept]]),
            parents=torch.cat([zero - 1, index[torch.cat(self.parents)[kept]]]),
            depths=torch.cat([zero, levels[kept]]),
            scores=torch.cat([zero.float(), scores[kept]]),
            rows=torch.cat([zero - 1, row_of[kept + 1]]),
        )
