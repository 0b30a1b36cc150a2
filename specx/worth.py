"""What a draft is worth: how deep its trees are accepted, measured while decoding."""

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

from specx.branches import Origin
from specx.tree import Plan


class DraftWorth:
    """How deep the draft's trees are accepted where the context does not lead: by family of shapes, and by depth.

    Old rounds fade. From one tree it can be told what a smaller one, or a chain, would have given.
    """

    _GUESS, _WEIGHT, _FADE = 0.75, 2.0, 0.9

    def __init__(self, families: Sequence[tuple[int, int]], levels: int) -> None:
        """Args: families: (nodes, beam); levels: of the deepest tree."""
        guesses = {family: self._GUESS if family[1] > 1 else self._GUESS - 0.15 for family in families}
        self._right = {family: [guess * self._WEIGHT] * levels for family, guess in guesses.items()}
        self._tried = {family: [self._WEIGHT] * levels for family in families}
        self._expected = {family: self._sums(family) for family in families}

    def _sums(self, family: tuple[int, int]) -> list[float]:
        pairs = zip(self._right[family], self._tried[family], strict=True)
        return list(accumulate(accumulate((right / tried for right, tried in pairs), mul)))

    def tokens(self, family: tuple[int, int], levels: int) -> float:
        """Return the expected number of accepted tokens."""
        return self._expected[family][levels - 1]

    def learn(self, plan: Plan, path: Sequence[int]) -> None:
        """Count a round that asked the draft; `path` holds the origins of the accepted nodes."""
        found = [Origin.read(code) for code in path]
        if found and found[0].match:
            return  # the context led
        levels = plan.depth + 1
        for family in self._right:
            nodes, beam = family
            reached = 0
            for origin in found:
                if origin.bucket is None or origin.rank >= nodes or (beam == 1 and not origin.draft_first):
                    break
                reached += 1
            asked = nodes <= plan.nodes and beam <= plan.beam
            self._count(family, reached, levels, 1.0 if asked else 0.5)
            self._expected[family] = self._sums(family)

    def forget(self, tokens: int) -> None:
        """Let what was measured `tokens` tokens ago weigh less."""
        for family, tried in self._tried.items():
            for depth, count in enumerate(tried):
                less = max(1.0, count * 0.5 ** (tokens / 64), min(count, self._WEIGHT)) / count
                tried[depth] *= less
                self._right[family][depth] *= less

    def _count(self, family: tuple[int, int], reached: int, levels: int, weight: float) -> None:
        """Count depths up to the first that was not reached; of a larger tree than was tried, failures count half."""
        right, tried = self._right[family], self._tried[family]
        for depth in range(min(reached + 1, levels, len(right))):
            success = depth < reached
            share = 1.0 if success else weight
            right[depth] = right[depth] * self._FADE + share * success
            tried[depth] = tried[depth] * self._FADE + share
