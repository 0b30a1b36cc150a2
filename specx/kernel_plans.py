"""How the work of each Triton kernel is divided into programs. Pure functions of shapes and of the device's limits."""

from dataclasses import dataclass, replace

import torch
import triton

MAX_SPLITS = 256


@dataclass(frozen=True, slots=True)
class Plan:
    """One kernel's programs: rows of queries and of keys, warps, loads in flight, programs that share a processor."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    per_sm: int

    def shared(self, padded: int, itemsize: int) -> int:
        """Estimate the bytes of shared memory: keys and values in flight and, for 64 query rows and more, the queries.

        Warpgroup instructions (64 rows and more) still read the oldest stage while the newest is being written.
        """
        wide = self.block_m >= 64
        rows = 2 * self.block_n * (self.stages if wide else self.stages - 1) + (self.block_m if wide else 0)
        return rows * padded * itemsize + (8 << 10)


def attention_plan(dim: int, rows: int, dtype: torch.dtype, shared_limit: int = 227 << 10) -> Plan:
    """Choose block shapes for `rows` packed query rows a KV head.

    64 rows and more run on Hopper's warpgroup instructions; fewer are padded to 16 or 32 rows, which costs nothing
    while the keys' way from memory is what takes the time. 128 rows need the registers of eight warps and, for keys
    that are used this often, Hopper's shared memory. The numbers are those whose compiled code spills no register.
    """
    padded, hopper = triton.next_power_of_2(dim), shared_limit > 200 << 10
    block_m = min(max(triton.next_power_of_2(rows), 16), 128)
    if dtype == torch.float32:  # no tensor cores: plain multiply-adds, whose operands live in registers
        plan = Plan(min(block_m, 32 if dim == padded else 16), 32 if padded <= 128 else 16, 8, 2, 1)
    elif padded == 256:
        plan = Plan(block_m, 32, 4, 3, 2) if block_m < 64 else Plan(64, 32, 8, 3, 1)
    elif block_m == 128 and hopper:
        plan = Plan(128, 64, 8, 3, 1)
    elif block_m >= 64:
        plan = Plan(64, 64, 4, 2 if padded == 128 else 3, 2)
    else:
        plan = Plan(block_m, 64 if padded == 128 else 128, 4, 3, 2)
    crowded = dim != padded or (padded == 128 and plan.block_m == 64 and not hopper)
    if crowded and plan.block_m <= 64 and dtype != torch.float32:  # masks, or operands, need registers of their own
        plan = replace(plan, block_n=32, stages=4)
    while plan.shared(padded, dtype.itemsize) > shared_limit and plan.block_n > 16:
        deep = plan.stages > 2
        plan = replace(plan, stages=plan.stages - deep, block_n=plan.block_n if deep else plan.block_n // 2)
    return plan


def choose_splits(programs: int, blocks: int, slots: int) -> int:
    """Return the fewest splits that keep 95 % of the attainable share of `slots` busy.

    Args:
        programs: Of one split.
        blocks: Blocks of keys in the capacity; more splits than blocks have nothing to do.
        slots: Programs that the device runs at once.
    """
    limit = max(1, min(blocks, MAX_SPLITS, max(slots // programs, 8)))
    busy = [programs * splits / slots / -(-programs * splits // slots) for splits in range(1, limit + 1)]
    return next(number for number, share in enumerate(busy, 1) if share >= 0.95 * max(busy))


def chunk_plan(dim: int, chunk_size: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Return the rows of a chunk in one tile (a power of two), the chunks of a tile, and the loads in flight."""
    rows = (32 << 10) // (triton.next_power_of_2(dim) * dtype.itemsize)
    rows = max(16, min(rows, 256 // dtype.itemsize))  # float32 multiplies out of registers and has half as many
    span = min(triton.next_power_of_2(chunk_size), rows)
    return span, rows // span, 3


def commit_plan(count: int, dims: int) -> tuple[int, int]:
    """Return the rows and the dims that one program moves: all rows at once, so that none is overwritten unread."""
    block_r = triton.next_power_of_2(count)
    return block_r, min(triton.next_power_of_2(dims), max(16, 8192 // block_r))
