"""The controller that chooses each round by expected tokens a millisecond. No choice changes the output.

What the context offers is known before the round, what the draft is worth is measured by depth (`worth.DraftWorth`),
and so is what each shape of round costs (`step_costs.StepCosts`).
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from specx.branches import Branches, Calibration, source_of
from specx.config import TreeConfig
from specx.controller import Round
from specx.experience import Experience
from specx.static import BUCKETS
from specx.step_costs import PLAIN, Shape
from specx.stretches import Stretches
from specx.tree import FEW, LOOK_BACK, Plan
from specx.worth import DraftWorth

_STAY = 1.05  # how much better the other choice, with or without the draft, must be
_DOUBT = 1.1  # how much better the draft must be where it has lost more than the share and credit below
_LOSS_SHARE, _LOSS_CREDIT, _KEPT_GAINS = 0.01, 2.0, 8.0  # of all time; in plain steps' time
_SAME = 1.05  # the same among shapes of the draft's tree
_VISIT = 8  # rounds over which the cost of catching up is spread
_PROBE_SHARE = 0.01  # of all time that may be lost by asking a draft that does not seem to pay
_PROBE_CREDIT = 4.0  # plain steps' time that may be lost so in any text, so that its first hundred tokens are looked at
_PROBE_EVERY, _PROBE_AT_MOST = 16, 128  # tokens beside the context's between two probes
_SLOWER = 4  # how many times longer after a probe that fails: what the draft foresees of 64 tokens costs no more
_PLAIN_EVERY, _PLAIN_AT_MOST = 16, 128  # rounds between two plain steps that only tell what one costs
_CLEAR, _SELDOM = 1.3, 4  # how many times plain decoding's pace is beyond doubt, and how much more seldom that is
_OPENING = 1  # rounds of the very first text in which the draft is asked even if that is not expected to pay
_LOOK_AGAIN = 16  # rounds after which costs are looked up again
_RECONSIDER = 4  # rounds in which the context drafts after which the draft is weighed again; four times as many else
_ALONE, _GLANCE = Plan(1, 0, 1, draft=False), Plan(2, 0, 1)  # a glance shows what the draft would have guessed
_LEAST = Shape(1, 2)


@dataclass(slots=True)
class Choice:
    """One thing that a round may do, and what is expected of it."""

    plan: Plan
    shape: Shape
    tokens: float
    ms: float

    @property
    def mode(self) -> str:
        """plain, lookup, chain or tree."""
        if self.shape.levels:
            return "chain" if self.plan.beam == 1 else "tree"
        return "lookup" if self.plan.nodes > 1 else "plain"

    @property
    def rate(self) -> float:
        """Expected tokens a millisecond."""
        return self.tokens / self.ms

    def __str__(self) -> str:
        size = f" {self.plan.nodes} nodes" if self.plan.nodes > 1 else ""
        levels = f" {self.shape.levels} levels" if self.shape.levels else ""
        return f"{self.mode}{size}{levels} ({self.tokens:.2f} tokens in {self.ms:.2f} ms)"


class AutoController:
    """Chooses each round's plan by expected tokens a millisecond.

    Args:
        tree: The largest tree with the draft.
        scale: Of both sources.
        experience: From earlier texts; goes on learning.
        drafts: Whether there is a draft model.
        explain: Told each decision that differs in kind from the one before, in words; None: nobody is.
        copying: Nodes of the largest tree from the context alone, if more than those of `tree`.

    Attributes:
        mode: Of the last plan: plain, lookup, chain, tree, or probe.
    """

    def __init__(
        self,
        tree: TreeConfig,
        scale: Calibration,
        experience: Experience,
        drafts: bool,
        explain: list[str] | None = None,
        copying: int = 1,
    ) -> None:
        self.tree, self.scale, self.costs, self.explain = tree, scale, experience.costs, explain
        self.mode = "plain"
        plans = [replace(plan, scale=scale) for plan in _draft_shapes(tree)] if drafts else []
        self._shapes = [(plan, Shape(plan.depth + 1, plan.nodes, plan.beam)) for plan in plans]
        self._most, self._padded = max(tree.nodes, copying), bucket(tree.nodes)
        self._lookups = [Shape(0, size) for size in _lookup_sizes(tree.nodes, self._most)]
        self._rounds, self._known = 0, dict[Shape, float]()
        self._instead = 1.0  # tokens a millisecond that were expected without the draft when it was asked last
        families = list(dict.fromkeys((plan.nodes, plan.beam) for plan in plans))
        usual = experience.worth(families, tree.depth + 1)
        self.worth = DraftWorth(families, tree.depth + 1, usual)
        self._opening = 0 if usual.seen else _OPENING
        self._led = deque[bool](maxlen=LOOK_BACK)  # of the newest tokens: whether the context led to them
        self._last: Choice | None = None
        self._drafting, self._since_draft = True, 0
        self._pays = True  # whether the draft was worth more than a plain step when it was weighed last
        self._probe_every, self._since_probe = _PROBE_EVERY, 0
        self._spent = self._lost = self._elapsed = 0.0  # milliseconds: by probes, by drafting after all, in all
        self._context = self._asked = 0
        self._plain_every, self._since_plain = _PLAIN_EVERY, 0
        self._stretches = Stretches()

    def plan(self, remaining: int, offer: Branches | None, context: int, waiting: int) -> Plan:
        """Return the most promising plan, or one that finds something out."""
        self._context = context
        if self._rounds % _LOOK_AGAIN == 0:
            self._known.clear()
        self._rounds += 1
        if remaining <= 1 or self.tree.nodes == 1:
            return self._decide(self._plain(context), "no token beyond it is wanted", "plain")
        if not self.costs.known(PLAIN):
            return self._time_plain(context)
        free = self._without_draft(offer, context)
        if not self._shapes:
            return self._decide(free, "the best without a draft", free.mode)
        if not self._is_due(free):
            return self._decide(free, "the draft did not pay lately", free.mode)
        drafted = self._with_draft(remaining, offer, context, waiting)
        if self._wants_plain(max(drafted.rate, free.rate)):
            return self._time_plain(context)
        pace = self._stretches.pace_beyond(max(drafted.rate, free.rate))
        if pace:
            drafted = self._with_draft(remaining, offer, context, waiting, pace)
        margin = self._margin(context)
        better = drafted.tokens * margin - free.tokens > (pace or free.rate) * (drafted.ms - free.ms)
        if free.plan.nodes == 1:
            self._pays = better
        self._instead = free.rate
        if better:
            return self._decide(drafted, "better than", drafted.mode, free)
        if self._asked < self._opening and free.plan.nodes == 1:
            return self._decide(drafted, "to see what the draft is worth here", drafted.mode)
        probe = self._probe(remaining, offer, context, waiting)
        if probe is not None and free.plan.nodes == 1:
            return self._decide(probe, "to see whether the draft pays again; otherwise", "probe", free)
        return self._decide(free, "better than", free.mode, drafted)

    def _margin(self, context: int) -> float:
        """Return what the draft's expected tokens are multiplied by: what is expected of it is a guess, too.

        A draft about as fast as plain decoding seems better in some places and is not. What that has cost in this text
        is known, and counts against it.
        """
        if self._lost > _LOSS_SHARE * self._elapsed + _LOSS_CREDIT * self._ms(PLAIN, context):
            return 1 / _DOUBT
        return _STAY if self._drafting else 1 / _STAY

    def _is_due(self, free: Choice) -> bool:
        """Tell whether the draft is to be weighed: that takes time, and nothing new is known while it is not asked."""
        if self._drafting or self.mode == "probe" or self._asked < self._opening:
            return True
        if self._pays and (free.plan.nodes == 1 or self._rounds % _RECONSIDER == 0):
            return True
        return self._since_probe >= self._probe_every or self._rounds % (4 * _RECONSIDER) == 0

    def learn(self, done: Round) -> str:
        """Take note of cost and acceptance."""
        self._note(done)
        return self.mode

    def _note(self, done: Round) -> None:
        choice, costs = self._last, self.costs
        assert choice is not None
        led = list(self._led)[-len(done.foreseen) :] if done.foreseen else []
        beside = [source_of(code) != "context" for code in done.path]
        self._led.extend(not each for each in beside)
        self._led.append(False)
        self._elapsed += done.ms + done.refresh_ms
        self._stretches.learn(done)
        self._since_plain = 0 if choice.shape == PLAIN else self._since_plain + 1
        shape = choice.shape
        if done.nodes <= shape.nodes // 2 and not shape.levels:
            shape = Shape(0, bucket(done.nodes))
        if not choice.shape.levels:
            costs.add(shape, done.context, done.ms)
            self._since_draft += done.emitted
            self._since_probe += sum(beside) + 1
            return
        late, measured = done.waiting - FEW, costs.known(shape)
        if late > 0:
            costs.add_catch_up(shape, late, done.context, done.ms + done.refresh_ms)
        else:
            costs.add(shape, done.context, done.ms)
            costs.add_refresh(done.refresh_ms)
        if self._since_draft:
            self.worth.forget(self._since_draft)
            self._since_draft = 0
        told = [rank for rank, known in zip(done.foreseen, led, strict=False) if not known]
        self.worth.foresee(told)
        self.worth.learn(choice.plan, done.path)
        self._asked += 1
        if self.mode == "probe":
            self._after_probe(done, len(told))
        else:
            self._probe_every, self._since_probe = max(_PROBE_EVERY, self._probe_every // 2), 0
            if measured:  # else it may have compiled something
                self._weigh(done, choice)

    def _weigh(self, done: Round, choice: Choice) -> None:
        """Count what a round with the draft has lost, or gained; a few steps' gains are kept against bad luck."""
        spent = min(done.ms + done.refresh_ms, 2 * choice.ms)  # no more than that is the draft's doing
        kept = -_KEPT_GAINS * self._ms(PLAIN, done.context)
        self._lost = max(kept, self._lost + spent - done.emitted / self._instead)

    def _after_probe(self, done: Round, told: int) -> None:
        """Ask more rarely from now on, unless it told little: one tree may be chance."""
        plain = self.costs.ms(PLAIN, done.context)
        self._spent = max(0.0, self._spent + done.ms + done.refresh_ms - done.emitted * plain)
        self._since_probe = 0
        if done.path and told < FEW:
            self._probe_every = 0
        elif told >= FEW or not done.foreseen:
            self._probe_every = min(max(_SLOWER * self._probe_every, _PROBE_EVERY), _PROBE_AT_MOST)

    def _decide(
        self, choice: Choice, why: str, mode: str, other: Choice | None = None, drafting: bool | None = None
    ) -> Plan:
        if self.explain is not None and (mode != self.mode or self._last is None):
            why = why if other is None else f"{why} {other}"
            self.explain.append(f"after {self._context} tokens {mode}: {choice}; {why}")
        self.mode, self._last = mode, choice
        if drafting is None:
            drafting = bool(choice.shape.levels) and mode != "probe"
        if drafting and not self._drafting:
            self._plain_every = _PLAIN_EVERY
        self._drafting = drafting
        return choice.plan

    def _wants_plain(self, rate: float) -> bool:
        """Tell whether a plain step is to be timed again: ever more rarely.

        Far more rarely where `rate`, tokens a millisecond, is so much better that no figure would change anything.
        """
        clear = rate * self._ms(PLAIN, self._context) > _CLEAR
        if self._since_plain < self._plain_every * (_SELDOM if clear else 1):
            return False
        self._plain_every = min(2 * self._plain_every, _PLAIN_AT_MOST)
        return True

    def _time_plain(self, context: int) -> Plan:
        why = "to know what a plain step costs"
        return self._decide(self._plain(context), why, "plain", drafting=self._drafting)

    def _plain(self, context: int) -> Choice:
        return Choice(_ALONE, PLAIN, 1.0, self._ms(PLAIN, context))

    def _ms(self, shape: Shape, context: int) -> float:
        """Return the cost of a shape, looked up again every few rounds."""
        if self.costs.rounds < 2 * _LOOK_AGAIN:
            return self.costs.ms(shape, context)
        if shape not in self._known:
            self._known[shape] = self.costs.ms(shape, context) / self.costs.pace
        return self._known[shape] * self.costs.pace

    def _without_draft(self, offer: Branches | None, context: int) -> Choice:
        """Return the best number of the offered nodes, possibly none."""
        best = self._plain(context)
        if not offer:
            return best
        expected, rate, limit = offer.expected(), best.rate, len(offer)
        for shape in self._lookups:
            if shape.nodes > self._padded and limit + 1 < min(shape.nodes, self._most):
                break  # a large shape is taken whole: it pads to its own size only
            count = min(shape.nodes, self._most, limit + 1) - 1
            tokens, ms = 1 + expected[count], self._ms(shape, context)
            if tokens / ms > rate:
                rate = tokens / ms
                best = Choice(Plan(count + 1, 0, 1, draft=False, branches=offer), shape, tokens, ms)
            if count == limit:
                break
        return best

    def _with_draft(
        self, remaining: int, offer: Branches | None, context: int, waiting: int, pace: float = 0.0
    ) -> Choice:
        """Return the best shape of the draft's tree: by its rate, or by what it gains over going on at `pace`."""
        late = self.costs.catch_up_ms(waiting - FEW, context) / _VISIT if waiting > FEW else 0.0
        last = self._last.shape if self._last else None
        expected, leads = (offer.expected(), offer.leading()) if offer else ([0.0], 0.0)
        if not any(self.costs.known(shape) for _, shape in self._shapes):
            return self._drafted(len(self._shapes) - 1, remaining, offer, context, late)  # the others' costs follow
        best, most = 0, -math.inf
        for number, (plan, shape) in enumerate(self._shapes):
            tokens = self._tokens(plan, expected, leads) * (_SAME if shape == last else 1.0)
            ms = self._ms(shape, context) + late
            gain = tokens - pace * ms if pace else tokens / ms
            if gain > most:
                best, most = number, gain
        return self._drafted(best, remaining, offer, context, late)

    def _tokens(self, plan: Plan, expected: list[float], leads: float) -> float:
        """Return what a shape of the draft's tree promises beside what the context offers for the same nodes."""
        levels = plan.depth + 1
        room = max(0, plan.nodes - 1 - levels)
        return (
            1
            + expected[min(room, len(expected) - 1)]
            + (1 - leads) * self.worth.tokens((plan.nodes, plan.beam), levels)
        )

    def _drafted(self, number: int, remaining: int, offer: Branches | None, context: int, late: float) -> Choice:
        plan, shape = self._shapes[number]
        expected, leads = (offer.expected(), offer.leading()) if offer else ([0.0], 0.0)
        tokens = min(self._tokens(plan, expected, leads), float(remaining))
        plan = plan.within(remaining, offer)
        if plan.depth + 1 != shape.levels:
            shape = Shape(plan.depth + 1, plan.nodes, plan.beam)
        return Choice(plan, shape, tokens, self._ms(shape, context) + late)

    def _probe(self, remaining: int, offer: Branches | None, context: int, waiting: int) -> Choice | None:
        """Return the cheapest look at the draft if one is due and what it may lose is within its share of the time."""
        if self._since_probe < self._probe_every:
            return None
        late = self.costs.catch_up_ms(waiting - FEW, context)
        if waiting > FEW:  # what it would have guessed of those tokens tells more than any tree
            probe = Choice(replace(_GLANCE, scale=self.scale), _LEAST, 1.0, self._ms(_LEAST, context) + late)
        else:
            probe = self._drafted(0, remaining, offer, context, late)
        plain = self._ms(PLAIN, context)
        allowed = _PROBE_SHARE * self._elapsed + _PROBE_CREDIT * plain
        return probe if self._spent + probe.ms - plain <= allowed else None


def bucket(nodes: int) -> int:
    """Return the number of rows that a tree of so many nodes is padded to."""
    return next(size for size in BUCKETS if size >= nodes)


def _lookup_sizes(nodes: int, most: int) -> list[int]:
    """Return the sizes of the context's trees to choose from: each may become a CUDA graph, so few large ones."""
    sizes = [size for size in BUCKETS[1:] if size <= bucket(nodes)]
    while sizes and sizes[-1] < most:
        sizes.append(bucket(min(2 * sizes[-1], most)))
    return sizes


def _draft_shapes(tree: TreeConfig) -> Sequence[Plan]:
    """Return the shapes of the draft's trees to choose from, few, as each may become a CUDA graph; cheapest first."""
    depths = sorted({min(1, tree.depth), tree.depth // 2, tree.depth})
    sizes = sorted({size for size in (tree.nodes // 2, tree.nodes) if size >= 4} | {tree.nodes})
    sized = [(min(tree.nodes, bucket(depth + 2)), depth) for depth in depths]
    chains = list(dict.fromkeys(Plan(size, min(depth, size - 2), 1) for size, depth in sized if size > 1))
    trees = [
        Plan(size, depth, tree.beam, tree.tree_threshold)
        for depth in depths[-2:]
        for size in sizes
        if tree.beam > 1 and size >= depth + 2
    ]
    return [*chains, *trees]
