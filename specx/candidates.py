"""All candidates of a growing tree: what a draft proposed level by level, what the context adds, and which are kept."""

from dataclasses import dataclass

import torch
from torch import Tensor

from specx.branches import Branches, Calibration, draft_codes, keys_of, with_ranks

_NEVER = -1e4  # a log-probability that stands for none: differences of it are numbers


@dataclass(slots=True)
class _Nodes:
    """Candidates in an order in which parents come first; all tensors [N]. Ids count from 1; 0 is the root."""

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    scores: Tensor
    origins: Tensor | None
    certain: int  # at least so many of them can be kept


class Pool:
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

    def expected_tokens(self, nodes: int) -> float:
        """OPT-Tree's E(A): the sum of the path probabilities of the nodes that would be kept."""
        scores = torch.cat(self.scores)
        return scores.topk(min(nodes - 1, len(scores))).values.exp().sum().item()

    def select(
        self, root: int, nodes: int, expanded: list[Tensor], scale: Calibration | None, branches: Branches | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Keep the best nodes: return the tree's tokens, parents, depths, scores, rows and origins, root first.

        The stable sort of an order with parents first never ranks a child above its parent on a tie.

        Args:
            nodes: To keep at most, root included.
            expanded: Ids of the nodes that were fed to the draft, in the order of its rows.
            scale: Corrects the draft's probabilities; None: they stand as they are, and no origins are noted.
            branches: What the context adds; needs a scale.
        """
        found = self._nodes(scale, branches)
        device, size = found.scores.device, len(found.scores)
        order = torch.sort(found.scores, descending=True, stable=True).indices[: min(nodes - 1, found.certain)]
        kept, ranks = order.sort()
        index = torch.zeros(size + 1, dtype=torch.long, device=device)
        index[kept + 1] = torch.arange(1, len(kept) + 1, device=device)
        zero = torch.zeros(1, dtype=torch.long, device=device)
        row_of = torch.full_like(index, -1)
        if expanded:
            fed = torch.cat(expanded)
            row_of[fed] = torch.arange(len(fed), device=device)
        origins = None if found.origins is None else torch.cat([zero, with_ranks(found.origins[kept], ranks)])
        return (
            torch.cat([zero + root, found.tokens[kept]]),
            torch.cat([zero - 1, index[found.parents[kept]]]),
            torch.cat([zero, found.depths[kept]]),
            torch.cat([zero.float(), found.scores[kept]]),
            torch.cat([zero - 1, row_of[kept + 1]]),
            origins,
        )

    def _nodes(self, scale: Calibration | None, branches: Branches | None) -> _Nodes:
        tokens, parents, scores = torch.cat(self.tokens), torch.cat(self.parents), torch.cat(self.scores)
        depths = torch.cat([torch.full_like(each, i + 1) for i, each in enumerate(self.tokens)])
        if scale is None:
            return _Nodes(tokens, parents, depths, scores, None, self.size)
        scores = scores.clamp(min=_NEVER)
        odds, buckets = scale.apply(scores - torch.cat([scores.new_zeros(1), scores])[parents])
        levels, origins = len(self.tokens), draft_codes(buckets, parents)
        if not branches:
            return _Nodes(tokens, parents, depths, _sums(odds, parents, levels)[1:], origins, self.size)
        found = _Nodes(tokens, parents, depths, odds, origins, self.size)
        return _joined(found, branches, levels)


def _joined(draft: _Nodes, branches: Branches, levels: int) -> _Nodes:
    """Add branches to a draft's nodes, whose `scores` still are log-probabilities given their parents.

    A branch node whose path the draft proposed as well is one node with the draft's. Two sources that agree err
    together only if both err: the chance of that is taken for the product of theirs.
    """
    assert draft.origins is not None
    device, size, count = draft.tokens.device, len(draft.tokens), len(branches)
    lists = torch.tensor([branches.tokens, branches.parents, branches.depths, branches.origins(), branches.keys])
    tokens, parents, depths, origins, keys = lists.to(device, non_blocking=True)
    odds = torch.tensor(branches.chances).log().to(device, non_blocking=True)
    own = _sums(keys_of(draft.tokens, draft.depths), draft.parents, levels)[1:]
    same, place = (keys[:, None] == own).to(torch.uint8).max(1)
    merged = same.bool()
    spare = size + torch.arange(count, device=device)  # where a node that the draft lacks gets its place
    place = torch.where(merged, place, spare)
    draft_odds = torch.cat([draft.scores, odds])
    together = torch.log1p(-(1 - draft_odds[place].exp()) * (1 - odds.exp())).clamp(max=-0.005)
    all_odds = draft_odds.index_copy(0, place, torch.where(merged, together, odds))
    all_origins = torch.cat([draft.origins, torch.zeros_like(origins)])
    all_origins = all_origins.index_copy(0, place, all_origins[place] + origins)
    parents = torch.cat([place.new_zeros(1), place + 1])[parents]
    all_parents = torch.cat([draft.parents, parents])
    scores = _sums(all_odds, all_parents, max(levels, *branches.depths))[1:]
    scores[size:].masked_fill_(merged, -torch.inf)  # what is left of a merged one
    # How many merged is known on the device only; those deeper than the draft's levels did not.
    certain = size + sum(depth > levels for depth in branches.depths)
    tokens, depths = torch.cat([draft.tokens, tokens]), torch.cat([draft.depths, depths])
    return _Nodes(tokens, all_parents, depths, scores, all_origins, certain)


def _sums(values: Tensor, parents: Tensor, depth: int) -> Tensor:
    """Return the sum of `values` along the path to each node, [N + 1], the root's 0 first.

    Every round doubles the ancestors that a node has added up.

    Args:
        values: [N].
        parents: Ids, int64 [N].
        depth: Of the deepest node.
    """
    total, above = torch.cat([values.new_zeros(1), values]), torch.cat([parents.new_zeros(1), parents])
    reach = 1
    while reach < depth:
        total, above, reach = total + total[above], above[above], reach * 2
    return total
