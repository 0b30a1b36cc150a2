"""What decoding with a target and its draft was like so far: all that the controller takes from one text to the next.

Nothing of the texts themselves: milliseconds, and how often whose guesses were right.
"""

from collections.abc import Sequence

from specx.lookup import MatchRates
from specx.step_costs import CostPrior, StepCosts
from specx.worth import DraftWorth, Family

_FADE = 1 - 1 / 64  # of rounds with the draft, over all texts


class Experience:
    """What is known of one target with one draft.

    Args:
        prior: Costs from before anything was decoded.

    Attributes:
        costs: Of rounds.
        matches: How often the context was right, by length of the match.
    """

    def __init__(self, prior: CostPrior | None = None) -> None:
        self.costs, self.matches = StepCosts(prior), MatchRates()
        self._worth: dict[tuple[tuple[Family, ...], int], DraftWorth] = {}

    def worth(self, families: Sequence[Family], levels: int) -> DraftWorth:
        """Return how deep trees of these shapes are usually accepted; see `worth.DraftWorth`."""
        key = tuple(families), levels
        if key not in self._worth:
            self._worth[key] = DraftWorth(families, levels, fade=_FADE)
        return self._worth[key]
