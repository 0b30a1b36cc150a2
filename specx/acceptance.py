"""Which drafted tokens are kept: the walk down a tree. Pure functions.

At every node one token is taken from the target's own processed distribution (its argmax, or a draw), and the walk
follows the child that equals it. Draws at different depths are independent, children of a node hold distinct tokens,
and no tree depends on draws of tokens not emitted yet (what it may depend on: tokens, costs, the clock), so each
emitted token is exactly one draw from the target; for such a tree no rule accepts more.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specx.tree import DraftTree


@dataclass(frozen=True, slots=True)
class Walk:
    """A finished walk.

    Attributes:
        path: Node indices from the root to the deepest accepted node.
        tokens: What the step emits: the accepted drafted tokens, then the bonus token of the last node.
        drafted: How many of the emitted tokens the draft had proposed.
    """

    path: tuple[int, ...]
    tokens: tuple[int, ...]
    drafted: int

    def cut(self, count: int) -> "Walk":
        """Return the walk that emits only its first `count` tokens."""
        if count >= len(self.tokens):
            return self
        return Walk(self.path[:count], self.tokens[:count], min(self.drafted, count))


def walk(tree: DraftTree, chosen: Tensor | Sequence[int]) -> Walk:
    """Follow the target's tokens down the tree.

    Args:
        tree: The verified tree, T nodes.
        chosen: The target's token after each node, int64 [T]; entries of nodes off the walk are not read.
    """
    tokens, parents, _, _, taken = tree.lists(torch.as_tensor(chosen, device=tree.tokens.device))
    children = {place: node for node, place in enumerate(zip(parents, tokens, strict=True))}
    path, emitted = [0], []
    while True:
        token = taken[path[-1]]
        emitted.append(token)
        child = children.get((path[-1], token))
        if child is None:
            return Walk(tuple(path), tuple(emitted), len(path) - 1)
        path.append(child)
