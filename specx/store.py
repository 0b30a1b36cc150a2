"""Every key and value that a draft has computed, outside its bounded cache, so that dropped tokens can come back."""

import torch
from torch import Tensor

from specx.cache import TreeCache
from specx.rotary import Rotation


class KeyValueStore:
    """Keys and values of the first `length` tokens of the context, in the order of the text.

    Keys are stored as they were rotated, each with its position, and turned to another one when they are gathered; keys
    before rotation are stored with position 0.

    Args:
        capacity: Tokens to allocate.
        rotation: Of the draft's keys.
        on_device: Keep the store beside the cache instead of in host memory (pinned where the cache is on CUDA).
    """

    def __init__(self, capacity: int, rotation: Rotation, on_device: bool = False) -> None:
        self.capacity, self.rotation, self.on_device, self.length = capacity, rotation, on_device, 0
        self._positions = torch.empty(capacity, dtype=torch.long)
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, cache: TreeCache, rows: int) -> None:
        """Take over the newest `rows` committed rows of `cache`, tokens length .. length + rows of the context."""
        first, last = cache.committed - rows, cache.committed
        ((keys, values),) = cache.rows(first, last)
        self.extend(keys, values, torch.arange(first, last))

    def extend(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Take over the next tokens' keys and values, [layers, B, G, K, D].

        Args:
            positions: That the keys were rotated to, int64 [K]; 0 for keys that were not rotated.
        """
        rows = len(positions)
        if self.length + rows > self.capacity:
            raise ValueError(f"cannot store {rows} more tokens: {self.length} of {self.capacity} places are taken")
        if self._keys is None or self._values is None:
            self._keys, self._values = self._empty(keys), self._empty(values)
        new = slice(self.length, self.length + rows)
        self._keys[:, :, :, new].copy_(keys)
        self._values[:, :, :, new].copy_(values)
        self._positions[new] = positions
        self.length += rows

    def gather(self, indices: Tensor, cache: TreeCache) -> None:
        """Commit the tokens at `indices`, int64 [K], as the next rows of `cache`, at the positions of these rows."""
        if self._keys is None or self._values is None or not len(indices):
            return
        places, first = indices.to(self._keys.device), cache.committed
        keys, values = self._keys.index_select(3, places), self._values.index_select(3, places)
        delta = torch.arange(first, first + len(indices)) - self._positions[indices.cpu()]
        ((to_keys, to_values),) = cache.rows(first, first + len(indices))
        device = to_keys.device
        to_keys.copy_(self.rotation.move(keys.to(device, non_blocking=True), delta.to(device)))
        to_values.copy_(values, non_blocking=True)
        cache.extend(len(indices))

    def nbytes(self) -> int:
        """Return the bytes allocated."""
        return sum(each.numel() * each.element_size() for each in (self._keys, self._values) if each is not None)

    def _empty(self, like: Tensor) -> Tensor:
        shape = (*like.shape[:3], self.capacity, like.shape[4])
        if self.on_device:
            return like.new_empty(shape)
        return torch.empty(shape, dtype=like.dtype, pin_memory=like.is_cuda)


def rows_in_place(held: Tensor, since: int, fed: int, keep: Tensor) -> int:
    """Return how many of a cache's first rows already are the ones to keep.

    Args:
        held: Tokens that it held when it was rebuilt last, int64 [n]; all of [since, fed) follow them.
        keep: Tokens that it is to hold, int64 [K].
    """
    now = torch.cat([held, torch.arange(since, fed, device=held.device)])
    least = min(len(now), len(keep))
    differs = (now[:least] != keep[:least].to(now.device)).nonzero()
    return int(differs[0]) if len(differs) else least
