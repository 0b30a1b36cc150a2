"""How often the context begins to lead along a text, and what that makes of the tokens that a draft adds in between."""

from specx.branches import source_of
from specx.controller import Round

_FADE = 0.97  # what a token, or a round that the context led, leaves of those before it
_ENOUGH = 8  # tokens beside the stretches before anything is said
_AHEAD = 2  # how far ahead, in tokens, a drafted token stands


class Stretches:
    """Stretches of a text to which the context leads, so that lookup gives their tokens faster than any draft."""

    def __init__(self) -> None:
        self._astray = self._entered = 0.0  # tokens beside them; how often one began
        self._tokens = self._ms = 0.0  # in them
        self._inside = False

    def learn(self, done: Round) -> None:
        """Take note of a round."""
        if done.path and source_of(done.path[0]) != "draft":
            self._entered += not self._inside
            self._tokens, self._ms = _FADE * self._tokens + done.emitted, _FADE * self._ms + done.ms
            self._inside = True
            return
        kept = _FADE**done.emitted
        self._entered, self._astray = kept * self._entered, kept * self._astray + done.emitted
        self._inside = False

    def pace_beyond(self, best: float) -> float:
        """Return how fast tokens are expected from here on, in tokens a millisecond; 0.0: no faster than `best`, now.

        A tree that is drafted between two stretches runs into the next one, whose tokens would have come faster: what
        it is worth is not what it saves of plain steps.
        """
        if self._astray < _ENOUGH or self._tokens <= best * self._ms:
            return 0.0
        led = 1 - (1 - min(1.0, self._entered / self._astray)) ** _AHEAD
        return 1 / ((1 - led) / best + led * self._ms / self._tokens)
