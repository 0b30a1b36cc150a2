"""The launcher of the chunk score kernel, and its plain truth."""

from typing import Literal

import torch
import triton
from torch import Tensor

from specx.kernel_checks import OPTIONS, check, check_cache, check_limits, factors, launching_on, limits_of
from specx.kernel_plans import chunk_plan
from specx.kernels import chunk_scores_kernel

MAX_CHUNK = 256


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
    check_cache(query, dim, key)
    if query.stride(-1) != 1:
        raise ValueError(f"the last stride of query must be 1, got strides {query.stride()}")
    check("lse", lse, torch.float32, (query.shape[0],), key.device)
    check("length", length, torch.int32, (1,), key.device)
    check_limits(chunk_size=(chunk_size, 1, MAX_CHUNK))
    if heads not in ("mean", "max", None):
        raise ValueError(f"heads must be mean, max or None, got {heads!r}")
    inner, factor = factors(scale, softcap)
    chunks = triton.cdiv(capacity, chunk_size)
    span, tile, stages = chunk_plan(dim, chunk_size, key.dtype)
    if splits is None:
        tiles = triton.cdiv(chunks, tile)
        splits = max(1, min(tiles, 2 * limits_of(key.device)[0] // groups))
    share = query.shape[0] // groups
    scores = torch.empty(query.shape[0], chunks, dtype=torch.float32, device=key.device)
    with launching_on(key.device):
        chunk_scores_kernel[(splits, groups)](
            query, key, lse, length, scores, inner, factor, capacity, query.stride(0), *key.stride()[:2],
            SHARE=share, BLOCK_H=max(16, triton.next_power_of_2(share)), DIM=dim, PADDED=triton.next_power_of_2(dim),
            CHUNK=chunk_size, SPAN=span, TILE=tile, CAPPED=softcap is not None, num_warps=4, num_stages=stages,
            **OPTIONS,
        )  # fmt: skip
    if heads is None:
        return scores
    return scores.mean(0) if heads == "mean" else scores.amax(0)


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
