"""What a draft is worth: how deep its trees are accepted, measured while decoding."""

from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import Self

from specx.branches import Origin
from specx.tree import Plan

Family = tuple[int, int]  # nodes, beam


class DraftWorth:
    """How deep the draft's trees are accepted where the context does not lead: by family of shapes, and by depth.

    Old rounds fade: depths that are no longer tried come to be judged by those above them, and are tried again.
    From one tree it can be told what a smaller one, or a chain, would have given.

    Args:
        families: (nodes, beam).
        levels: Of the deepest tree.
        usual: What was seen in earlier texts, which goes on learning with this one; None: nothing.
        fade: What a round leaves of those before it.
    """

    _GUESS, _CHAIN_GUESS, _WEIGHT = 0.7, 0.55, 2.0
    _USUAL = 3.0  # the weight of what is usual, in rounds, once it is well known
    _ABOVE = 0.9  # how far the depth above, better or worse than usual, tells what to expect of the next one

    def __init__(self, families: Sequence[Family], levels: int, usual: Self | None = None, fade: float = 0.9) -> None:
        self._right = {family: [0.0] * levels for family in families}
        self._tried = {family: [0.0] * levels for family in families}
        self._widths = {
            family: 1 if family[1] == 1 else min(family[1], max(1, round(family[0] / levels))) for family in families
        }
        self._usual, self._keep = usual, fade
        self._rates: dict[Family, list[float]] = {}
        self._expected: dict[Family, list[float]] = {}
        self._update()

    @property
    def seen(self) -> float:
        """Rounds, and tokens foreseen or not, that still count."""
        return max((tried[0] for tried in self._tried.values()), default=0.0)

    def _rates_of(self, family: Family) -> list[float]:
        guess = self._GUESS if family[1] > 1 else self._CHAIN_GUESS
        levels = len(self._right[family])
        if self._usual is None:
            usual, weights = [guess] * levels, [self._WEIGHT] * levels
        else:
            usual = self._usual._rates[family]
            weights = [min(self._USUAL, self._WEIGHT + tried / 8) for tried in self._usual._tried[family]]
        rates, beyond = list[float](), 0.0
        for right, tried, own, weight in zip(self._right[family], self._tried[family], usual, weights, strict=True):
            expected = min(max(own + self._ABOVE * beyond, 0.01), 0.99)
            rates.append((right + weight * expected) / (tried + weight))
            beyond = rates[-1] - own
        return rates

    def tokens(self, family: Family, levels: int) -> float:
        """Return the expected number of accepted tokens."""
        return self._expected[family][levels - 1]

    def learn(self, plan: Plan, path: Sequence[int]) -> None:
        """Count a round that asked the draft; `path` holds the origins of the accepted nodes."""
        found = [Origin.read(code) for code in path]
        if found and found[0].match:
            return  # the context led
        self._learn(plan, found)

    def _learn(self, plan: Plan, found: Sequence[Origin]) -> None:
        if self._usual is not None:
            self._usual._learn(plan, found)
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
        self._update()

    def foresee(self, ranks: Sequence[int]) -> None:
        """Count tokens that were emitted without the draft, by the rank, from 0, that it would have given each."""
        if not ranks:
            return
        if self._usual is not None:
            self._usual.foresee(ranks)
        keep = self._keep**0.5  # all are of one moment: they fade half as fast as rounds
        weights = [keep**age for age in range(len(ranks) - 1, -1, -1)]
        for family, width in self._widths.items():
            self._fade(family, keep ** len(ranks))
            self._tried[family][0] += sum(weights)
            self._right[family][0] += sum(each for each, rank in zip(weights, ranks, strict=True) if rank < width)
        self._update()

    def _update(self) -> None:
        for family in self._right:
            self._rates[family] = self._rates_of(family)
            self._expected[family] = list(accumulate(accumulate(self._rates[family], mul)))

    def forget(self, tokens: int) -> None:
        """Let what was measured `tokens` tokens ago weigh less, but no less than the first guess."""
        for family, tried in self._tried.items():
            self._fade(family, max(0.5 ** (tokens / 64), min(1.0, self._WEIGHT / max(*tried, 1e-9))))

    def _fade(self, family: Family, kept: float) -> None:
        for counts in (self._right[family], self._tried[family]):
            counts[:] = [count * kept for count in counts]

    def _count(self, family: Family, reached: int, levels: int, weight: float) -> None:
        """Count depths up to the first that was not reached; of a larger tree than was tried, failures count half."""
        self._fade(family, self._keep)
        right, tried = self._right[family], self._tried[family]
        for depth in range(min(reached + 1, levels, len(right))):
            success = depth < reached
            right[depth] += success
            tried[depth] += 1.0 if success else weight
