"""Attention over whole preallocated buffers, whose length is read on the device: what a CUDA graph can capture."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specx.backends import additive, reference
from specx.cuda import sent


@dataclass(frozen=True, slots=True)
class Kernel:
    """Attention over whole buffers.

    Attributes:
        prepare: Brings a mask, bool [T, P], into the kernel's form; once a forward, not once a layer.
        attend: (query, key, value, length, prepared mask, tail rows P, *, scale, positions, window, softcap)
            -> (out, lse); see `masked_attention`.
    """

    prepare: Callable[[Tensor], Tensor]
    attend: Callable[..., tuple[Tensor, Tensor]]


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    length: Tensor,
    mask: Tensor,
    tail: int,
    *,
    scale: float,
    positions: Tensor,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attend over a whole buffer with one mask: the truth that the kernel is tested against; any device and dtype.

    Args:
        query: [B, H, T, D].
        key, value: [B, G, capacity, D]: rows [0, L) are committed, [L, L + P) the tail; the others may hold anything.
        length: L, int32 [1].
        mask: Which tail rows each query sees, bool [T, P]; a window has been applied to it.
        tail: P.
        positions: Of the queries, int64 [T].
        window: w lets position p see prefix rows over p - w.

    Returns:
        As `attention.attend`.
    """
    rows = mask.shape[0]
    column = torch.arange(key.shape[2], device=key.device)
    seen = (column < length).expand(rows, -1)
    if window is not None:
        seen = seen & (column > positions[:, None] - window)
    seen = seen.index_copy(1, length.long() + torch.arange(tail, device=key.device), mask)
    written = (column < length + tail)[:, None]
    key, value = (torch.where(written, each, 0) for each in (key, value))
    return reference(query, key, value, scale, additive(seen, query.dtype), False, softcap)


PLAIN = Kernel(lambda mask: mask, masked_attention)


def kernel_launch() -> Any:
    """Import the launchers; only who runs kernels needs Triton.

    Raises:
        ImportError: If there is no Triton.
    """
    from specx import kernel_launch as launchers

    return launchers


def triton_kernel() -> Kernel:
    """Return the one-pass kernel of `specx.kernels`.

    Raises:
        ImportError: If there is no Triton.
    """
    launch = kernel_launch()

    def attend(*inputs: Any, positions: Tensor, window: int | None, **options: Any) -> tuple[Tensor, Tensor]:
        at = positions.int() if window is not None else None
        return launch.tree_attention(*inputs, positions=at, window=window, **options)

    return Kernel(launch.pack_mask, attend)


def triton_move(keys: Tensor, values: Tensor, rows: Tensor, first: int) -> None:
    """Copy rows first + rows[i] of [n, B, G, capacity, D] to first + i, all layers in one launch."""
    kernel_launch().commit_rows(keys, values, rows.int(), sent([first], keys.device, torch.int32))


def kernel_serves(dtype: torch.dtype, key_dim: int, value_dim: int) -> bool:
    """Tell whether `triton_kernel` takes a model's cache."""
    launch = kernel_launch()
    return dtype in launch.DTYPES and key_dim == value_dim and key_dim in launch.HEAD_DIMS


def trouble_with_kernel(device: torch.device) -> str | None:
    """Run the kernel on small inputs and say what is wrong with it on `device`; None if it is right."""
    try:
        kernel, generator = triton_kernel(), torch.Generator().manual_seed(0)
        sizes = ((1, 4, 5, 64), (1, 2, 90, 64), (1, 2, 90, 64))
        inputs: Any = [torch.randn(size, generator=generator).to(device, torch.float16) for size in sizes]
        length = torch.tensor([70], dtype=torch.int32, device=device)
        mask = torch.ones(5, 5, dtype=torch.bool, device=device).tril()
        options: dict[str, Any] = {"scale": 0.125, "positions": length + torch.arange(5, device=device)}
        options |= {"window": 40, "softcap": None}
        out, lse = kernel.attend(*inputs, length, kernel.prepare(mask), 5, **options)
        true_out, true_lse = PLAIN.attend(*inputs, length, mask, 5, **options)
        error = max((out - true_out).abs().max().item(), (lse - true_lse).abs().max().item())
    except Exception as problem:
        return f"{type(problem).__name__}: {str(problem).splitlines()[0][:120]}"
    return None if error < 0.05 else f"it is off by {error:.2g}"
