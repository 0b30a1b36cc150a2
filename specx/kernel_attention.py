"""The launcher of the tree attention kernel, and its plain truth."""

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from specx.kernel_checks import OPTIONS, check, check_cache, check_limits, factors, launching_on, limits_of
from specx.kernel_plans import MAX_SPLITS, attention_plan, choose_splits
from specx.kernels import merge_splits_kernel, tree_attention_kernel

MAX_QUERIES, MAX_TAIL = 256, 2304  # rows of a tree, and of all that the largest one has pending
WORD = 64  # tail rows a mask word


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
    padded = F.pad(mask, (0, -mask.shape[1] % WORD)).unflatten(1, (-1, WORD)).to(torch.int64)
    return (padded << torch.arange(WORD, device=mask.device)).sum(2)  # distinct bits: the sum cannot carry


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
        tail: P <= 2304, at least T where the queries' own rows are among them.
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
    inner, factor = factors(scale, softcap)
    if out is None:
        out = query.new_empty(batch, rows, heads, dim).transpose(1, 2)  # [B, T, H, D] in memory, as projections want it
    if lse is None:
        lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=device)
    check("out", out, query.dtype, (batch, heads, rows, dim), device, contiguous=False)
    check("lse", lse, torch.float32, (batch, heads, rows), device, contiguous=False)
    if out.stride(-1) != 1:
        raise ValueError(f"the last stride of out must be 1, got strides {out.stride()}")

    share = heads // groups
    processors, shared_limit = limits_of(device)
    plan = attention_plan(dim, share * rows, query.dtype, shared_limit)
    row_blocks = triton.cdiv(share * rows, plan.block_m)
    if splits is None:
        blocks = triton.cdiv(capacity, plan.block_n)
        splits = choose_splits(row_blocks * batch * groups, blocks, processors * plan.per_sm)
    check_limits(splits=(splits, 1, MAX_SPLITS))
    part_out = torch.empty(batch * heads * rows, splits, dim, dtype=torch.float32, device=device)
    part_lse = torch.empty(batch * heads * rows, splits, dtype=torch.float32, device=device)
    halves = words.view(torch.int32)
    padded, all_splits = triton.next_power_of_2(dim), triton.next_power_of_2(splits)
    with launching_on(device):
        tree_attention_kernel[(row_blocks, splits, batch * groups)](
            query, key, value, length, halves, length if positions is None else positions, part_out, part_lse,
            inner, factor, rows, tail, halves.shape[1], window or 0, capacity, groups,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
            SHARE=share, DIM=dim, PADDED=padded, BLOCK_M=plan.block_m, BLOCK_N=plan.block_n,
            WINDOWED=window is not None, CAPPED=softcap is not None, num_warps=plan.warps, num_stages=plan.stages,
            **OPTIONS,
        )  # fmt: skip
        merge_splits_kernel[(batch * heads * rows,)](
            part_out, part_lse, part_lse if sinks is None else sinks, out, lse, splits, rows, heads,
            *out.stride()[:3], *lse.stride(),
            DIM=dim, PADDED=padded, BLOCK_S=min(all_splits, 32), ALL_S=all_splits, SINKS=sinks is not None, num_warps=4,
            **OPTIONS,
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
    check_limits(T=(rows, 1, MAX_QUERIES), tail=(tail, 0, min(MAX_TAIL, key.shape[2])))
    check_cache(query, dim, key, value)
    if query.stride(-1) != 1:
        raise ValueError(f"the last stride of query must be 1, got strides {query.stride()}")
    check("length", length, torch.int32, (1,), device)
    check("words", words, torch.int64, (rows, triton.cdiv(tail, WORD)), device)
    if window is not None:
        if window < 1:
            raise ValueError(f"window must be at least 1 or None, got {window}")
        if positions is None:
            raise ValueError("a window needs the positions of the queries, int32 [T]")
        check("positions", positions, torch.int32, (rows,), device)
    if sinks is not None:
        check("sinks", sinks, None, (heads,), device)


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
