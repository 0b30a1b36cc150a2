"""What each round may spend. A fixed plan; `decoding` asks again before every tree."""

from specx.config import TreeConfig
from specx.tree import Plan


class FixedController:
    """Always the configured tree.

    Args:
        tree: Its size; None: no draft, one node a round.
    """

    def __init__(self, tree: TreeConfig | None) -> None:
        self._plan = Plan(1, 0, 1)
        if tree is not None:
            self._plan = Plan(tree.nodes, tree.depth, tree.beam, tree.tree_threshold, tree.tree_shape)

    def plan(self, remaining: int) -> Plan:
        """Return the plan of the next round, `remaining` being the tokens still wanted."""
        return self._plan.within(remaining)
