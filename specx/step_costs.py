"""What rounds cost, measured while decoding: milliseconds of each shape of round, by length of the context."""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

_SAMPLES = 9  # the newest ones of a shape
_ENOUGH, _MANY = 2, 5  # of them before they are used at all, and before they are believed over better known shapes
_WINDOW = 5  # newest rounds that say how fast the machine is
# What of them is believed. Disturbances only slow down, hence less than the median; but a round whose pace was not yet
# known seems cheap, which the lowest ones must not decide.
_USUAL, _LOW = 0.4, 0.25  # of a shape's samples, of the votes on the pace
_DEARER_NODE, _DEARER_LEVEL, _WAITING = 0.02, 0.1, 0.005  # first guesses, of a plain step: low, so that all is tried


class CostPrior(Protocol):
    """Costs that are known before anything was decoded, from `specx tune`."""

    def verify_ms(self, nodes: int, context: int) -> float:
        """Return the milliseconds of verifying a tree of `nodes` nodes after `context` tokens."""
        ...

    def level_ms(self, context: int) -> float:
        """Return the milliseconds of one level of a draft's tree after `context` tokens."""
        ...


class Shape(NamedTuple):  # hashed and compared a dozen times a round, which a dataclass does in Python
    """A kind of round whose cost is one figure: levels that the draft drafts (0: it is not asked), rows, branching."""

    levels: int
    nodes: int
    beam: int = 1

    def covers(self, other: "Shape") -> bool:
        """Tell whether a round of this shape does all that one of the other does."""
        return self.levels >= other.levels and self.nodes >= other.nodes and self.beam >= other.beam


PLAIN = Shape(0, 1)


@dataclass(slots=True)
class _Sample:
    """A measured round: its milliseconds, and the machine's pace at that time as far as it is known."""

    raw: float
    pace: float


class StepCosts:
    """Costs of one target with its draft. Outlives a generation: it knows nothing of any text.

    Args:
        prior: Where figures come from before there are own ones; they are scaled to the plain steps measured here.

    Attributes:
        pace: Milliseconds now over milliseconds when the first shapes were measured, the same for all of them.
        rounds: Measured so far.
    """

    def __init__(self, prior: CostPrior | None = None) -> None:
        self.prior = prior
        self._samples: dict[Shape, dict[int, deque[_Sample]]] = {}
        self._typical: dict[Shape, dict[int, float]] = {}
        self._warm: set[Shape] = set()
        self.pace, self.rounds = 1.0, 0
        self._newest: deque[tuple[Shape, int, _Sample, bool]] = deque(maxlen=_WINDOW)
        self._refresh = 0.0  # mean milliseconds of rebuilding the draft's cache, a round with the draft
        self._fed = set[int]()  # orders of magnitude of the tokens that waited
        self._late: deque[tuple[int, float]] = deque(maxlen=_SAMPLES)  # tokens that waited, milliseconds they took

    def add(self, shape: Shape, context: int, ms: float) -> None:
        """Take note of a round; the first one of a shape, which may compile or capture, only warms it up."""
        if shape not in self._warm:
            self._warm.add(shape)
            return
        place, sample = bucket_of(context), _Sample(ms, self.pace)
        samples = self._samples.setdefault(shape, {}).setdefault(place, deque(maxlen=_SAMPLES))
        early = len(samples) < _SAMPLES
        if early:
            samples.append(sample)
        self._newest.append((shape, place, sample, early))
        self.rounds += 1
        self.pace = sample.pace = self._pace_of_newest()
        if len(self._newest) == _WINDOW:
            self._settle(*self._newest[_WINDOW // 2])
        if early:
            self._conclude(shape, place)

    def _settle(self, shape: Shape, place: int, sample: _Sample, early: bool) -> None:
        """Take the round in the middle of the newest ones for good: what came after it is known now.

        Beside a plain step it is compared with that one; among other rounds it says nothing of what its shape takes.
        """
        sample.pace = self.pace
        if early:
            self._conclude(shape, place)
        if early or shape == PLAIN:
            return
        beside = [self._newest[_WINDOW // 2 + side] for side in (-1, 1)]
        plain = [
            each.raw / self._typical[PLAIN][at]
            for among, at, each, _ in beside
            if among == PLAIN and at in self._typical.get(PLAIN, ())
        ]
        if plain:
            sample.pace = min(plain)
            self._samples[shape][place].append(sample)
            self._conclude(shape, place)

    def _conclude(self, shape: Shape, place: int) -> None:
        samples = self._samples[shape][place]
        if len(samples) >= _ENOUGH:
            self._typical.setdefault(shape, {})[place] = _quantile(_USUAL, [each.raw / each.pace for each in samples])

    def _pace_of_newest(self) -> float:
        """Return the pace at which the newest rounds were run: a low quantile of what they took over what is usual.

        Few rounds, so that the edge is kept where the pace jumps. At one length of the context each: a longer one makes
        a shape dearer, not the machine slower. A plain step counts as much as all others, or a shape that was measured
        at a wrong pace would prove itself right for as long as it is in use.
        """
        votes = [
            ratio
            for shape, place, sample, _ in self._newest
            if place in self._typical.get(shape, ())
            for ratio in [sample.raw / self._typical[shape][place]] * (_WINDOW - 1 if shape == PLAIN else 1)
        ]
        return _quantile(_LOW, votes) if len(votes) > _WINDOW // 2 else self.pace

    def add_refresh(self, ms: float) -> None:
        """Take note of what a round with the draft spent on rebuilding its cache, 0 for most."""
        self._refresh += (ms / self.pace - self._refresh) / 16

    def add_catch_up(self, shape: Shape, tokens: int, context: int, ms: float) -> None:
        """Take note of a round of a shape that fed the draft `tokens` tokens more than usual and took `ms`.

        Of each order of magnitude of tokens, the first such round only warms it up.
        """
        kind = tokens.bit_length()
        if kind in self._fed:
            self._late.append((tokens, max(0.0, ms - self.ms(shape, context)) / self.pace))
        self._fed.add(kind)

    def known(self, shape: Shape) -> bool:
        """Tell whether a shape was measured, at any length."""
        return shape in self._typical

    def ms(self, shape: Shape, context: int) -> float:
        """Return the expected milliseconds of a round; in units of a plain step while nothing was measured."""
        own = self._measured(shape, bucket_of(context))
        if own is None:
            own = self._guess(shape, context)
        elif shape.levels and self._count(shape) < _MANY:
            own = min(own, self._guess(shape, context))  # or what seemed dear once would not be tried again
        return (own + (self._refresh if shape.levels else 0.0)) * self.pace

    def _count(self, shape: Shape) -> int:
        return sum(map(len, self._samples.get(shape, {}).values()))

    def _guess(self, shape: Shape, context: int) -> float:
        """Return what other shapes let expect of one: no more than a larger one takes."""
        whole = self._verify(shape.nodes, context) + shape.levels * self._level(shape, context)
        larger = [each for each in self._typical if each != shape and each.covers(shape)]
        return min([whole, *(self._measured(each, bucket_of(context)) or whole for each in larger)])

    def catch_up_ms(self, tokens: int, context: int) -> float:
        """Return the expected milliseconds of feeding the draft `tokens` waiting tokens more than usual.

        Part of it, rebuilding the cache, does not depend on how many they are: what the nearest number took, and for
        those beyond it little.
        """
        if tokens <= 0:
            return 0.0
        near, ms = min(self._late, key=lambda each: abs(each[0] - tokens), default=(0, 0.0))
        return (ms + max(0, tokens - near) * _WAITING * self._plain(context)) * self.pace

    def _measured(self, shape: Shape, place: int) -> float | None:
        found = self._typical.get(shape)
        if not found:
            return None
        near = place
        if place not in found or len(self._samples[shape][place]) < _MANY:
            counts = {other: min(len(self._samples[shape][other]), _MANY) for other in found}
            near = min(found, key=lambda other: (-counts[other], abs(other - place)))
        plain = self._typical.get(PLAIN, {})
        scale = plain[place] / plain[near] if place in plain and near in plain and shape != PLAIN else 1.0
        return found[near] * scale

    def _verify(self, nodes: int, context: int) -> float:
        place = bucket_of(context)
        own = self._measured(Shape(0, nodes), place)
        if own is not None:
            return own
        plain = self._plain(context)
        if self.prior is not None:
            return plain * self.prior.verify_ms(nodes, context) / self.prior.verify_ms(1, context)
        most = max((each.nodes for each in self._typical if each.levels == 0 and 1 < each.nodes < nodes), default=0)
        if not most:
            return plain * _dearer(nodes)
        below = self._measured(Shape(0, most), place) or plain
        return max(below, plain + (below - plain) * (nodes - 1) / (most - 1))

    def _plain(self, context: int) -> float:
        """Return the milliseconds of a plain step, from those of other shapes where it was not measured."""
        place = bucket_of(context)
        own = self._measured(PLAIN, place)
        if own is None and self._typical:
            shape = min(self._typical, key=lambda each: (each.levels, each.nodes))
            own = (self._measured(shape, place) or 0.0) / _dearer(shape.nodes, shape.levels)
        if own is None:
            own = 1.0 if self.prior is None else self.prior.verify_ms(1, context)
        return own

    def _level(self, shape: Shape, context: int) -> float:
        place = bucket_of(context)
        known = [each for each in self._typical if each.levels and each != shape]
        known = known or [each for each in self._typical if each.levels]
        if known:
            best = max(known, key=lambda each: (self._count(each) >= _MANY, each.beam == shape.beam, each.levels))
            whole = self._measured(best, place) or 0.0
            return max(whole - self._verify(best.nodes, context), 0.02 * whole) / best.levels
        if self.prior is not None:
            scale = self._plain(context) / self.prior.verify_ms(1, context)
            return self.prior.level_ms(context) * scale
        return _DEARER_LEVEL * self._plain(context)


def _quantile(share: float, samples: Iterable[float]) -> float:
    ordered = sorted(samples)
    return ordered[int((len(ordered) - 1) * share)]


def _dearer(nodes: int, levels: int = 0) -> float:
    return 1 + _DEARER_NODE * (nodes - 1) + _DEARER_LEVEL * levels


def bucket_of(context: int) -> int:
    """Return which bucket a context length falls into: two an octave, from 256 tokens."""
    return int(2 * math.log2(max(context, 256)))
