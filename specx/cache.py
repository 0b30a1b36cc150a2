"""The key/value cache of a model that verifies or drafts trees."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from specx.cuda import sent

Move = Callable[[Tensor, Tensor, Tensor, int], None]


def move_rows(keys: Tensor, values: Tensor, rows: Tensor, first: int) -> None:
    """Copy rows first + rows[i] of [n, B, G, capacity, D] to first + i."""
    for block in (keys, values):
        # index_select copies first: source and destination may overlap.
        block[:, :, :, first : first + len(rows)] = block.index_select(3, rows + first)


@dataclass(slots=True)
class Memory:
    """What a cache is made of: another one may take it over when this one is no more.

    Attributes:
        blocks: [key block, value block] of layers that agree in shape, each [n, B, G, capacity, D].
        place: Block and slot of each layer.
        length: int32 [1], where static forwards read the committed length.
    """

    blocks: list[list[Tensor]] = field(default_factory=list)
    place: dict[int, tuple[int, int]] = field(default_factory=dict)
    length: Tensor | None = None


class TreeCache(Cache):
    """All layers' keys and values, preallocated; rows [0, committed) are the past, the next `pending` rows tree nodes.

    A forward of T tokens appends T pending rows in place. `commit` keeps some of them, `rollback` none. Layers of one
    shape share one block [layers, B, G, capacity, D], so that a commit is one copy for all of them. Sliding layers are
    stored in full as well: the window is cut in attention, which makes rollback exact.

    Args:
        num_layers: Layers of the model.
        capacity: Rows to allocate; `reserve` grows it.
        one_block: False allocates layer by layer, for a model that is spread over devices.
        memory: Of an earlier cache of this model, whose content is dropped.
        move: move(keys, values, rows, first) copies rows first + rows[i] of a block to first + i.
    """

    is_compileable = False
    is_sliding: Any = ()
    is_linear: Any = ()
    is_dummy: Any = ()

    def __init__(
        self,
        num_layers: int,
        capacity: int,
        one_block: bool = True,
        memory: Memory | None = None,
        move: Move | None = None,
    ) -> None:
        super().__init__(layers=[])
        self.move = move or move_rows
        self.num_layers, self.one_block, self.memory = num_layers, one_block, memory or Memory()
        self.capacity = min((pair[0].shape[3] for pair in self.memory.blocks), default=capacity)
        self.committed = self.pending = 0
        self._at: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's new rows behind the pending ones; return views of all rows, [B, G, rows, D].

        Inside `written_at` the rows are those given there, and whole buffers are returned, [B, G, capacity, D].
        """
        if self._at is not None:
            keys, values = self._buffers(key_states, value_states, layer_idx)
            return keys.index_copy_(2, self._at, key_states), values.index_copy_(2, self._at, value_states)
        first = self.committed + self.pending
        last = first + key_states.shape[2]
        if last > self.capacity:
            self.reserve(max(last, self.capacity + self.capacity // 2))
        keys, values = self._buffers(key_states, value_states, layer_idx)
        keys[:, :, first:last] = key_states
        values[:, :, first:last] = value_states
        return keys[:, :, :last], values[:, :, :last]

    @contextmanager
    def written_at(self, rows: Tensor) -> Iterator[None]:
        """Let `update` write to `rows`, int64 [T] on the device, so that no address depends on the length."""
        self._at = rows
        try:
            yield
        finally:
            self._at = None

    def length_on(self, device: torch.device) -> Tensor:
        """Return the int32 [1] from which a static forward reads the committed length; who runs one fills it."""
        if self.memory.length is None:
            self.memory.length = torch.zeros(1, dtype=torch.int32, device=device)
        return self.memory.length

    def address(self) -> tuple[int, ...]:
        """Return what changes when a buffer moves."""
        return tuple(block.data_ptr() for pair in self.memory.blocks for block in pair)

    def advance(self, rows: int) -> None:
        """Count the rows that a finished forward has written; until then they do not exist."""
        self.pending += rows

    def commit(self, rows: Sequence[int]) -> None:
        """Keep the given pending rows, in this order, as the newest committed ones and drop the others."""
        if any(row < 0 or row >= self.pending for row in rows):
            raise ValueError(f"rows must be among the {self.pending} pending ones; got {list(rows)}")
        same = 0
        while same < len(rows) and rows[same] == same:
            same += 1  # already in place
        if same < len(rows):
            first = self.committed + same
            for keys, values in self.memory.blocks:
                index = sent([row - same for row in rows[same:]], keys.device)
                self.move(keys, values, index, first)
        self.committed += len(rows)
        self.pending = 0

    def rollback(self) -> None:
        """Drop all pending rows."""
        self.pending = 0

    def truncate(self, rows: int) -> None:
        """Keep the first `rows` committed rows only; the memory stays."""
        if rows > self.committed:
            raise ValueError(f"cannot keep {rows} rows: only {self.committed} are committed")
        self.committed, self.pending = rows, 0

    def extend(self, rows: int) -> None:
        """Count `rows` rows, written through `rows()` behind the committed ones, as committed."""
        self.committed, self.pending = self.committed + rows, 0

    def rows(self, first: int, last: int) -> list[tuple[Tensor, Tensor]]:
        """Return views of rows [first, last) of every block of layers: keys and values, [n, B, G, last - first, D]."""
        self.reserve(last)
        return [(keys[:, :, :, first:last], values[:, :, :, first:last]) for keys, values in self.memory.blocks]

    def keys(self, layer_idx: int) -> Tensor:
        """Return a layer's committed keys, a view [B, G, committed, D]."""
        return self.layer(layer_idx)[0]

    def layer(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Return a layer's committed keys and values, views [B, G, committed, D]."""
        block, slot = self.memory.place[layer_idx]
        keys, values = self.memory.blocks[block]
        return keys[slot][:, :, : self.committed], values[slot][:, :, : self.committed]

    def reserve(self, capacity: int) -> None:
        """Make room for at least `capacity` rows, moving what is there."""
        if capacity <= self.capacity:
            return
        used = min(self.capacity, self.committed + self.pending)
        for pair in self.memory.blocks:
            for i, old in enumerate(pair):
                pair[i] = old.new_empty(*old.shape[:3], capacity, old.shape[4])
                pair[i][:, :, :, :used] = old[:, :, :, :used]
        self.capacity = capacity

    def nbytes(self) -> int:
        """Return the bytes allocated."""
        return sum(block.numel() * block.element_size() for pair in self.memory.blocks for block in pair)

    def _buffers(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        if layer_idx not in self.memory.place:
            self._allocate(key, value, layer_idx)
        block, slot = self.memory.place[layer_idx]
        return self.memory.blocks[block][0][slot], self.memory.blocks[block][1][slot]

    def _allocate(self, key: Tensor, value: Tensor, layer_idx: int) -> None:
        for number, pair in enumerate(self.memory.blocks):
            if all(_fits(block, new) for block, new in zip(pair, (key, value), strict=True)):
                self.memory.place[layer_idx] = (number, layer_idx)
                return
        # The first block has a slot for every layer; odd layers (other shape, other device) get one of their own.
        slots = self.num_layers if self.one_block and not self.memory.blocks else 1
        batch, groups = key.shape[:2]
        pair = [new.new_empty(slots, batch, groups, self.capacity, new.shape[3]) for new in (key, value)]
        self.memory.blocks.append(pair)
        self.memory.place[layer_idx] = (len(self.memory.blocks) - 1, layer_idx if slots > 1 else 0)

    # What transformers' own code may ask a cache.
    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.committed + self.pending

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.committed + self.pending + int(query_length), 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.committed + self.pending

    def get_max_length(self, layer_idx: int = 0) -> int:
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    def __len__(self) -> int:
        return self.num_layers


def _fits(block: Tensor, new: Tensor) -> bool:
    """Tell whether a layer's new rows [B, G, T, D] belong into a block that has a slot for every layer."""
    same_kind = block.dtype == new.dtype and block.device == new.device
    return same_kind and block.shape[0] > 1 and (*block.shape[1:3], block.shape[4]) == (*new.shape[:2], new.shape[3])
