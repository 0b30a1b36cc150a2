"""What steps cost on one machine, and the tree that brings most tokens for it. Numbers only: no torch here."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from specx.config import TreeConfig

# Of the draft's first choice, where nothing was measured: a middling draft, so that no extreme tree is chosen.
DEFAULT_ACCEPTANCE = 0.6
_NODES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_BEAMS = (1, 2, 3, 4, 6, 8)
DEEPEST = 12
_WORTH = 1.005  # a larger tree must be better by more than this factor: a measurement knows no better


@dataclass(frozen=True, slots=True)
class Costs:
    """Measured milliseconds of a target and its draft.

    Attributes:
        contexts: Tokens in the target's cache, ascending.
        nodes: Sizes of verified trees, ascending.
        verify: Milliseconds of a verification, by context, then by nodes.
        level: Milliseconds of a level of a draft's tree, by context.
        beam: Branching that levels were measured with.
        rest: Milliseconds of a round outside verification and draft.
        tau: Tokens a step of `tree` brought on ordinary text; None: not measured.
        tree: Nodes, depth and beam that `tau` was measured with.

    Raises:
        ValueError: If the numbers do not fit together.
    """

    contexts: tuple[int, ...]
    nodes: tuple[int, ...]
    verify: tuple[tuple[float, ...], ...]
    level: tuple[float, ...]
    beam: int
    rest: float = 0.0
    tau: float | None = None
    tree: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        axes = (self.contexts, self.nodes)
        ascend = all(axis and axis[0] > 0 and list(axis) == sorted(set(axis)) for axis in axes)
        fits = len(self.verify) == len(self.level) == len(self.contexts)
        fits = fits and all(len(row) == len(self.nodes) for row in self.verify)
        times = [ms for row in (*self.verify, self.level) for ms in row]
        whole = all(type(number) is int for number in (*self.contexts, *self.nodes, self.beam, *(self.tree or ())))
        known = all(math.isfinite(ms) and ms > 0 for ms in times) and math.isfinite(self.rest) and self.rest >= 0
        if not (ascend and fits and whole and known and self.beam > 0):
            raise ValueError("these costs do not fit together")
        if self.tau is not None and not (math.isfinite(self.tau) and self.tau >= 1 and len(self.tree or ()) == 3):
            raise ValueError(f"a tau of {self.tau} cannot have been measured with the tree {self.tree}")

    def verify_ms(self, nodes: int, context: int) -> float:
        """Return the milliseconds of verifying `nodes` nodes, root included, behind `context` tokens."""
        return _at(self.contexts, [_at(self.nodes, row, nodes) for row in self.verify], context)

    def level_ms(self, context: int) -> float:
        """Return the milliseconds of one level of the draft's tree behind `context` tokens."""
        return _at(self.contexts, self.level, context)

    def round_ms(self, tree: TreeConfig, context: int) -> float:
        """Return the milliseconds of a round: the tree's levels, its verification, and the rest."""
        drafting = (tree.depth + 1) * self.level_ms(context) if tree.nodes > 1 else 0.0
        return self.verify_ms(tree.nodes, context) + drafting + self.rest

    @property
    def acceptance(self) -> float:
        """How often the target takes the draft's first choice: what explains the measured tau, or the default."""
        if self.tau is None or self.tree is None:
            return DEFAULT_ACCEPTANCE
        return acceptance_of(self.tau, TreeConfig(*self.tree))

    def best_tree(self, context: int, deepest: int = DEEPEST) -> TreeConfig:
        """Return the tree with most expected tokens a millisecond behind `context` tokens.

        That is `expected_tokens` over `round_ms`, for all shapes whose costs were measured; of two shapes that are
        about as good, the smaller one. It always drafts: whether a draft pays at all, the text itself must show.
        """
        choices = acceptance_by_rank(self.acceptance, max(_BEAMS))
        best, best_rate = TreeConfig(2, 0, 1), 0.0
        for beam in (each for each in _BEAMS if each <= self.beam):  # wider levels would cost more than was measured
            for depth, tokens in enumerate(_expected(choices, beam, min(deepest, DEEPEST))):
                for nodes in (each for each in _NODES if each <= min(self.nodes[-1], len(tokens))):
                    tree = TreeConfig(nodes, depth, beam)
                    rate = tokens[nodes - 1] / self.round_ms(tree, context)
                    if nodes > depth + 1 and rate > best_rate * _WORTH:
                        best, best_rate = tree, rate
        return best


def _at(places: Sequence[int], values: Sequence[float], place: int) -> float:
    """Interpolate linearly; below the first place it stays constant, above the last one it grows as before it."""
    if place <= places[0] or len(places) == 1:
        return values[0]
    right = next((i for i, each in enumerate(places) if each >= place), len(places) - 1)
    slope = (values[right] - values[right - 1]) / (places[right] - places[right - 1])
    if place > places[right]:
        return values[right] + max(0.0, slope) * (place - places[right])
    return values[right - 1] + slope * (place - places[right - 1])


def acceptance_by_rank(first: float, ranks: int) -> list[float]:
    """Return how likely the target's token is the draft's choice number 1, 2, ..., `ranks`, at every node alike.

    That acceptance depends on the rank alone is Sequoia's assumption (arXiv 2402.12374, section 3). Here each choice
    is taken (1 - first) / 2 times as often as the one before it, which is close to the bundled pair (0.89, 0.07, 0.02).
    """
    return [first * ((1 - first) / 2) ** rank for rank in range(ranks)]


def expected_tokens(tree: TreeConfig, first: float) -> float:
    """Return the tokens that a round with `tree` is expected to bring, bonus token included.

    The target's token after an accepted node is one more token, so that they are the root's 1 plus the probability of
    every drafted node: the product of its path's choices (OPT-Tree's E(A), arXiv 2406.17276). The tree is grown as
    `tree.grow` grows it.

    Args:
        first: How often the target takes the draft's first choice; see `acceptance_by_rank`.
    """
    *_, tokens = _expected(acceptance_by_rank(first, tree.beam), tree.beam, tree.depth)
    return tokens[min(tree.nodes, len(tokens)) - 1]


def _expected(choices: Sequence[float], beam: int, depth: int) -> Iterator[list[float]]:
    """Yield for depths 0, 1, ..., `depth` the expected tokens of the best 1, 2, ... nodes."""
    pool: list[float] = []
    frontier = [1.0]
    for _ in range(depth + 1):
        grown = sorted((chance * each for chance in frontier for each in choices[:beam]), reverse=True)
        pool, frontier = pool + grown, grown[:beam]
        yield list(accumulate(sorted(pool, reverse=True), initial=1.0))


def acceptance_of(tau: float, tree: TreeConfig) -> float:
    """Return the acceptance of the draft's first choice with which `expected_tokens` of `tree` is `tau`."""
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tokens(tree, middle) < tau else (low, middle)
    return high
