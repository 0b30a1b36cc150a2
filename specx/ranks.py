"""The processes that torchrun starts for one target too large for one device: the first leads, the others follow.

Rank 0 does everything that one process would do. The others hold their part of the target and do what they are told:
so no draft, draw or timing, by which the controller chooses, has to come out the same in every process.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

_PATIENCE = timedelta(days=7)  # a follower waits while its leader drafts, prints, or waits for somebody's terminal
_LOST = "a process of this run has ended, perhaps killed for memory: all of them end"


def keep_for_ever(*groups: Any) -> None:
    """Let no process group be freed, before it is destroyed.

    A thread of gloo's needs Python's lock to drop the last collective; freeing the group waits for that thread and
    holds the lock. On a busy machine the two wait for each other without end (seen with torch 2.13).
    """
    for group in groups:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


class Ranks:
    """This process among those of one torchrun; made in all of them at the same time.

    Attributes:
        rank: Of this process; 0 leads.
        size: How many there are.
        whole: Whether the others wait for orders, as far as is known; if not, they cannot be told to leave.
    """

    def __init__(self) -> None:
        self._store, self.rank, self.size = next(dist.rendezvous("env://"))
        self._orders: Any = None
        self.whole = False

    def join(self) -> None:
        """Wait for all of them; on CUDA each takes the device of its local rank.

        Raises:
            ValueError: If there are fewer devices than processes.
        """
        cuda = torch.cuda.is_available()
        if cuda:
            local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
            if local >= count:
                raise ValueError(f"torchrun started more processes here than the {count} CUDA devices that torch sees")
            torch.cuda.set_device(local)
        times = self._store.add(f"specx joins {self.rank}", 1)  # what is agreed upon may be agreed upon again
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=dist.PrefixStore(f"specx {times}", self._store),
            rank=self.rank,
            world_size=self.size,
        )
        self._orders = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def tell(self, order: Any) -> None:
        """Send an order to all followers; None lets them leave."""
        dist.broadcast_object_list([order], 0, self._orders)

    def hear(self) -> Any:
        """Wait for the leader's next order."""
        orders: list[Any] = [None]
        dist.broadcast_object_list(orders, 0, self._orders)
        return orders[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Do something in which all take part: if it fails in one, there is no going on for any.

        Raises:
            RuntimeError: In plain words, if another process was lost.
        """
        self.whole, before = False, self.whole
        try:
            yield
        except RuntimeError as error:
            lost = isinstance(error, dist.DistError) or "gloo" in str(error)
            raise RuntimeError(_LOST) if lost else error from error
        self.whole = before

    def combine(self, scores: Tensor, heads: Literal["mean", "max"]) -> Tensor:
        """Return what all heads say from what those of each rank say, equally many; any shape, on every rank."""
        total = scores.contiguous()
        dist.all_reduce(total, dist.ReduceOp.SUM if heads == "mean" else dist.ReduceOp.MAX)
        return total / self.size if heads == "mean" else total

    def first_to_fail(self) -> bool:
        """Tell whether this process is the first one that says so: that one tells the user why, the others nothing."""
        try:
            return self._store.add("specx failed", 1) == 1
        except RuntimeError:  # torchrun is gone, and with it whoever listens
            return False

    def leave(self) -> None:
        """End together; a process group may wait for ever for one that has left."""
        if self.rank == 0:
            self.tell(None)
        dist.barrier(self._orders)
        keep_for_ever(dist.group.WORLD, self._orders)
        dist.destroy_process_group()
