"""Which tokens of the context the draft keeps: sinks and recent ones by rule, chunks by the target's attention.

Cross-model retrieval is the idea of SpecExtend (arXiv 2505.20776, section 4); sinks are StreamingLLM's (2309.17453).
Everything here is a pure function of its arguments; a generation's state lives elsewhere.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from specx.config import CacheConfig, TreeConfig
from specx.cuda import sent

_PART = 8192  # keys that are converted at a time


def chunk_scores(
    key: Tensor,
    query: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float | None,
    chunk_size: int,
    heads: Literal["mean", "max"] = "mean",
    fused: bool = False,
) -> Tensor:
    """Score chunks of the context by one row of attention: mean weight a token, mean (or maximum) over heads.

    Args:
        key: Committed keys of the score layer, [G, L, D].
        query: The row's queries, [H, D].
        lse: Its log-sum-exp over everything it saw, float32 [H].
        scale, softcap: Of that layer.
        chunk_size: Tokens a chunk; the last one may be partial and is averaged over its own tokens.
        heads: How the heads' scores of a chunk become one.
        fused: Whether to run the Triton kernel, where it takes these sizes.

    Returns:
        float32 [C], C = ceil(L / chunk_size).
    """
    groups, length, dim = key.shape
    if fused:
        from specx import kernel_launch

        if (
            dim in kernel_launch.HEAD_DIMS
            and key.dtype in kernel_launch.DTYPES
            and chunk_size <= kernel_launch.MAX_CHUNK
        ):
            rows = sent([length], key.device, torch.int32)
            options: dict[str, Any] = {"scale": scale, "softcap": softcap, "chunk_size": chunk_size, "heads": heads}
            return kernel_launch.chunk_scores(key, query.to(key.dtype), lse.contiguous(), rows, **options)
    packed = query.reshape(groups, -1, dim).float().transpose(1, 2)
    # In float32, and by parts that a cache holds: oneDNN compiles a bf16 product for every new length, at 3.5 ms each.
    parts = [torch.matmul(part.float(), packed) for part in key.split(_PART, 1)]
    scores = torch.cat(parts, 1).transpose(1, 2).mul_(scale)  # [G, H/G, L]
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = (scores - lse.view(groups, -1, 1)).exp_().flatten(0, 1)  # [H, L]
    if heads == "mean":
        weights = weights.mean(0, keepdim=True)
    chunks = -(-length // chunk_size)
    sums = F.pad(weights, (0, chunks * chunk_size - length)).unflatten(1, (chunks, chunk_size)).sum(2)
    sizes = sums.new_full((chunks,), chunk_size)
    sizes[-1] = length - (chunks - 1) * chunk_size
    return sums.amax(0) / sizes


@dataclass(frozen=True, slots=True)
class Kept:
    """What the draft keeps: ascending token indices, int64 [K], and the ids of chunks that retrieval chose."""

    indices: Tensor
    chunks: tuple[int, ...] = ()


def select(scores: Tensor | None, length: int, sinks: int, recent: int, top_chunks: int, chunk_size: int) -> Kept:
    """Choose the tokens to keep out of `length`: sinks, the recent window, the newest chunk, the best of the others.

    Args:
        scores: Chunk scores, float32 [C]; C may lag behind `length` by the newest tokens. None: no chunks.
    """
    device = scores.device if scores is not None else None
    kept = torch.zeros(length, dtype=torch.bool, device=device)
    kept[:sinks] = True
    kept[max(0, length - recent) :] = True
    chosen: tuple[int, ...] = ()
    first, last = sinks // chunk_size, (length - recent - 1) // chunk_size  # the rules keep all other chunks anyway
    if top_chunks and scores is not None and last == (length - 1) // chunk_size:
        kept[last * chunk_size :] = True  # longer than the recent window, the newest chunk takes a place unscored
        top_chunks, last = top_chunks - 1, last - 1
    if scores is not None and top_chunks and first <= last:
        candidates = scores[first : last + 1]
        best = candidates.topk(min(top_chunks, len(candidates))).indices.sort().values + first
        tokens = (best[:, None] * chunk_size + torch.arange(chunk_size, device=device)).flatten()
        kept[tokens[tokens < length]] = True
        chosen = tuple(best.tolist())
    return Kept(kept.nonzero().flatten(), chosen)


@dataclass(frozen=True, slots=True)
class CachePolicy:
    """Decides when the draft's cache is rebuilt and from which tokens, so that its positions stay in `draft_context`.

    Attributes:
        name: full, window, retrieval or auto.
        limit: Positions that a bounded cache may reach, tree included.
        reach: Positions that two rounds may add: the tokens of one and the levels of the next one's tree.
    """

    name: str
    limit: int
    reach: int
    sinks: int
    recent: int
    top_chunks: int
    chunk_size: int
    every: int

    @classmethod
    def plan(cls, name: str, config: CacheConfig, tree: TreeConfig, draft_context: int) -> "CachePolicy":
        """Divide `draft_context` among sinks, recent tokens, chunks and room to append.

        Raises:
            ValueError: If `draft_context` is too small for the tree and the tokens kept by rule.
        """
        reach = 2 * (tree.depth + 2)
        scored = name in ("retrieval", "auto")
        # A window is rebuilt when it is full: an eighth of free room makes that rare.
        slack = reach + config.retrieve_every * (tree.depth + 2) if scored else max(reach, draft_context // 8)
        room = draft_context - config.sinks - slack
        if room < 1:
            raise ValueError(
                f"draft_context {draft_context} has no room for {config.sinks} sinks and {slack} positions of new "
                f"tokens and tree; lower depth, retrieve_every or sinks, or raise draft_context"
            )
        # A quarter for recent tokens did best on the bundled pair, and they take what the chunks leave.
        spare = max(draft_context // 4, room - config.top_chunks * config.chunk_size) if scored else room
        recent = min(config.recent or spare, room)
        chunks = min(config.top_chunks, (room - recent) // config.chunk_size) if scored else 0
        limit = min(draft_context, config.sinks + recent + chunks * config.chunk_size + slack)
        if name == "auto":
            limit = draft_context
        return cls(name, limit, reach, config.sinks, recent, chunks, config.chunk_size, config.retrieve_every)

    def due(self, length: int, cached: int, waiting: int, steps_since: int) -> bool:
        """Tell whether the draft's cache must be rebuilt before the next tree.

        Args:
            length: Tokens of the context, without the root.
            cached: Tokens in the draft's cache.
            waiting: Accepted tokens not fed to the draft yet, root included.
            steps_since: Verification steps since the last rebuild.
        """
        if self.name == "full":
            return False
        if not self.fits(cached + waiting):
            return True
        dropped = length + 1 - cached - waiting
        return dropped > 0 and self.top_chunks > 0 and steps_since >= self.every

    def fits(self, tokens: int) -> bool:
        """Tell whether a cache of `tokens` rows and one more tree stay within the limit."""
        return self.name == "full" or tokens + self.reach // 2 <= self.limit

    def select(self, scores: Tensor | None, length: int) -> Kept:
        """Return the tokens to keep out of the first `length`."""
        return select(scores, length, self.sinks, self.recent, self.top_chunks, self.chunk_size)
