"""What rounds cost, measured while decoding: milliseconds of each shape of round, by length of the context."""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

_SAMPLES = 9  # the newest ones of a shape
_ENOUGH, _MANY = 2, 5  # of them before they are used at all, and before they are believed over better known shapes
_GAP = 16  # rounds without a shape after which its newest ones are no longer compared with those before
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
class _Recent:
    """The newest rounds of a shape at a length, while it is in use: `anchor` is what they would take at a pace of 1."""

    raw: deque[float] = field(default_factory=lambda: deque(maxlen=_MANY))
    anchor: float | None = None
    last: int = 0


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
        self._samples: dict[Shape, dict[int, deque[float]]] = {}
        self._typical: dict[Shape, dict[int, float]] = {}
        self._warm: set[Shape] = set()
        self.pace, self.rounds = 1.0, 0
        self._recent: dict[tuple[Shape, int], _Recent] = {}
        self._refresh = 0.0  # mean milliseconds of rebuilding the draft's cache, a round with the draft
        self._fed = set[int]()  # orders of magnitude of the tokens that waited
        self._late: deque[tuple[int, float]] = deque(maxlen=_SAMPLES)  # tokens that waited, milliseconds they took

    def add(self, shape: Shape, context: int, ms: float) -> None:
        """Take note of a round; the first one of a shape, which may compile or capture, only warms it up."""
        if shape not in self._warm:
            self._warm.add(shape)
            return
        place = bucket_of(context)
        samples = self._samples.setdefault(shape, {}).setdefault(place, deque(maxlen=_SAMPLES))
        samples.append(ms / self.pace)
        self._follow((shape, place), ms, samples)
        if len(samples) >= _ENOUGH:
            self._typical.setdefault(shape, {})[place] = _typical(samples)

    def _follow(self, kind: tuple[Shape, int], ms: float, samples: deque[float]) -> None:
        """Notice when the whole machine has become slower or faster, by a shape that goes on being measured.

        At one length of the context: a longer one makes a shape dearer, not the machine slower.

        Costs are kept as they would be at a pace of 1, or a shape in use would seem dear beside one that was measured
        when nothing else ran.
        """
        self.rounds += 1
        recent = self._recent.setdefault(kind, _Recent())
        if self.rounds - recent.last > _GAP:
            recent.raw.clear()
            recent.anchor = None
        recent.last = self.rounds
        recent.raw.append(ms)
        if len(recent.raw) < _MANY:
            return
        if recent.anchor is None:
            before = list(samples)[:-_MANY]
            recent.anchor = _typical(before) if before else _typical(recent.raw) / self.pace
        self.pace = _typical(recent.raw) / recent.anchor
        for back in range(1, min(_MANY, len(samples)) + 1):
            samples[-back] = recent.raw[-back] / self.pace

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


def _typical(samples: Iterable[float]) -> float:
    """Return the lower quartile: disturbances only slow down."""
    ordered = sorted(samples)
    return ordered[(len(ordered) - 1) // 4]


def _dearer(nodes: int, levels: int = 0) -> float:
    return 1 + _DEARER_NODE * (nodes - 1) + _DEARER_LEVEL * levels


def bucket_of(context: int) -> int:
    """Return which bucket a context length falls into: two an octave, from 256 tokens."""
    return int(2 * math.log2(max(context, 256)))
