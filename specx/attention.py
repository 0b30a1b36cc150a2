"""Attention over disjoint parts of the keys, merged by log-sum-exp: hybrid tree attention.

Source: arXiv 2505.20776 and 2502.17421. The committed prefix needs no mask, so it runs on a flash kernel; only the
small tail (tree nodes, or the causal triangle of a prefill chunk) carries one. Both parts return their log-sum-exp and
are merged exactly.

Layout here is always [B, H, T, D] (Hugging Face's); a backend that wants another one transposes inside itself.
"""

from typing import Any

import torch
from torch import Tensor

from specx.backends import BACKENDS, DEVICE_OF, MASKED, WHY, additive, reference, trouble_with
from specx.static_attention import trouble_with_kernel

__all__ = [
    "BACKENDS",
    "MASKED",
    "additive",
    "attend",
    "choose_backend",
    "hybrid_tree_attention",
    "merge_states",
    "reference",
]

_sound: set[tuple[str, torch.device]] = set()  # backends that computed what they should, and where


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


def choose_backend(name: str, device: torch.device) -> tuple[str, str]:
    """Return the backend's name and, in words, why. On CUDA each is tried on small inputs before it is taken.

    Args:
        name: "auto" or a name in `BACKENDS`.
        device: Where the keys live.

    Raises:
        ValueError: If the named backend cannot run on `device`.
    """
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}; got {name!r}")
    kind = DEVICE_OF.get(name)
    if kind is not None:
        if device.type != kind:
            raise ValueError(f"backend {name} needs a {kind.upper()} device; the device is {device}")
        trouble = _trouble(name, device)
        if trouble:
            raise ValueError(f"backend {name} cannot be used: {trouble}")
    if name != "auto":
        return name, "asked for"
    reasons: list[str] = []
    for each, runs_on in DEVICE_OF.items():
        if runs_on == device.type:
            trouble = _trouble(each, device)
            if trouble is None:
                return each, "; ".join([WHY[each], *reasons])
            reasons.append(f"not {each}: {trouble}")
    return "reference", "; ".join([f"plain matrix products, for there is no flash kernel for {device.type}", *reasons])


def _trouble(name: str, device: torch.device) -> str | None:
    """Try a backend on a device, until it has been found right once; what was wrong may pass (memory)."""
    if (name, device) in _sound:
        return None
    trouble = trouble_with(name, device) or (trouble_with_kernel(device) if name == "triton" else None)
    if trouble is None:
        _sound.add((name, device))
    return trouble
