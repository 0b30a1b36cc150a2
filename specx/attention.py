"""Attention over disjoint parts of the keys, merged by log-sum-exp: hybrid tree attention.

Source: arXiv 2505.20776 and 2502.17421. The committed prefix needs no mask, so it runs on a flash kernel; only the
small tail (tree nodes, or the causal triangle of a prefill chunk) carries one. Both parts return their log-sum-exp and
are merged exactly.

Layout here is always [B, H, T, D] (Hugging Face's); a backend that wants another one transposes inside itself.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# A masked score must stay finite: flash kernels return lse 0, not -inf, for a row whose scores are all -inf.
MASKED = {dtype: torch.finfo(dtype).min for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
_BLOCK_ELEMENTS = 1 << 25  # scores that the reference materialises at once

Attend = Callable[..., tuple[Tensor, Tensor]]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a bool mask (True: may look) into a bias of 0 and the dtype's lowest number, of the same shape."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, MASKED[dtype])


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    causal: bool = False,
    softcap: float | None = None,
    backend: str = "reference",
) -> tuple[Tensor, Tensor]:
    """Attend over one set of keys and also return the log-sum-exp that merging needs.

    Args:
        query: [B, H, T, D].
        key, value: [B, G, N, D] and [B, G, N, Dv], H a multiple of G; any strides.
        scale: Factor on the scores.
        bias: Added to the scaled scores, [T, N] in query's dtype; masked entries hold `MASKED[dtype]`, never -inf.
        causal: Row i sees keys 0..i; needs T == N and no bias.
        softcap: c gives c * tanh(score / c) before the bias (Gemma 2).
        backend: A name in `BACKENDS`.

    Returns:
        Output [B, H, T, Dv] in query's dtype, and the natural log-sum-exp, float32 [B, H, T]. Without any key the
        output is 0 and the log-sum-exp -inf.

    Raises:
        ValueError: If `causal` is asked for with a bias or T != N, or H is no multiple of G.
    """
    if query.shape[1] % key.shape[1]:  # the CPU flash kernel divides by H // G
        raise ValueError(f"{query.shape[1]} query heads cannot share {key.shape[1]} key heads evenly")
    if causal and (bias is not None or query.shape[2] != key.shape[2]):
        raise ValueError("causal attention takes no bias and as many queries as keys")
    if key.shape[2] == 0 or query.shape[2] == 0:  # the CPU flash kernel divides by zero here
        out = query.new_zeros(*query.shape[:3], value.shape[3])
        return out, torch.full(query.shape[:3], -torch.inf, device=query.device)
    return BACKENDS[backend](query, key, value, scale, bias, causal, softcap)


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Combine attention over two disjoint key sets into attention over their union.

    Args:
        out_a, out_b: Normalised outputs, [B, H, T, D].
        lse_a, lse_b: Natural log-sum-exp of the scaled scores, float32 [B, H, T]; -inf for an empty set.

    Returns:
        Output [B, H, T, D] in `out_a`'s dtype, and the log-sum-exp of the union, float32 [B, H, T].
    """
    # w_a = e^lse_a / (e^lse_a + e^lse_b); -inf - -inf is nan: two empty sets are an empty set
    weight = torch.sigmoid(lse_a - lse_b).nan_to_num(0.0).unsqueeze(-1)
    wide = torch.promote_types(out_a.dtype, weight.dtype)
    out = torch.lerp(out_b.to(wide), out_a.to(wide), weight.to(wide))
    return out.to(out_a.dtype), torch.logaddexp(lse_a, lse_b)


def hybrid_tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: int,
    *,
    tail_bias: Tensor | None,
    prefix_bias: Tensor | None = None,
    start: int = 0,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Attend to keys [start, prefix) without a tree mask and to the tail [prefix, N) with one, and merge.

    Args:
        query: [B, H, T, D].
        key, value: [B, G, N, D], [B, G, N, Dv]; the last N - prefix rows are the tail.
        prefix: Committed rows L.
        tail_bias: Ancestor mask as a bias, [T, N - prefix]; None means causal with N - prefix == T.
        prefix_bias: [T, prefix - start] where a sliding window cuts the prefix differently for each row.
        start: First prefix row that any query may see (a sliding window's border).
        options: scale, softcap and backend of `attend`.

    Returns:
        Output [B, H, T, Dv] and log-sum-exp, float32 [B, H, T].
    """
    rows = query.shape[2]
    if rows == 1 and key.shape[2] - prefix == 1 and tail_bias is None and prefix_bias is None:
        return attend(query, key[:, :, start:], value[:, :, start:], **options)  # one token sees all of it
    tail_key, tail_value = key[:, :, prefix:], value[:, :, prefix:]
    tail = attend(query, tail_key, tail_value, bias=tail_bias, causal=tail_bias is None, **options)
    if prefix <= start:
        return tail
    past = attend(query, key[:, :, start:prefix], value[:, :, start:prefix], bias=prefix_bias, **options)
    return merge_states(*past, *tail)


def reference(
    query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None, causal: bool, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Plain matrix products, any dtype and device: the truth that the other backends are tested against.

    Works through blocks of query rows, so that memory stays bounded for long prefills.
    """
    rows, keys, heads = query.shape[2], key.shape[2], query.shape[1]
    block = max(1, _BLOCK_ELEMENTS // (heads * keys))
    if block >= rows:
        return _reference_block(query, key, value, scale, _bias_rows(bias, causal, 0, rows, keys, query), softcap)
    parts = []
    for first in range(0, rows, block):
        last = min(first + block, rows)
        own = _bias_rows(bias, causal, first, last, keys, query)
        parts.append(_reference_block(query[:, :, first:last], key, value, scale, own, softcap))
    return torch.cat([out for out, _ in parts], dim=2), torch.cat([lse for _, lse in parts], dim=2)


def _bias_rows(bias: Tensor | None, causal: bool, first: int, last: int, keys: int, like: Tensor) -> Tensor | None:
    if causal:
        seen = torch.ones(last - first, keys, dtype=torch.bool, device=like.device).tril(first)
        return additive(seen, like.dtype)
    return None if bias is None else bias[first:last]


def _reference_block(
    query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    batch, heads, rows, dim = query.shape
    groups = key.shape[1]
    wide = query.dtype if query.dtype == torch.float64 else torch.float32
    packed = query.reshape(batch, groups, heads // groups * rows, dim).to(wide)  # GQA without repeating keys
    scores = torch.matmul(packed, key.to(wide).transpose(-1, -2)).mul_(scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.view(batch, heads, rows, -1)
    if bias is not None:
        scores = scores + bias.to(wide)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.unsqueeze(-1)).exp_().view(batch, groups, heads // groups * rows, -1)
    out = torch.matmul(weights, value.to(wide)).view(batch, heads, rows, -1)
    return out.to(query.dtype), lse if wide == torch.float64 else lse.float()


def cpu_flash(
    query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None, causal: bool, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """PyTorch's CPU flash kernel, which returns its log-sum-exp. Falls back to `reference` where the kernel cannot.

    It knows no softcap and only equal key and value dims. Query heads that share keys are packed as extra rows where
    that is faster (measured: several rows, or float32).
    """
    batch, heads, rows, dim = query.shape
    groups = key.shape[1]
    if softcap is not None or dim != value.shape[3]:
        return reference(query, key, value, scale, bias, causal, softcap)
    query, key, value = _unit_stride(query), _unit_stride(key), _unit_stride(value)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    packs = heads != groups and not causal and (rows > 1 or query.dtype == torch.float32)
    if not packs or (bias is not None and rows > 256):
        out, lse = flash(query, key, value, 0.0, causal, attn_mask=bias, scale=scale)
        return out, lse
    share = heads // groups
    packed = query.reshape(batch, groups, share * rows, dim)
    repeated = None if bias is None else bias.repeat(share, 1)
    out, lse = flash(packed, key, value, 0.0, False, attn_mask=repeated, scale=scale)
    return out.reshape(batch, heads, rows, dim), lse.reshape(batch, heads, rows)


def _unit_stride(tensor: Tensor) -> Tensor:
    """The kernel reads wrong memory, silently, where the last stride is not 1."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


BACKENDS: dict[str, Attend] = {"reference": reference, "cpu": cpu_flash}


def choose_backend(name: str, device: torch.device) -> tuple[str, str]:
    """Return the backend's name and, in words, why.

    Args:
        name: "auto" or a name in `BACKENDS`.
        device: Where the keys live.

    Raises:
        ValueError: If the named backend cannot run on `device`.
    """
    has_flash = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
    if name == "cpu" and (device.type != "cpu" or not has_flash):
        raise ValueError(f"backend cpu needs a CPU device and a torch with CPU flash attention; the device is {device}")
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}; got {name!r}")
    if name != "auto":
        return name, "asked for"
    if device.type == "cpu" and has_flash:
        return "cpu", "flash attention with log-sum-exp on the CPU"
    return "reference", f"no flash kernel of ours for {device.type} yet: plain matrix products"
