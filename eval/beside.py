"""Settings that write one given text side by side: they are compared at the same pace of the machine, whatever it is.

The text is given, so that all write the same tokens. Free generations compare settings badly: in bfloat16 they part at
a near tie, and the one that falls into a loop looks fast.
"""

import copy
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specx.adapters.lookup import LookupModel
from specx.api import SpeculativeModel
from specx.config import Settings
from specx.decoding import decode
from specx.draft import DraftModel
from specx.experience import Experience
from specx.generation import Generation, Piece
from specx.target import Target
from specx.tree import DraftTree

STRETCH = 16  # tokens that a setting writes before the next one has its turn: a machine's pace may change in a second


class GivenText:
    """Lets the target say a given text, so that what drafting is worth along it is ours to choose."""

    mode = "given text"

    def __init__(self, text: Tensor) -> None:
        self.text = text

    def choose(self, logits: Tensor, tree: DraftTree, ids: Tensor) -> Tensor:
        """Return the text's token after each node; -1 beyond its end."""
        places = len(ids) + 1 + tree.depths.to(self.text.device)
        inside = places < len(self.text)
        return torch.where(inside, self.text[places.clamp(max=len(self.text) - 1)], -1).to(logits.device)


@dataclass(frozen=True, slots=True)
class Place:
    """A text whose beginning a target has read.

    Attributes:
        ids: The prompt, int64 [L].
        text: The prompt and what is to be written, int64 [N].
        target: Has room for all of it, and gives what the draft may read of it.
    """

    ids: Tensor
    text: Tensor
    target: Target

    @classmethod
    def after(cls, model: SpeculativeModel, text: Tensor, prompt: int) -> "Place":
        """Let the target read the first `prompt` tokens of a text."""
        text = text.to(model.engine.device)
        ids, taps = text[:prompt], model.draft.taps if model.draft else ()
        target = Target(model.engine, len(text) + 256, model.engine.score_layer(), tuple(taps), record=True)
        target.prefill(ids)
        return cls(ids, text, target)


class Writer:
    """One setting that writes a text along with others, all in one target's cache.

    What they write is the same, so that the cache of one is that of all; and two caches of the same size may differ by
    3 % in what reading them takes. What a draft reads of the target is taken from it only while there is one.

    Args:
        name: Of the setting.
        draft: None: nothing drafts.
    """

    def __init__(
        self,
        name: str,
        model: SpeculativeModel,
        draft: DraftModel | None,
        settings: Settings,
        place: Place,
        experience: Experience,
    ) -> None:
        self.name, self.text, self.out = name, place.text, Generation(len(place.ids))
        self.target = copy.copy(place.target)
        if draft is None or isinstance(draft, LookupModel):
            self.target.score_layer, self.target.taps = None, ()
        settings = settings.override(max_new_tokens=len(place.text) - len(place.ids), temperature=0.0)
        self._steps = decode(
            model.engine, draft, place.ids, settings, self.out, lambda _: False,
            target=self.target, chooser=GivenText(place.text), experience=experience,
        )  # fmt: skip
        next(self._steps)  # the prefill's token

    @property
    def written(self) -> int:
        """Tokens so far, the prompt's included."""
        return self.out.prompt_tokens + len(self.out.tokens)

    def write(self, end: int) -> Iterator[tuple[Piece, float]]:
        """Yield what each round emits and its milliseconds until there are `end` tokens, or the text has ended."""
        end = min(end, len(self.text))
        if self.written < end:
            self._resume()
        while self.written < end:
            began = time.perf_counter()
            piece = next(self._steps)
            yield piece, 1000 * (time.perf_counter() - began)

    def _resume(self) -> None:
        """Bring the cache to where this setting stopped: others have gone on from there, or are not as far."""
        cache, length = self.target.cache, self.written - 1  # the newest token is the next root
        cache.truncate(min(cache.committed, length))
        missing = range(cache.committed, length)
        if missing:
            rows = torch.arange(missing.start, missing.stop, device=self.text.device)
            self.target.model.forward(self.text[rows], rows, cache)
            cache.commit(range(len(rows)))


def side_by_side(writers: Sequence[Writer], order: random.Random) -> Iterator[tuple[Writer, Piece, float]]:
    """Let every setting write a stretch of the text, then the next one; yield each round with its milliseconds.

    Within a stretch their order is by chance: else each would always follow the same other one.
    """
    while pending := [writer for writer in writers if writer.written < len(writer.text)]:
        end = min(writer.written for writer in pending) + STRETCH
        for writer in order.sample(pending, len(pending)):
            for piece, ms in writer.write(end):
                yield writer, piece, ms
