"""Attention kernels with one signature, each returning its log-sum-exp: the truth, and the flash kernels at hand.

A flash kernel that cannot serve a call (a mask, a dtype, a head size) falls back to `reference`, which serves all.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

# A masked score must stay finite: flash kernels return lse 0, not -inf, for a row whose scores are all -inf.
MASKED = {dtype: torch.finfo(dtype).min for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
_FEW_KEYS = 256
_BLOCK_ELEMENTS = 1 << 25  # scores that the reference materialises at once

_HALF = (torch.float16, torch.bfloat16)

Attend = Callable[..., tuple[Tensor, Tensor]]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a bool mask (True: may look) into a bias of 0 and the dtype's lowest number, of the same shape."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, MASKED[dtype])


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
    that is faster (measured): the keys are then read once for all of them.
    """
    batch, heads, rows, dim = query.shape
    groups, keys = key.shape[1:3]
    if softcap is not None or dim != value.shape[3]:
        return reference(query, key, value, scale, bias, causal, softcap)
    query, key, value = _unit_stride(query), _unit_stride(key), _unit_stride(value)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    share = heads // groups
    # A single row goes to one thread a head: packed, there may be fewer of them than threads.
    many = rows > 1 or (share >= 4 and groups >= torch.get_num_threads()) or query.dtype == torch.float32
    # A mask is repeated for packed rows: small heads of a short tail are not worth that, and a prefill's is too large.
    cheap = bias is None or ((keys >= _FEW_KEYS or dim > 64) and rows <= 256)
    if share == 1 or causal or not many or not cheap:
        out, lse = flash(query, key, value, 0.0, causal, attn_mask=bias, scale=scale)
        return out, lse
    packed = query.reshape(batch, groups, share * rows, dim)
    repeated = None if bias is None else bias.repeat(share, 1)
    out, lse = flash(packed, key, value, 0.0, False, attn_mask=repeated, scale=scale)
    return out.reshape(batch, heads, rows, dim), lse.reshape(batch, heads, rows)


def _unit_stride(tensor: Tensor) -> Tensor:
    """The kernel reads wrong memory, silently, where the last stride is not 1."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def torch_flash(
    query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None, causal: bool, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """FlashAttention-2 as PyTorch ships it: GQA and strides without copies. `reference` where it cannot."""
    if not _fits(query, key, value, bias) or softcap is not None:
        return reference(query, key, value, scale, bias, causal, softcap)
    rows = [_unit_stride(each).transpose(1, 2) for each in (query, key, value)]
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *rows, None, None, query.shape[2], key.shape[2], 0.0, causal, False, scale=scale
    )
    return out.transpose(1, 2), lse


def flash_attn(
    query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None, causal: bool, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """flash-attn 2, which also knows softcap. `reference` where it cannot."""
    if not _fits(query, key, value, bias):
        return reference(query, key, value, scale, bias, causal, softcap)
    from flash_attn import flash_attn_func

    rows = [_unit_stride(each).transpose(1, 2) for each in (query, key, value)]
    out, lse, _ = flash_attn_func(
        *rows, softmax_scale=scale, causal=causal, softcap=softcap or 0.0, return_attn_probs=True
    )
    return out.transpose(1, 2), lse


def _fits(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> bool:
    dim = query.shape[3]
    return (
        bias is None
        and query.is_cuda
        and query.dtype in _HALF
        and dim == value.shape[3]
        and dim <= 256
        and dim % 8 == 0
    )


def trouble_with(backend: str, device: torch.device) -> str | None:
    """Run a backend on small inputs and say what is wrong with it on `device`; None if it is right.

    The log-sum-exp is compared as well: its shape and base differ between releases.
    """
    if backend == "flash" and find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    try:
        generator, dtype = torch.Generator().manual_seed(0), torch.bfloat16
        sizes = ((1, 4, 5, 64), (1, 2, 70, 64), (1, 2, 70, 64))
        query, key, value = (torch.randn(size, generator=generator).to(device, dtype) for size in sizes)
        for causal in (False, True):
            rows = slice(0, 5 if causal else 70)
            inputs = query, key[:, :, rows], value[:, :, rows], 0.125, None, causal, None
            out, lse = BACKENDS[backend](*inputs)
            true_out, true_lse = reference(*inputs)
            if lse.shape != true_lse.shape:
                return f"its log-sum-exp has the shape {tuple(lse.shape)}, not {tuple(true_lse.shape)}"
            error = max((out - true_out).abs().max().item(), (lse - true_lse).abs().max().item())
            if not error < 0.05:
                return f"it is off by {error:.2g}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return None


BACKENDS: dict[str, Attend] = {
    "reference": reference,
    "cpu": cpu_flash,
    "triton": torch_flash,  # for a prefill; trees run on the kernel of ours
    "torch": torch_flash,
    "flash": flash_attn,
}
# In the order in which they are preferred; `reference` runs everywhere.
DEVICE_OF = {"cpu": "cpu", "triton": "cuda", "torch": "cuda", "flash": "cuda"}
WHY = {
    "cpu": "flash attention with log-sum-exp on the CPU",
    "triton": "trees in one pass by a kernel of ours, a prefill by PyTorch's flash attention",
    "torch": "PyTorch's flash attention with log-sum-exp",
    "flash": "flash-attn",
}
