"""How much of what the target attends to the kept chunks held: measured beside a run, never while it is timed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specx.api import SpeculativeModel
from specx.config import Settings
from specx.retrieval import CachePolicy
from specx.target import Target


class WatchedTarget(Target):
    """A target that notes after every step how much attention each chunk of the context got.

    Attributes:
        chunk_size: Tokens of a chunk; None: nothing is noted.
        log: For every step the committed tokens before it, and the attention of its last node by chunk, float32 [C]:
            the mean over heads of the score layer, summed over the chunk's tokens.
    """

    chunk_size: int | None = None
    log: list[tuple[int, Tensor]]

    def watch(self, chunk_size: int | None) -> None:
        """Start a log."""
        self.chunk_size, self.log = chunk_size, []

    def keep(self, path: Sequence[int]) -> None:
        """Keep the path, then note what its last node attended to."""
        before = self.cache.committed
        super().keep(path)
        if self.chunk_size is None:
            return
        scores = self.chunk_scores(path[-1], self.chunk_size)
        if scores is not None:
            sizes = torch.full_like(scores, self.chunk_size)
            sizes[-1] = self.cache.committed - (len(scores) - 1) * self.chunk_size
            self.log.append((before, (scores * sizes).cpu()))


def watched_chunk(settings: Settings) -> int | None:
    """Return the chunk size if a method retrieves chunks."""
    return settings.cache.chunk_size if settings.policy in ("retrieval", "auto") else None


def policy_of(model: SpeculativeModel, settings: Settings, name: str) -> CachePolicy:
    """Return the policy that a run was under, given its name in the end."""
    draft = model.draft
    assert draft is not None
    context = settings.cache.draft_context or draft.draft_context
    if draft.max_positions is not None:
        context = min(context, draft.max_positions)
    return CachePolicy.plan(name, settings.cache, settings.tree, context)


def hit_rates(
    log: Sequence[tuple[int, Tensor]], trace: Sequence[dict[str, Any]], policy: CachePolicy
) -> list[float | None]:
    """Return for every step the share of attention that the chosen chunks held.

    Of the attention that the step's last node paid to chunks which no rule keeps (those with sinks and those that
    reached into the recent tokens when the draft's cache was rebuilt last are left out), the share on chunks that
    retrieval had chosen then. None where nothing had been dropped.
    """
    rates: list[float | None] = []
    chosen, first, last = None, -(-policy.sinks // policy.chunk_size), -1
    for (before, mass), record in zip(log, trace, strict=False):
        if record["kept_chunks"] is not None:
            chosen = [chunk for chunk in record["kept_chunks"] if chunk >= first]
            last = (before - policy.recent) // policy.chunk_size - 1  # the last chunk wholly before the recent tokens
        total = float(mass[first : last + 1].sum()) if chosen is not None and last >= first else 0.0
        held = [chunk for chunk in chosen or () if chunk <= last]
        rates.append(float(mass[held].sum()) / total if total else None)
    return rates


def mean_hit(rates: Sequence[float | None]) -> float | None:
    """Return the mean over the steps that have a rate."""
    found = [each for each in rates if each is not None]
    return round(sum(found) / len(found), 4) if found else None
