"""What a loop on a GPU needs: graphs of its steps, and numbers sent without waiting for what is under way."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, ClassVar

import torch
from torch import Tensor


class GraphPool:
    """Captures graphs that share memory, so that no two of them may run at once.

    Args:
        device: A CUDA device.

    Attributes:
        seconds: Spent on captures so far, by all pools: what a round that captures took says nothing of the next one.
    """

    seconds: ClassVar[float] = 0.0

    def __init__(self, device: torch.device) -> None:
        # One stream of its own: libraries keep memory for each stream they have seen, and torch's own capture stream
        # belongs to whichever device was current when it was made.
        self._index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", self._index)
        self._stream = torch.cuda.Stream(self.device)
        self._handle = torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
        """Run `run` once, then capture it.

        Raises:
            RuntimeError: If it cannot be captured, say because it reads something on the host. `run` can be run as
                before then.
        """
        began = time.perf_counter()
        main, graph = torch.cuda.current_stream(self.device), torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            self._stream.wait_stream(main)
            with torch.cuda.stream(self._stream):
                run()  # lazy initialisation
            main.wait_stream(self._stream)
            # cuBLAS keeps a workspace for each stream. One made in a capture lies in the memory of its graph, and a
            # later graph that used it would read freed memory once the first one is gone: each gets its own.
            torch._C._cuda_clearCublasWorkspaces()
            try:
                with torch.cuda.graph(graph, pool=self._handle, stream=self._stream, capture_error_mode="thread_local"):
                    run()
            except RuntimeError as error:
                self._recover(main)
                cause = error.__context__ or error  # that of ending a capture which had failed says nothing
                raise RuntimeError((str(cause).splitlines() or [repr(cause)])[0][:150]) from error
            finally:
                torch._C._cuda_clearCublasWorkspaces()
                GraphPool.seconds += time.perf_counter() - began
        return graph

    def _recover(self, main: torch.cuda.Stream) -> None:
        """Leave the capture, which `torch.cuda.graph` does not do if ending it raises."""
        torch.cuda.set_stream(main)
        torch.cuda.synchronize(self.device)
        with suppress(Exception):  # it has ended by itself
            torch._C._cuda_endAllocateToPool(self._index, self._handle)
            torch._C._cuda_releasePool(self._index, self._handle)


def sent(
    numbers: Sequence[int] | Sequence[float] | Sequence[Sequence[int]],
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return numbers, or rows of them, as a tensor; made on `device` at once, it would wait for all that is queued."""
    return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)


def synchronize(device: torch.device) -> None:
    """Wait for the device; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
