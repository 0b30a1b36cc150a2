"""The Triton kernels as the rest of specx calls them, and a plain truth (`naive_*`) beside each.

Every tensor lies on one device. Caches are handed over with their whole capacity and any strides but a last one of 1;
`length`, int32 [1] on the device, says how many of their rows are committed, so one captured CUDA graph serves every
length up to the capacity. Rows behind the committed and pending ones are never read: they may hold anything, NaN too.
"""

from specx.kernel_attention import MAX_QUERIES, MAX_TAIL, naive_tree_attention, pack_mask, tree_attention
from specx.kernel_checks import DTYPES, HEAD_DIMS
from specx.kernel_commit import MAX_COMMIT, commit_rows, naive_commit_rows
from specx.kernel_plans import MAX_SPLITS, Plan, attention_plan, choose_splits, chunk_plan, commit_plan
from specx.kernel_scores import MAX_CHUNK, chunk_scores, naive_chunk_scores

__all__ = [
    "DTYPES",
    "HEAD_DIMS",
    "MAX_CHUNK",
    "MAX_COMMIT",
    "MAX_QUERIES",
    "MAX_SPLITS",
    "MAX_TAIL",
    "Plan",
    "attention_plan",
    "choose_splits",
    "chunk_plan",
    "chunk_scores",
    "commit_plan",
    "commit_rows",
    "naive_chunk_scores",
    "naive_commit_rows",
    "naive_tree_attention",
    "pack_mask",
    "tree_attention",
]
