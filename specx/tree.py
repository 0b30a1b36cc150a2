"""Draft trees: tokens with parents, and how a draft grows one.

Growth is that of EAGLE-2 (arXiv 2406.16858, section 4): level by level the `beam` most likely nodes are expanded, and
at the end the `nodes` best of all candidates are kept. The optional early stop is OPT-Tree's (arXiv 2406.17276).
What the context offers (`Plan.branches`) competes for the same nodes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from specx.branches import Branches, Calibration, with_ranks
from specx.candidates import Pool

FORESEEN = 8  # ranks that are told apart, of tokens that the draft saw only afterwards
LOOK_BACK = 64  # such tokens at most: their logits are to cost little beside feeding them
FEW = 8  # waiting tokens of which nothing is asked: a round or two left them behind, and they cost no more than one


@dataclass(frozen=True, slots=True)
class Plan:
    """What one round may spend.

    Attributes:
        nodes: With the root; 1: one step of plain decoding.
        depth: The draft drafts depth + 1 levels.
        beam: Branching.
        threshold: OPT-Tree's early stop.
        shape: Nodes a level: all nodes of a level are expanded, and the best children of all of them kept.
        draft: Whether the draft model is asked at all.
        branches: What the context offers; its nodes may lie deeper than the draft's levels.
        scale: Puts the draft's probabilities on the scale of the branches; None: they are taken as they are.
    """

    nodes: int
    depth: int
    beam: int
    threshold: float | None = None
    shape: tuple[int, ...] | None = None
    draft: bool = True
    branches: Branches | None = None
    scale: Calibration | None = None

    def within(self, remaining: int, offer: Branches | None = None) -> "Plan":
        """Return the plan without levels that no kept node or no token still wanted could lie on, with an offer."""
        if self.nodes == 1 or remaining <= 1:
            return Plan(1, 0, 1)
        if self.shape is not None:
            shape = self.shape[: remaining - 1]
            return replace(self, nodes=1 + sum(shape), depth=len(shape) - 1, threshold=None, shape=shape)
        return replace(self, depth=min(self.depth, self.nodes - 2, remaining - 2), branches=offer)


@dataclass(frozen=True, slots=True)
class DraftTree:
    """Nodes in an order in which every parent precedes its children; node 0 is the root, the last emitted token.

    Attributes:
        tokens: Token ids, int64 [T].
        parents: Node index of each node's parent, int64 [T]; -1 for the root.
        depths: Distance from the root, int64 [T].
        scores: Cumulative log-probability, the draft's or as estimated on the plan's scale, float32 [T]; root 0.
        rows: The draft's pending row of each node, int64 [T]; -1: never fed to the draft. None: of no draft.
        origins: Who proposed each node, int64 [T], see `branches.Origin`. None: the draft proposed all.
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    scores: Tensor
    rows: Tensor | None = None
    origins: Tensor | None = None
    _lists: list[list[int]] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def single(cls, root: int, device: torch.device | str = "cpu") -> "DraftTree":
        """Return the tree of the root alone: verifying it is one step of plain decoding."""
        zero = torch.zeros(1, dtype=torch.long, device=device)
        return cls(zero + root, zero - 1, zero, zero.float(), _lists=[[root], [-1], [-1], [0]])

    @classmethod
    def of_branches(cls, root: int, branches: Branches, device: torch.device) -> "DraftTree":
        """Return the tree of what the context offers, with no draft."""
        origins = [with_ranks(code, rank) for rank, code in enumerate(branches.origins())]
        known = [[root, *branches.tokens], [-1, *branches.parents], [-1, *branches.parents], [0, *origins]]
        lists = torch.tensor([*known, [0, *branches.depths]]).to(device, non_blocking=True)
        tokens, parents, _, codes, depths = lists
        scores = torch.tensor([1.0, *branches.paths]).log().to(device, non_blocking=True)
        return cls(tokens, parents, depths, scores, None, codes, known)

    def to(self, device: torch.device) -> "DraftTree":
        """Return the tree on `device`."""
        if self.tokens.device == device:
            return self
        parts = (self.tokens, self.parents, self.depths, self.scores)
        tokens, parents, depths, scores = (part.to(device) for part in parts)
        return DraftTree(tokens, parents, depths, scores, self.rows, self.origins, self._lists)

    def lists(self, more: Tensor | None = None) -> list[list[int]]:
        """Return tokens, parents, rows, origins and `more`, int64 [T], as lists: one transfer for all of them."""
        if self._lists:
            return self._lists if more is None else [*self._lists, more.tolist()]
        unknown = torch.zeros_like(self.tokens)
        found = [self.parents if self.rows is None else self.rows]
        found += [unknown if self.origins is None else self.origins, *([] if more is None else [more])]
        lists = torch.stack([self.tokens, self.parents, *(each.to(self.tokens.device) for each in found)]).tolist()
        self._lists[:] = lists[:4]
        return lists

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def mask(self) -> Tensor:
        """Return bool [T, T]: row i marks node i and its ancestors."""
        if not self._lists and self.tokens.device.type != "cpu":
            return ancestors(self.parents)
        seen = np.eye(len(self), dtype=bool)
        for node, parent in enumerate(self.lists()[1][1:], 1):
            seen[node] |= seen[parent]
        return torch.from_numpy(seen).to(self.tokens.device, non_blocking=True)

    def path(self, node: int) -> list[int]:
        """Return the node indices from the root to `node`, both included."""
        parents, found = self.parents.tolist(), []
        while node >= 0:
            found.append(node)
            node = parents[node]
        return found[::-1]


def ancestors(parents: Tensor) -> Tensor:
    """Return bool [T, T] for parents, int64 [T]: row i marks i and its ancestors. Nothing is read on the host."""
    size = len(parents)
    itself = torch.eye(size, dtype=torch.bool, device=parents.device)
    mask = itself | itself[parents.clamp(min=0)]
    reach = 1
    while reach < size - 1:  # squaring the relation doubles the generations that a row reaches
        mask, reach = (mask.float() @ mask.float()) > 0, reach * 2
    return mask


def ranks_of(logits: Tensor, tokens: Tensor, vocabulary: Tensor | None = None) -> list[int]:
    """Return the place, from 0, of each token among the `FORESEEN` that its logits rank first; else `FORESEEN`.

    Args:
        logits: [n, V].
        tokens: int64 [n].
        vocabulary: Token id of each column of the logits, int64 [V], where they are not 0, 1, ...
    """
    best = logits.topk(min(FORESEEN, logits.shape[-1])).indices
    same = (best if vocabulary is None else vocabulary[best]) == tokens[:, None]
    return torch.where(same.any(1), same.int().argmax(1), FORESEEN).tolist()


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
    pool = Pool(tokens, scores, torch.zeros(beam, dtype=torch.long, device=device))
    frontier = torch.arange(1, beam + 1, device=device)  # candidate ids; 0 is the root
    eye = torch.eye(beam, dtype=torch.bool, device=device)
    mask, expanded = eye, []
    gain = pool.expected_tokens(plan.nodes) if plan.threshold is not None else 0.0
    for level in range(plan.depth):
        child_scores, columns = torch.log_softmax(expand(tokens, mask, level).float(), -1).topk(beam)
        child_tokens = columns if vocabulary is None else vocabulary[columns]
        expanded.append(frontier)
        first = pool.add(
            child_tokens.flatten(), (scores[:, None] + child_scores).flatten(), frontier.repeat_interleave(beam)
        )
        if plan.threshold is not None:
            before, gain = gain, pool.expected_tokens(plan.nodes)
            if gain - before < plan.threshold:
                break
        scores, picked = pool.scores[-1].topk(beam)
        tokens, frontier = child_tokens.flatten()[picked], first + picked
        mask = torch.cat([mask[picked // beam], eye], dim=1)
    return DraftTree(*pool.select(root, plan.nodes, expanded, plan.scale, plan.branches))


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
    pool = Pool(picked if vocabulary is None else vocabulary[picked], scores, torch.zeros_like(picked))
    mask, expanded = torch.eye(len(picked), dtype=torch.bool, device=device), []
    for level, width in enumerate(shape[1:]):
        tokens, first = pool.tokens[-1], pool.size + 1
        expanded.append(torch.arange(first - len(tokens), first, device=device))
        total = (scores[:, None] + torch.log_softmax(expand(tokens, mask, level).float(), -1)).flatten()
        scores, picked = total.topk(min(width, len(total)))
        above, column = picked // columns, picked % columns
        pool.add(column if vocabulary is None else vocabulary[column], scores, expanded[-1][above])
        mask = torch.cat([mask[above], torch.eye(len(picked), dtype=torch.bool, device=device)], dim=1)
    return DraftTree(*pool.select(root, pool.size + 1, expanded, plan.scale, None))
