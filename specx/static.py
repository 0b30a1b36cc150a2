"""Forwards whose shapes and addresses do not depend on the context, and CUDA graphs of them.

At batch 1 a GPU waits for launches. A step over a preallocated cache whose length is read on the device is one fixed
list of kernels, so it is captured once per (rows, pending rows) and replayed. What is captured is the unmodified
Hugging Face forward. Without CUDA the same forwards run uncaptured, which is how they are tested.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specx.cache import TreeCache
from specx.cuda import GraphPool
from specx.hf_attention import ScoredRows
from specx.static_attention import Kernel

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # rows are padded to the next of these


@dataclass(slots=True)
class StaticCall:
    """One static forward as its attention layers see it; see `hf_attention.Call`.

    Attributes:
        length: Committed rows L, int32 [1] on the device.
        positions: Of the T tokens, int64 [T].
        mask: bool [T, P], P the pending rows, the T own ones last.
        tail_positions: Of the P rows, int64 [P].
        score_layer: Layer whose queries are kept.
    """

    length: Tensor
    positions: Tensor
    mask: Tensor
    tail_positions: Tensor
    kernel: Kernel
    score_layer: int | None
    windows: dict[int, int | None] = field(default_factory=dict)
    scored: ScoredRows | None = None
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, window: int | None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Attend to the committed rows and, by the mask, to the pending ones."""
        if window is not None and window >= key.shape[2]:
            window = None
        if window not in self._masks:
            near = self.positions[:, None] - self.tail_positions < window if window is not None else True
            self._masks[window] = self.kernel.prepare(self.mask & near)
        return self.kernel.attend(
            query, key, value, self.length, self._masks[window], self.mask.shape[1],
            positions=self.positions, window=window, **options,
        )  # fmt: skip


# cache, ids [T], positions [T], taps, call -> (logits [T, V], features)
Forward = Callable[[TreeCache, Tensor, Tensor, tuple[int, ...], StaticCall], tuple[Tensor, dict[int, Tensor]]]


class StaticSteps:
    """The static forwards of one model over the buffers of one cache.

    Args:
        forward: Runs the model over a cache; must not look at values on the host.
        kernel: Attention over whole buffers.

    Attributes:
        trouble: Why nothing is captured, in words; None while captures work, or there is no CUDA.
    """

    def __init__(self, forward: Forward, kernel: Kernel) -> None:
        self.forward, self.kernel = forward, kernel
        self.trouble: str | None = None
        self._steps: dict[tuple[Any, ...], _Step] = {}
        self._address: tuple[int, ...] = ()
        self._pool: GraphPool | None = None

    def run(
        self,
        cache: TreeCache,
        ids: Tensor,
        positions: Tensor,
        mask: Tensor,
        tail_positions: Tensor,
        taps: tuple[int, ...] = (),
        score_layer: int | None = None,
    ) -> "_Step":
        """Run T tokens behind the pending rows of `cache`.

        Args:
            ids, positions: int64 [T], T <= 256.
            mask: bool [T, P] over the pending rows, these last.
            tail_positions: int64 [P].

        Returns:
            The step; its outputs hold for the first T rows until the next run, of any shape.
        """
        bucket, pending = next(size for size in BUCKETS if size >= len(ids)), cache.pending
        cache.reserve(cache.committed + pending + bucket)
        if self._address != cache.address():  # it has moved: what was captured writes into freed memory
            self._steps.clear()
            self._pool = None
        key = bucket, pending, taps, score_layer
        if key not in self._steps:
            self._steps[key] = _Step(bucket, pending, ids.device)
        step = self._steps[key]
        step.load(ids, positions, mask, tail_positions, cache.committed)
        cache.length_on(ids.device).fill_(cache.committed)
        if step.graph is not None:
            step.graph.replay()
        else:
            compute = partial(self._compute, step, cache, taps, score_layer)
            compute()
            if ids.is_cuda and self.trouble is None:
                self._capture(step, compute)
        self._address = cache.address()
        return step

    def _compute(self, step: "_Step", cache: TreeCache, taps: tuple[int, ...], score_layer: int | None) -> None:
        length = cache.length_on(step.ids.device)
        call = StaticCall(length, step.positions, step.mask, step.tail_positions, self.kernel, score_layer)
        with cache.written_at(length.long() + step.offsets):
            step.logits, step.features = self.forward(cache, step.ids, step.positions, taps, call)
        step.scored, step.windows = call.scored, call.windows

    def _capture(self, step: "_Step", compute: Callable[[], None]) -> None:
        """Capture a step that has run before, and replay it; where it cannot be captured, say why."""
        self._pool = self._pool or GraphPool(step.ids.device)  # forwards of one cache never overlap
        try:
            step.graph = self._pool.capture(compute)
        except RuntimeError as error:  # a host read, an op that cannot be captured
            self.trouble = str(error)
            compute()
        else:
            step.graph.replay()


class _Step:
    """Buffers of one static forward, its graph and its outputs."""

    def __init__(self, rows: int, pending: int, device: torch.device) -> None:
        self.rows, self.pending = rows, pending
        self.ids = torch.zeros(rows, dtype=torch.long, device=device)
        self.positions, self.offsets = self.ids.clone(), torch.arange(pending, pending + rows, device=device)
        self.mask = torch.zeros(rows, pending + rows, dtype=torch.bool, device=device)
        self.tail_positions = torch.zeros(pending + rows, dtype=torch.long, device=device)
        self.graph: Any = None
        self.logits = torch.empty(0)
        self.features: dict[int, Tensor] = {}
        self.scored: ScoredRows | None = None
        self.windows: dict[int, int | None] = {}
        self._itself = torch.eye(rows, dtype=torch.bool, device=device)

    def load(self, ids: Tensor, positions: Tensor, mask: Tensor, tail_positions: Tensor, committed: int) -> None:
        """Fill the buffers; rows that pad a bucket see only themselves and are never read."""
        count = len(ids)
        if count < self.rows:
            self.positions.fill_(committed)
            self.tail_positions.fill_(committed)
            self.mask.zero_()
            self.mask[count:, self.pending :] = self._itself[count:]
        self.ids[:count].copy_(ids)
        self.positions[:count].copy_(positions)
        self.tail_positions[: self.pending + count].copy_(tail_positions)
        self.mask[:count, : self.pending + count].copy_(mask)
