"""The launcher of the kernel that commits accepted rows, and its plain truth."""

import torch
import triton
from torch import Tensor

from specx.kernel_checks import DTYPES, OPTIONS, check, launching_on
from specx.kernel_plans import commit_plan
from specx.kernels import commit_rows_kernel

MAX_COMMIT = 256


def commit_rows(keys: Tensor, values: Tensor, rows: Tensor, length: Tensor) -> None:
    """Keep accepted pending rows of all layers: row L + rows[i] moves to row L + i, in place and in one launch.

    Args:
        keys, values: [layers, B, G, capacity, D] and [layers, B, G, capacity, Dv], last stride 1; of one dtype that
            has 2 or 4 bytes.
        rows: Pending rows in their new order, ascending, int32 [R], R <= 256. Negative entries move nothing, so that a
            path of any length fits a tensor of fixed shape.
        length: L, int32 [1]; it is not advanced.

    Raises:
        ValueError: If a shape, dtype, device or stride is not as said.
    """
    if keys.ndim != 5 or values.ndim != 5 or keys.shape[:4] != values.shape[:4]:
        raise ValueError(
            f"keys and values must be [layers, B, G, capacity, D] and agree but for D; "
            f"got {list(keys.shape)} and {list(values.shape)}"
        )
    if keys.dtype != values.dtype or keys.dtype not in DTYPES or keys.device != values.device:
        raise ValueError(
            f"keys and values must share a device and one dtype of bfloat16, float16 and float32; "
            f"got {keys.dtype} on {keys.device} and {values.dtype} on {values.device}"
        )
    if keys.stride(-1) != 1 or values.stride(-1) != 1:
        raise ValueError(f"the last strides must be 1, got strides {keys.stride()} and {values.stride()}")
    if rows.ndim != 1 or rows.shape[0] > MAX_COMMIT:
        raise ValueError(f"rows must be int32 [R] with R at most {MAX_COMMIT}, got shape {list(rows.shape)}")
    check("rows", rows, torch.int32, tuple(rows.shape), keys.device)
    check("length", length, torch.int32, (1,), keys.device)
    count = rows.shape[0]
    if count == 0:
        return
    layers, batch, groups = keys.shape[:3]
    dims = max(keys.shape[4], values.shape[4])
    block_r, block_d = commit_plan(count, dims)
    with launching_on(keys.device):
        commit_rows_kernel[(layers * batch * groups, triton.cdiv(dims, block_d), 2)](
            keys, values, rows, length, count, batch, groups, *keys.stride()[:4], *values.stride()[:4],
            KEY_DIM=keys.shape[4], VALUE_DIM=values.shape[4], BLOCK_R=block_r, BLOCK_D=block_d, num_warps=4, **OPTIONS,
        )  # fmt: skip


def naive_commit_rows(block: Tensor, rows: list[int], length: int) -> Tensor:
    """The truth of `commit_rows` for one block [layers, B, G, capacity, D]: a copy in which the rows have moved."""
    moved = block.clone()
    for to, row in enumerate(rows):
        if row >= 0:
            moved[:, :, :, length + to] = block[:, :, :, length + row]
    return moved
