"""What the launchers of the Triton kernels share: limits, factors of the scores, and checks of what they are given."""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from specx.kernels import tree_attention_kernel

HEAD_DIMS = (32, 64, 80, 96, 128, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LOG2_E = 1.4426950408889634
OPTIONS = {"enable_fp_fusion": True}  # Triton is about to turn fused multiply-adds off by default


@lru_cache
def _device_limits(index: int | None) -> tuple[int, int]:
    """Return the multiprocessors of a CUDA device and the bytes of shared memory that one program may take."""
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, getattr(properties, "shared_memory_per_block_optin", 99 << 10)


def launching_on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the one that holds the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def limits_of(device: torch.device) -> tuple[int, int]:
    return _device_limits(device.index) if device.type == "cuda" else (4, 227 << 10)  # the interpreter has neither


def factors(scale: float, softcap: float | None) -> tuple[float, float]:
    """Return what the kernels call `inner` and `factor`."""
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    if softcap is None:
        return 0.0, scale * _LOG2_E
    if not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    return 2 * _LOG2_E * scale / softcap, softcap * _LOG2_E


def check_cache(query: Tensor, dim: int, *caches: Tensor) -> None:
    for cache in caches:
        if cache.dtype != query.dtype or cache.device != query.device:
            raise ValueError(
                f"queries and cache must agree in dtype and device; got {query.dtype} on {query.device} and "
                f"{cache.dtype} on {cache.device}"
            )
        if cache.stride(-1) != 1:
            raise ValueError(f"the last stride of the cache must be 1, got strides {cache.stride()}")
    if query.device.type == "cpu" and isinstance(tree_attention_kernel, triton.JITFunction):
        raise ValueError("Triton kernels need tensors on a CUDA device, got cpu; use another attention backend")
    if query.dtype not in DTYPES:
        raise ValueError(f"dtype must be bfloat16, float16 or float32, got {query.dtype}")
    if dim not in HEAD_DIMS:
        raise ValueError(f"head dim must be one of {', '.join(map(str, HEAD_DIMS))}, got {dim}")


def check(
    name: str,
    tensor: Tensor,
    dtype: torch.dtype | None,
    shape: tuple[int, ...],
    device: torch.device,
    contiguous: bool = True,
) -> None:
    if tuple(tensor.shape) != shape or tensor.device != device or (dtype is not None and tensor.dtype != dtype):
        kind = "a tensor" if dtype is None else str(dtype)
        raise ValueError(
            f"{name} must be {kind} of shape {list(shape)} on {device}; got {tensor.dtype} of shape "
            f"{list(tensor.shape)} on {tensor.device}"
        )
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")


def check_limits(**given: tuple[int, int, int]) -> None:
    for name, (value, low, high) in given.items():
        if not low <= value <= high:
            raise ValueError(f"{name} must lie between {low} and {high}, got {value}")
