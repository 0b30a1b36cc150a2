"""Every key and value that a draft has computed, outside its bounded cache, so that dropped tokens can come back."""

from typing import Literal

import torch
from torch import Tensor

from specx.cache import TreeCache
from specx.rotary import Rotation

Place = Literal["auto", "host", "device"]
_SHARE = 8  # times its size must be free on a device; fetching tokens from host memory takes longer than a small step


class KeyValueStore:
    """Keys and values of the first `length` tokens of the context, in the order of the text.

    Keys are stored as they were rotated, each with its position, and turned to another one when they are gathered; keys
    before rotation are stored with position 0.

    Args:
        capacity: Tokens to allocate.
        rotation: Of the draft's keys.
        place: Where it lives: in host memory, on the device of the cache, or, with "auto", there if it takes no more
            than an eighth of what is free (CUDA; in host memory elsewhere).
    """

    def __init__(self, capacity: int, rotation: Rotation, place: Place = "auto") -> None:
        self.capacity, self.rotation, self.place, self.length = capacity, rotation, place, 0
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
        if not rows:
            return
        if self.length + rows > self.capacity:
            raise ValueError(f"cannot store {rows} more tokens: {self.length} of {self.capacity} places are taken")
        if self._keys is None or self._values is None:
            device = self._device(keys, values)
            self._keys, self._values = (
                torch.empty((*new.shape[:3], self.capacity, new.shape[4]), dtype=new.dtype, device=device)
                for new in (keys, values)
            )
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

    def _device(self, *first: Tensor) -> torch.device:
        """Say where a store that begins with these keys and values is to live."""
        device = first[0].device
        if self.place == "auto" and device.type == "cuda":
            wanted = sum(each.nbytes // each.shape[3] for each in first) * self.capacity
            free, _ = torch.cuda.mem_get_info(device)
            return device if _SHARE * wanted <= free else torch.device("cpu")
        return device if self.place == "device" else torch.device("cpu")


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
