"""What a draft is worth: how deep its trees are accepted, measured while decoding."""

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

from specx.branches import Origin
from specx.tree import Plan


class DraftWorth:
    """How deep the draft's trees are accepted where the context does not lead: by family of shapes, and by depth.

    Old rounds fade: depths that are no longer tried come to be judged by those above them, and are tried again.
    From one tree it can be told what a smaller one, or a chain, would have given.
    """

    _GUESS, _CHAIN_GUESS, _WEIGHT, _FADE = 0.7, 0.55, 2.0, 0.9
    _ABOVE = 0.9  # how far the depth above tells what to expect of the next one; the rest is the first guess

    def __init__(self, families: Sequence[tuple[int, int]], levels: int) -> None:
        """Args: families: (nodes, beam); levels: of the deepest tree."""
        self._right = {family: [0.0] * levels for family in families}
        self._tried = {family: [0.0] * levels for family in families}
        self._expected = {family: self._sums(family) for family in families}

    def _sums(self, family: tuple[int, int]) -> list[float]:
        guess = expected = self._GUESS if family[1] > 1 else self._CHAIN_GUESS
        rates = list[float]()
        for right, tried in zip(self._right[family], self._tried[family], strict=True):
            rate = (right + self._WEIGHT * expected) / (tried + self._WEIGHT)
            rates.append(rate)
            expected = self._ABOVE * rate + (1 - self._ABOVE) * guess
        return list(accumulate(accumulate(rates, mul)))

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
        """Let what was measured `tokens` tokens ago weigh less, but no less than the first guess."""
        for family, tried in self._tried.items():
            self._fade(family, max(0.5 ** (tokens / 64), min(1.0, self._WEIGHT / max(*tried, 1e-9))))

    def _fade(self, family: tuple[int, int], kept: float) -> None:
        for counts in (self._right[family], self._tried[family]):
            counts[:] = [count * kept for count in counts]

    def _count(self, family: tuple[int, int], reached: int, levels: int, weight: float) -> None:
        """Count depths up to the first that was not reached; of a larger tree than was tried, failures count half."""
        self._fade(family, self._FADE)
        right, tried = self._right[family], self._tried[family]
        for depth in range(min(reached + 1, levels, len(right))):
            success = depth < reached
            right[depth] += success
            tried[depth] += 1.0 if success else weight
