"""Launchers of the Triton kernels, their checks, and a plain truth (`naive_*`) beside each.

Every tensor lies on one device. Caches are handed over with their whole capacity and any strides but a last one of 1;
`length`, int32 [1] on the device, says how many of their rows are committed, so one captured CUDA graph serves every
length up to the capacity. Rows behind the committed and pending ones are never read: they may hold anything, NaN too.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from specx.kernels import chunk_scores_kernel, commit_rows_kernel, merge_splits_kernel, tree_attention_kernel

HEAD_DIMS = (32, 64, 80, 96, 128, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_QUERIES, MAX_TAIL, MAX_CHUNK, MAX_COMMIT, MAX_SPLITS = 256, 1024, 256, 256, 256
_LOG2_E = 1.4426950408889634
_WORD = 64  # tail rows a mask word
_OPTIONS = {"enable_fp_fusion": True}  # Triton is about to turn fused multiply-adds off by default


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


@lru_cache
def _device_limits(index: int | None) -> tuple[int, int]:
    """Return the multiprocessors of a CUDA device and the bytes of shared memory that one program may take."""
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, getattr(properties, "shared_memory_per_block_optin", 99 << 10)


def _launching_on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the one that holds the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _limits(device: torch.device) -> tuple[int, int]:
    return _device_limits(device.index) if device.type == "cuda" else (4, 227 << 10)  # the interpreter has neither


def _factors(scale: float, softcap: float | None) -> tuple[float, float]:
    """Return what the kernels call `inner` and `factor`."""
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    if softcap is None:
        return 0.0, scale * _LOG2_E
    if not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    return 2 * _LOG2_E * scale / softcap, softcap * _LOG2_E


def _check_cache(query: Tensor, dim: int, *caches: Tensor) -> None:
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


def _check(
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


def _check_limits(**given: tuple[int, int, int]) -> None:
    for name, (value, low, high) in given.items():
        if not low <= value <= high:
            raise ValueError(f"{name} must lie between {low} and {high}, got {value}")


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a tree mask into bit words on its own device: bit i of word w says whether tail row 64 w + i is seen.

    Args:
        mask: bool [T, P], True: may look.

    Returns:
        int64 [T, ceil(P / 64)]; unused bits are 0.

    Raises:
        ValueError: If `mask` is no bool matrix.
    """
    if mask.dtype != torch.bool or mask.ndim != 2:
        raise ValueError(f"a mask must be bool [T, P]; got {mask.dtype} of shape {list(mask.shape)}")
    padded = F.pad(mask, (0, -mask.shape[1] % _WORD)).unflatten(1, (-1, _WORD)).to(torch.int64)
    return (padded << torch.arange(_WORD, device=mask.device)).sum(2)  # distinct bits: the sum cannot carry


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    length: Tensor,
    words: Tensor,
    tail: int,
    *,
    scale: float,
    positions: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    splits: int | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to the committed prefix and, by the tree's mask, to the tail behind it, in one pass over the keys.

    Split-KV flash decoding (pytorch.org/blog/flash-decoding) with the query heads of a KV head packed as rows; the
    mask as bits of words, one row a tree node.

    Args:
        query: [B, H, T, D], T <= 256; D in `HEAD_DIMS`; bfloat16, float16 or float32; last stride 1.
        key, value: [B, G, capacity, D], last stride 1: rows [0, L) are the prefix, [L, L + P) the tail.
        length: L, int32 [1]. L + P must not exceed the capacity; what lies beyond it is not read.
        words: Which tail rows each query sees, int64 [T, ceil(P / 64)] from `pack_mask`.
        tail: P <= 1024, at least T where the queries' own rows are among them.
        scale: Factor on the scores, positive.
        positions: Of the queries, int32 [T]; needed with a window only.
        window: w lets position p see prefix rows over p - w (row r sits at position r); the tail's mask has it already.
        softcap: c gives c * tanh(score / c).
        sinks: [H], float: each takes exp(sink) of its head's softmax and gives nothing (gpt-oss).
        splits: Parts that the keys are divided into; None chooses by capacity, heads and device.
        out: Where to write the output, [B, H, T, D] in query's dtype, last stride 1.
        lse: Where to write the log-sum-exp, float32 [B, H, T], any strides.

    Returns:
        Output [B, H, T, D] in query's dtype, by default laid out as [B, T, H, D], and the natural log-sum-exp of the
        scaled scores without sinks, float32 [B, H, T]. A query that sees nothing gets output 0 and log-sum-exp -inf.

    Raises:
        ValueError: If a shape, dtype, device, stride or number is not as said.
    """
    _check_attention(query, key, value, length, words, tail, positions, window, sinks)
    (batch, heads, rows, dim), (groups, capacity) = query.shape, key.shape[1:3]
    device = query.device
    inner, factor = _factors(scale, softcap)
    if out is None:
        out = query.new_empty(batch, rows, heads, dim).transpose(1, 2)  # [B, T, H, D] in memory, as projections want it
    if lse is None:
        lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=device)
    _check("out", out, query.dtype, (batch, heads, rows, dim), device, contiguous=False)
    _check("lse", lse, torch.float32, (batch, heads, rows), device, contiguous=False)
    if out.stride(-1) != 1:
        raise ValueError(f"the last stride of out must be 1, got strides {out.stride()}")

    share = heads // groups
    processors, shared_limit = _limits(device)
    plan = attention_plan(dim, share * rows, query.dtype, shared_limit)
    row_blocks = triton.cdiv(share * rows, plan.block_m)
    if splits is None:
        blocks = triton.cdiv(capacity, plan.block_n)
        splits = choose_splits(row_blocks * batch * groups, blocks, processors * plan.per_sm)
    _check_limits(splits=(splits, 1, MAX_SPLITS))
    part_out = torch.empty(batch * heads * rows, splits, dim, dtype=torch.float32, device=device)
    part_lse = torch.empty(batch * heads * rows, splits, dtype=torch.float32, device=device)
    halves = words.view(torch.int32)
    padded, all_splits = triton.next_power_of_2(dim), triton.next_power_of_2(splits)
    with _launching_on(device):
        tree_attention_kernel[(row_blocks, splits, batch * groups)](
            query, key, value, length, halves, length if positions is None else positions, part_out, part_lse,
            inner, factor, rows, tail, halves.shape[1], window or 0, capacity, groups,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
            SHARE=share, DIM=dim, PADDED=padded, BLOCK_M=plan.block_m, BLOCK_N=plan.block_n,
            WINDOWED=window is not None, CAPPED=softcap is not None, num_warps=plan.warps, num_stages=plan.stages,
            **_OPTIONS,
        )  # fmt: skip
        merge_splits_kernel[(batch * heads * rows,)](
            part_out, part_lse, part_lse if sinks is None else sinks, out, lse, splits, rows, heads,
            *out.stride()[:3], *lse.stride(),
            DIM=dim, PADDED=padded, BLOCK_S=min(all_splits, 32), ALL_S=all_splits, SINKS=sinks is not None, num_warps=4,
            **_OPTIONS,
        )  # fmt: skip
    return out, lse


def _check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    length: Tensor,
    words: Tensor,
    tail: int,
    positions: Tensor | None,
    window: int | None,
    sinks: Tensor | None,
) -> None:
    if query.ndim != 4:
        raise ValueError(f"query must be [B, H, T, D], got shape {list(query.shape)}")
    batch, heads, rows, dim = query.shape
    device = query.device
    if key.shape != value.shape or key.ndim != 4 or key.shape[0] != batch or key.shape[3] != dim:
        raise ValueError(
            f"key and value must both be [B, G, capacity, D] with B {batch} and D {dim}; "
            f"got {list(key.shape)} and {list(value.shape)}"
        )
    if heads % key.shape[1]:
        raise ValueError(f"{heads} query heads cannot share {key.shape[1]} key heads evenly")
    _check_limits(T=(rows, 1, MAX_QUERIES), tail=(tail, 0, min(MAX_TAIL, key.shape[2])))
    _check_cache(query, dim, key, value)
    if query.stride(-1) != 1:
        raise ValueError(f"the last stride of query must be 1, got strides {query.stride()}")
    _check("length", length, torch.int32, (1,), device)
    _check("words", words, torch.int64, (rows, triton.cdiv(tail, _WORD)), device)
    if window is not None:
        if window < 1:
            raise ValueError(f"window must be at least 1 or None, got {window}")
        if positions is None:
            raise ValueError("a window needs the positions of the queries, int32 [T]")
        _check("positions", positions, torch.int32, (rows,), device)
    if sinks is not None:
        _check("sinks", sinks, None, (heads,), device)


def naive_tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    length: int,
    mask: Tensor,
    *,
    scale: float,
    positions: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The truth of `tree_attention`: softmax written out, with every head's keys repeated, in the inputs' dtype.

    Args:
        length: L, on the host.
        mask: bool [T, P].

    Returns:
        Output [B, H, T, D] and log-sum-exp [B, H, T].
    """
    rows, tail = mask.shape
    share = query.shape[1] // key.shape[1]
    key, value = (cache[:, :, : length + tail].repeat_interleave(share, 1) for cache in (key, value))
    past = torch.arange(length, device=mask.device)
    seen = torch.ones(rows, length, dtype=torch.bool, device=mask.device)
    if window is not None and positions is not None:
        seen = past > positions[:, None] - window
    scores = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~torch.cat([seen, mask], 1), -torch.inf)
    lse = scores.logsumexp(3)
    weights = (scores - lse[..., None]).exp().nan_to_num(0.0)  # -inf - -inf: a row that sees nothing
    if sinks is not None:
        weights = weights * torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])[..., None]
    return weights @ value, lse


def chunk_scores(
    key: Tensor,
    query: Tensor,
    lse: Tensor,
    length: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    chunk_size: int,
    heads: Literal["mean", "max"] | None = "mean",
    splits: int | None = None,
) -> Tensor:
    """Score chunks of the context by one row of attention: mean weight a token, as `specx.retrieval.chunk_scores`.

    Args:
        key: Keys of the score layer, [G, capacity, D], last stride 1; rows [0, L) count.
        query: The row's queries, [H, D], last stride 1.
        lse: Natural log-sum-exp of the row over everything it saw, without sinks, float32 [H].
        length: L, int32 [1].
        scale, softcap: Of that layer.
        chunk_size: Tokens a chunk, at most 256; the last chunk may be partial and is averaged over its own tokens.
        heads: How the heads' scores of a chunk become one; None keeps them.
        splits: Parts that the keys of one KV head are divided into; None fills the device.

    Returns:
        float32 [C], or [H, C] for heads None; C = ceil(capacity / chunk_size). Chunks from ceil(L / chunk_size) on
        score 0.

    Raises:
        ValueError: If a shape, dtype, device, stride or number is not as said.
    """
    if key.ndim != 3 or query.ndim != 2 or key.shape[2] != query.shape[1] or query.shape[0] % key.shape[0]:
        raise ValueError(
            f"key must be [G, capacity, D] and query [H, D], H a multiple of G; "
            f"got {list(key.shape)} and {list(query.shape)}"
        )
    groups, capacity, dim = key.shape
    _check_cache(query, dim, key)
    if query.stride(-1) != 1:
        raise ValueError(f"the last stride of query must be 1, got strides {query.stride()}")
    _check("lse", lse, torch.float32, (query.shape[0],), key.device)
    _check("length", length, torch.int32, (1,), key.device)
    _check_limits(chunk_size=(chunk_size, 1, MAX_CHUNK))
    if heads not in ("mean", "max", None):
        raise ValueError(f"heads must be mean, max or None, got {heads!r}")
    inner, factor = _factors(scale, softcap)
    chunks = triton.cdiv(capacity, chunk_size)
    span, tile, stages = chunk_plan(dim, chunk_size, key.dtype)
    if splits is None:
        tiles = triton.cdiv(chunks, tile)
        splits = max(1, min(tiles, 2 * _limits(key.device)[0] // groups))
    share = query.shape[0] // groups
    scores = torch.empty(query.shape[0], chunks, dtype=torch.float32, device=key.device)
    with _launching_on(key.device):
        chunk_scores_kernel[(splits, groups)](
            query, key, lse, length, scores, inner, factor, capacity, query.stride(0), *key.stride()[:2],
            SHARE=share, BLOCK_H=max(16, triton.next_power_of_2(share)), DIM=dim, PADDED=triton.next_power_of_2(dim),
            CHUNK=chunk_size, SPAN=span, TILE=tile, CAPPED=softcap is not None, num_warps=4, num_stages=stages,
            **_OPTIONS,
        )  # fmt: skip
    if heads is None:
        return scores
    return scores.mean(0) if heads == "mean" else scores.amax(0)


def chunk_plan(dim: int, chunk_size: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Return the rows of a chunk in one tile (a power of two), the chunks of a tile, and the loads in flight."""
    rows = (32 << 10) // (triton.next_power_of_2(dim) * dtype.itemsize)
    rows = max(16, min(rows, 256 // dtype.itemsize))  # float32 multiplies out of registers and has half as many
    span = min(triton.next_power_of_2(chunk_size), rows)
    return span, rows // span, 3


def naive_chunk_scores(
    key: Tensor, query: Tensor, lse: Tensor, length: int, *, scale: float, softcap: float | None = None, chunk_size: int
) -> Tensor:
    """The truth of `chunk_scores` with heads None, chunk by chunk, in the inputs' dtype: [H, ceil(L / chunk_size)]."""
    key = key[:, :length].repeat_interleave(query.shape[0] // key.shape[0], 0)
    scores = (key @ query[:, :, None])[:, :, 0] * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = (scores - lse[:, None]).exp()
    return torch.stack([part.mean(1) for part in weights.split(chunk_size, 1)], 1)


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
    _check("rows", rows, torch.int32, tuple(rows.shape), keys.device)
    _check("length", length, torch.int32, (1,), keys.device)
    count = rows.shape[0]
    if count == 0:
        return
    layers, batch, groups = keys.shape[:3]
    dims = max(keys.shape[4], values.shape[4])
    block_r, block_d = commit_plan(count, dims)
    with _launching_on(keys.device):
        commit_rows_kernel[(layers * batch * groups, triton.cdiv(dims, block_d), 2)](
            keys, values, rows, length, count, batch, groups, *keys.stride()[:4], *values.stride()[:4],
            KEY_DIM=keys.shape[4], VALUE_DIM=values.shape[4], BLOCK_R=block_r, BLOCK_D=block_d, num_warps=4, **_OPTIONS,
        )  # fmt: skip


def commit_plan(count: int, dims: int) -> tuple[int, int]:
    """Return the rows and the dims that one program moves: all rows at once, so that none is overwritten unread."""
    block_r = triton.next_power_of_2(count)
    return block_r, min(triton.next_power_of_2(dims), max(16, 8192 // block_r))


def naive_commit_rows(block: Tensor, rows: list[int], length: int) -> Tensor:
    """The truth of `commit_rows` for one block [layers, B, G, capacity, D]: a copy in which the rows have moved."""
    moved = block.clone()
    for to, row in enumerate(rows):
        if row >= 0:
            moved[:, :, :, length + to] = block[:, :, :, length + row]
    return moved
