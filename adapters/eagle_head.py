"""The forward of an EAGLE head, for all of its versions (arXiv 2401.15077, 2406.16858, 2503.01840).

Entry i pairs the target's feature of token i with the embedding of token i + 1 and predicts token i + 2. It sits at
position i. Where no true feature exists yet, in a tree, the head's own output stands in for it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specx.adapters.eagle_format import HeadFormat
from specx.adapters.eagle_rope import rotation
from specx.cache import TreeCache
from specx.hf_attention import Call
from specx.hf_config import device_of

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


@dataclass(frozen=True, slots=True)
class HeadOutput:
    """What one forward gave.

    Attributes:
        states: What stands in for the next features, [T, hidden].
        read: What the LM head reads, [T, hidden].
        keys, values: Of all layers before rotation, [layers, 1, G, T, D].
    """

    states: Tensor
    read: Tensor
    keys: Tensor
    values: Tensor

    def first(self, rows: int) -> "HeadOutput":
        """Return the part of the first `rows` entries."""
        if rows == len(self.states):
            return self
        states, read = self.states[:rows], self.read[:rows]
        return HeadOutput(states, read, self.keys[:, :, :, :rows], self.values[:, :, :, :rows])


class EagleHead(nn.Module):
    """One head. All tensors [T, hidden] unless said; ids int64 [T].

    Args:
        head: What it is.
        tensors: Its weights, see `eagle_checkpoints.read_head`, already on their device and of their dtype.
        embedding: Of ids, where the head brings none.
        lm_head: Reads the head's output, where the head brings none.
    """

    def __init__(
        self, head: HeadFormat, tensors: dict[str, Tensor], embedding: nn.Embedding, lm_head: nn.Linear
    ) -> None:
        super().__init__()
        if head.activation not in _ACTIVATIONS:
            raise ValueError(f"hidden_act {head.activation!r} is not known; known: {', '.join(_ACTIVATIONS)}")
        self.head = head
        self.device: torch.device = tensors["fc.weight"].device
        self.fc = _linear(tensors, "fc")
        self.rotation, factor = rotation(head.rope, head.head_dim, self.device)
        self.scale = head.head_dim**-0.5 * factor * factor
        self.layers = nn.ModuleList(_Layer(head, tensors, number) for number in range(head.layers))
        self.embed_norm = _norm(tensors, "layers.0.input_layernorm", head) if head.is_eagle3 else None
        self.state_norm = _norm(tensors, "layers.0.hidden_norm", head) if head.is_eagle3 else None
        self.norm = _norm(tensors, "norm", head) if head.norm != "none" else None
        self.input_norm = _norm(tensors, "input_norm", head)
        each = [_norm(tensors, f"fc_norm.{number}", head) for number in range(head.sources)]
        self.fc_norm = nn.ModuleList(norm for norm in each if norm is not None)
        own = tensors.get("embed_tokens.weight")
        self.embedding = nn.Embedding.from_pretrained(own) if own is not None else embedding
        self.lm_head = _linear(tensors, "lm_head") if "lm_head.weight" in tensors else lm_head

    def fuse(self, features: Sequence[Tensor]) -> Tensor:
        """Turn the target's features, one [T, target_hidden] a source, into the states of these tokens."""
        if not self.head.is_eagle3:
            return features[0]
        if self.fc_norm:
            features = [norm(each) for norm, each in zip(self.fc_norm, features, strict=True)]
        fused = torch.cat(list(features), -1)
        return self.fc(fused if self.input_norm is None else self.input_norm(fused))

    def forward(self, ids: Tensor, states: Tensor, cache: TreeCache, call: Call) -> HeadOutput:
        """Run T entries; their keys and values become pending rows of `cache`, one layer of it for each of the head's.

        Args:
            ids: Token i + 1 of each entry.
            states: State of token i.
            call: What the entries see, and at which positions.
        """
        entry, hidden = self._enter(ids, states)
        keys, values = [], []
        layer: Any  # nn.Module types no attribute of its parts
        for layer in self.layers:
            entry = layer.before(hidden) if layer.before is not None else entry
            query, key, value = layer.project(entry)
            turned = self.rotation.move(torch.cat([query, key], 1), call.positions)
            past = cache.update(turned[:, query.shape[1] :], value, layer.number)
            out, _ = call.attend(turned[:, : query.shape[1]], *past, layer.window, scale=self.scale)
            hidden = layer(hidden, out)
            keys.append(key)
            values.append(value)
        cache.advance(len(ids))
        read = hidden if self.norm is None else self.norm(hidden)
        return HeadOutput(read if self.head.norm == "both" else hidden, read, torch.stack(keys), torch.stack(values))

    def project(self, ids: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first layer's keys, before rotation, and values, [1, 1, G, T, D]: they need no attention."""
        layer: Any = self.layers[0]
        key, value = layer.keys_values(self._enter(ids, states)[0])
        return key[None], value[None]

    def logits(self, read: Tensor) -> Tensor:
        """Return the logits [T, columns of the LM head] on the head's device."""
        return self.lm_head(read.to(device_of(self.lm_head))).to(self.device)

    def allocate(self, cache: TreeCache) -> None:
        """Give an empty cache its memory, so that rows can be gathered into it before anything was computed."""
        none = self.fc.weight.new_empty(1, self.head.kv_heads, 0, self.head.head_dim)
        for number in range(self.head.layers):
            cache.update(none, none, number)

    def _enter(self, ids: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the first layer's attention reads, and its residual."""
        table = self.embedding
        # A target may know ids beyond the head's last one.
        embeds = table(ids.clamp(max=len(table.weight) - 1).to(device_of(table))).to(states)
        if self.embed_norm is None or self.state_norm is None:
            entry = self.fc(torch.cat([embeds, states], -1))
            return entry, entry
        normed = self.state_norm(states)
        return torch.cat([self.embed_norm(embeds), normed], -1), normed if self.head.residual_normed else states


class _Layer(nn.Module):
    """A decoder layer of Llama's kind; the first one's input is made by the head."""

    def __init__(self, head: HeadFormat, tensors: dict[str, Tensor], number: int) -> None:
        super().__init__()
        self.number, self.window, self.head_dim = number, head.windows[number], head.head_dim
        self.activation: Callable[[Tensor], Tensor] = _ACTIVATIONS[head.activation]
        prefix = f"layers.{number}."
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        self.query, self.key, self.value, self.out = (_linear(tensors, f"{prefix}self_attn.{each}") for each in names)
        self.gate, self.up, self.down = (
            _linear(tensors, f"{prefix}mlp.{each}_proj") for each in ("gate", "up", "down")
        )
        self.before = _norm(tensors, prefix + "input_layernorm", head) if number else None
        self.after = _norm(tensors, prefix + "post_attention_layernorm", head)
        self.query_norm = _norm(tensors, f"{prefix}self_attn.q_norm", head)
        self.key_norm = _norm(tensors, f"{prefix}self_attn.k_norm", head)

    def forward(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Return the new hidden states, [T, hidden].

        Args:
            hidden: The residual.
            attended: What attention gave, [1, H, T, D].
        """
        hidden = hidden + self.out(attended[0].transpose(0, 1).flatten(1))  # [H, T, D] -> [T, H * D]
        normed = hidden if self.after is None else self.after(hidden)
        return hidden + self.down(self.activation(self.gate(normed)) * self.up(normed))

    def project(self, entry: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [1, H, T, D], keys and values [1, G, T, D], before rotation."""
        return self._heads(self.query(entry), self.query_norm), *self.keys_values(entry)

    def keys_values(self, entry: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys, before rotation, and values, [1, G, T, D]."""
        return self._heads(self.key(entry), self.key_norm), self._heads(self.value(entry), None)

    def _heads(self, flat: Tensor, norm: nn.Module | None) -> Tensor:
        split = flat.unflatten(-1, (-1, self.head_dim))
        return (split if norm is None else norm(split)).transpose(0, 1)[None]  # [T, G, D] -> [1, G, T, D]


class _RMSNorm(nn.Module):
    """Normalises in float32 and scales in the input's dtype, as Llama does."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight, requires_grad=False), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def _norm(tensors: dict[str, Tensor], name: str, head: HeadFormat) -> _RMSNorm | None:
    weight = tensors.get(name + ".weight")
    return None if weight is None else _RMSNorm(weight, head.eps)


def _linear(tensors: dict[str, Tensor], name: str) -> nn.Linear:
    weight, bias = tensors[name + ".weight"], tensors.get(name + ".bias")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer
