"""What each round may spend; `decoding` asks before every tree. `auto_controller` is the one that chooses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from specx.branches import Branches, Calibration
from specx.config import TreeConfig
from specx.tree import Plan


@dataclass(slots=True)
class Round:
    """What came of a round.

    Attributes:
        plan: What it was allowed.
        nodes: Of the tree that was verified.
        path: Origins of the accepted nodes, root left out.
        emitted: Tokens.
        ms: All of it, but for `refresh_ms`, that of rebuilding the draft's cache.
        context: Tokens before it.
        waiting: Tokens that waited for the draft, root included.
        drafts: Whether there is a draft model.
        foreseen: See `draft.Draft`; the last one is the root's.
    """

    plan: Plan
    nodes: int
    path: Sequence[int]
    emitted: int
    ms: float
    refresh_ms: float
    context: int
    waiting: int
    drafts: bool
    foreseen: Sequence[int] = ()


class Controller(Protocol):
    """Plans rounds."""

    def plan(self, remaining: int, offer: Branches | None, context: int, waiting: int) -> Plan:
        """Return the plan of the next round.

        Args:
            remaining: Tokens still wanted.
            offer: What the context offers for it.
            context: Tokens so far.
            waiting: Tokens that the draft has not seen, root included.
        """
        ...

    def learn(self, done: Round) -> str:
        """Take note of what came of it; return its mode: plain, lookup, chain, tree or probe."""
        ...


class FixedController:
    """Always the configured tree.

    Args:
        tree: Its size; None: nothing drafts, one node a round.
        scale: Of both sources, where the context drafts.
    """

    def __init__(self, tree: TreeConfig | None, scale: Calibration | None = None) -> None:
        self._plan = Plan(1, 0, 1)
        if tree is not None:
            self._plan = Plan(tree.nodes, tree.depth, tree.beam, tree.tree_threshold, tree.tree_shape, scale=scale)

    def plan(self, remaining: int, offer: Branches | None, context: int, waiting: int) -> Plan:
        """Return the configured plan."""
        return self._plan.within(remaining, offer)

    def learn(self, done: Round) -> str:
        """Learn nothing; return how the round was drafted."""
        if done.plan.nodes == 1 or done.nodes == 1:
            return "plain"
        if not done.drafts:
            return "lookup"
        return "chain" if done.plan.beam == 1 else "tree"
