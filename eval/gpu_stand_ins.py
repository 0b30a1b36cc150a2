"""What the Triton kernels compute, by plain products, with their signatures: for a trial of the suite without a GPU."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from specx.kernel_launch import naive_chunk_scores, naive_commit_rows, naive_tree_attention


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    length: Tensor,
    words: Tensor,
    tail: int,
    *,
    splits: int | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """As `kernel_launch.tree_attention`."""
    bits = (words[:, :, None] >> torch.arange(64, device=words.device)) & 1
    mask = bits.flatten(1)[:, :tail].bool()
    wide = query.double(), key.double(), value.double()
    out, lse = naive_tree_attention(*wide, int(length), mask, **options)
    return out.to(query.dtype), lse.float()


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
    """As `kernel_launch.chunk_scores`."""
    wide = key.double(), query.double(), lse.double()
    scores = naive_chunk_scores(*wide, int(length), scale=scale, softcap=softcap, chunk_size=chunk_size).float()
    scores = F.pad(scores, (0, -(-key.shape[1] // chunk_size) - scores.shape[1]))
    if heads is None:
        return scores
    return scores.mean(0) if heads == "mean" else scores.amax(0)


def commit_rows(keys: Tensor, values: Tensor, rows: Tensor, length: Tensor) -> None:
    """As `kernel_launch.commit_rows`."""
    for block in (keys, values):
        block.copy_(naive_commit_rows(block, rows.tolist(), int(length)))
