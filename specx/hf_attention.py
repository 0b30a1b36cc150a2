"""The attention function that transformers calls in every layer of an enabled model, and what it must know.

What the layers must know about a forward is one `Call`, set on them while it runs: two model families drop extra
keyword arguments silently.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from specx import attention

IMPLEMENTATION = "specx"


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """Queries of the score layer in one forward, from which attention rows can be computed afterwards.

    Attributes:
        query: [H, T, D], after RoPE.
        lse: Log-sum-exp of each row's scaled scores without sinks, float32 [H, T].
        scale, softcap: Of that layer.
    """

    query: Tensor
    lse: Tensor
    scale: float
    softcap: float | None


@dataclass(slots=True)
class Call:
    """One forward as its attention layers see it. Prefix row r sits at position r.

    Attributes:
        prefix: Committed rows L.
        positions: Of the T new tokens, int64 [T].
        mask: Which of the P tail rows each token sees, bool [T, P]; None: causal, P == T.
        tail_positions: Of the P tail rows, int64 [P].
        backend: Name of the attention backend.
        dense: Attend in one pass with a mask over prefix and tail, instead of flash and hybrid tree attention.
        score_layer: Layer whose queries are kept.
        windows: The sliding window that each layer asked for.
    """

    prefix: int
    positions: Tensor
    mask: Tensor | None
    tail_positions: Tensor
    backend: str
    dense: bool
    score_layer: int | None
    windows: dict[int, int | None] = field(default_factory=dict)
    scored: ScoredRows | None = None
    _biases: dict[Any, Tensor] = field(default_factory=dict)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, window: int | None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Attend over prefix and tail; `window` w lets position p see positions over p - w."""
        rows, keys = query.shape[2], key.shape[2]
        if window is not None and keys <= window:
            window = None
        start = 0 if window is None else max(0, self.prefix - window + 1)
        single = rows == 1 and keys - self.prefix == 1
        options["backend"] = self.backend
        if self.dense and not single:
            dense = self._bias("dense", window, start, query)
            return attention.attend(query, key[:, :, start:], value[:, :, start:], bias=dense, **options)
        causal = self.mask is None and (window is None or rows <= window)
        tail_bias = None if single or causal else self._bias("tail", window, start, query)
        cuts_prefix = window is not None and not single and self.prefix > start
        prefix_bias = self._bias("prefix", window, start, query) if cuts_prefix else None
        return attention.hybrid_tree_attention(
            query, key, value, self.prefix, tail_bias=tail_bias, prefix_bias=prefix_bias, start=start, **options
        )

    def _bias(self, part: str, window: int | None, start: int, like: Tensor) -> Tensor:
        """Build a bias once a forward and device, not once a layer."""
        key = part, window, like.dtype, like.device
        found = self._biases.get(key)
        if found is None:
            masks = []
            if part in ("prefix", "dense"):
                past = torch.arange(start, self.prefix, device=self.positions.device)
                distance = self.positions[:, None] - past
                masks.append(distance < window if window is not None else torch.ones_like(distance, dtype=torch.bool))
            if part in ("tail", "dense"):
                distance = self.positions[:, None] - self.tail_positions
                seen = self.mask if self.mask is not None else torch.ones_like(distance, dtype=torch.bool).tril()
                masks.append(seen & (distance < window) if window is not None else seen)
            found = attention.additive(torch.cat(masks, dim=1), like.dtype).to(like.device)
            self._biases[key] = found
        return found


def specx_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in every attention layer while a model is enabled.

    Args:
        module: The attention layer; carries the `Call`.
        query: [1, H, T, D], after RoPE.
        key, value: All rows of this layer, [1, G, N, D], as `TreeCache.update` returned them.
        attention_mask: None, for no mask function is registered under this name; else the layer made its own.
        s_aux: Attention sinks, [H]: logits without a value (gpt-oss).

    Returns:
        [1, T, H, Dv] and None.

    Raises:
        ValueError: If the layer brings a mask, which would be ignored.
    """
    call: Any = getattr(module, "_specx_call", None)  # a Call or a static.StaticCall
    if call is None:
        raise RuntimeError("the specx attention runs only inside specx; set another attn_implementation on this model")
    if attention_mask is not None:
        raise ValueError(f"this model cannot be enhanced: {type(module).__name__} makes an attention mask of its own")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out, lse = call.attend(query, key, value, sliding_window, scale=scale, softcap=softcap)
    layer = getattr(module, "layer_idx", -1)
    call.windows[layer] = sliding_window
    if layer == call.score_layer:
        call.scored = ScoredRows(query[0], lse[0], scale, softcap)
    if s_aux is not None:  # a sink takes its share of the softmax and gives nothing
        out = out * torch.sigmoid(lse - s_aux.float()[None, :, None])[..., None].to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, specx_attention)
