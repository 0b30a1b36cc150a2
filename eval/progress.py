"""How long the rest will take."""

import statistics
import time
from collections.abc import Sequence

from specx.eval.units import Unit


class Remaining:
    """Guesses the seconds left from what units of the same kind and length took.

    Args:
        units: All that are to be done.

    Attributes:
        total: How many there are.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        self.total, self._left = len(units), {unit.number: unit for unit in units}
        self._since = time.monotonic()  # with several workers too: what counts is how often one is finished
        self._took: dict[tuple[str, int], list[float]] = {}

    @property
    def left(self) -> int:
        """Units that are not done."""
        return len(self._left)

    def done(self, unit: Unit) -> None:
        """Note that a unit was finished now."""
        now = time.monotonic()
        self._took.setdefault((unit.measure, unit.context), []).append(now - self._since)
        self._since = now
        self._left.pop(unit.number, None)

    def seconds(self) -> float | None:
        """Return the seconds left; None before anything was done.

        A length that was not measured yet counts in proportion to the nearest one that was; a measurement of which
        nothing is known, as the mean of all.
        """
        means = {key: statistics.mean(values) for key, values in self._took.items()}
        if not means:
            return None
        return sum(self._guess(means, unit) for unit in self._left.values())

    def words(self) -> str:
        """Return the time left as people say it."""
        seconds = self.seconds()
        return "some time" if seconds is None else f"about {spoken(seconds)}"

    @staticmethod
    def _guess(means: dict[tuple[str, int], float], unit: Unit) -> float:
        near = [(abs(context - unit.context), context) for measure, context in means if measure == unit.measure]
        if not near:
            return statistics.mean(means.values())
        context = min(near)[1]
        return means[unit.measure, context] * max(1.0, unit.context / max(context, 1))


def spoken(seconds: float) -> str:
    """Return a duration in words: "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
