"""LongSpec's block (arXiv 2502.17421): window self-attention, cross-attention onto the target's last layer, an MLP.

Modules are named as the published checkpoints are, so that a state dict is one. Used by the adapter and in training.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specx.adapters.longspec_checkpoints import BlockFormat

WINDOW = 513  # keys that a token sees of the block's own, itself included

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
# (queries, own keys, own values) -> what attention gives; queries [B, H, T, D], keys and values [B, G, T, D]
OwnAttention = Callable[[Tensor, Tensor, Tensor], Tensor]
CrossAttention = Callable[[Tensor], Tensor]
Tables = tuple[Tensor, Tensor]


class Rotary(nn.Module):
    """The target's own rotary embedding, its scaling included: the draft's config has no say.

    Args:
        module: Called as transformers calls it: (x, position_ids [1, T]) -> cos, sin, each [1, T, R].
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = [module]  # in a list, so that it is no part of this module

    def tables(self, positions: Tensor, like: Tensor) -> Tables:
        """Return cos and sin of positions, int64 [T] or [B, T], as [.., T, R] of `like`'s dtype and device."""
        shown = positions if positions.dim() == 2 else positions[None]
        cos, sin = (table.to(like.device) for table in self._module[0](like, shown))
        return cos[:, None], sin[:, None]  # for all heads


def rotated(x: Tensor, tables: Tables) -> Tensor:
    """Rotate [B, H, T, D]: its first R dims, pair (i, i + R / 2), as transformers rotates Llama's."""
    cos, sin = tables
    turning = x[..., : cos.shape[-1]]
    first, second = turning.chunk(2, -1)
    turned = turning * cos + torch.cat([-second, first], -1) * sin
    return turned if turning.shape == x.shape else torch.cat([turned, x[..., cos.shape[-1] :]], -1)


class LongSpecBlock(nn.Module):
    """One block. Embeddings and LM head are the target's; there is no final norm.

    Args:
        block: Its sizes; eps and activation are known by now.
        head_dim: D; both kinds of attention have it from the target.
        rotary: Of the target.
    """

    def __init__(self, block: BlockFormat, head_dim: int, rotary: nn.Module) -> None:
        super().__init__()
        if block.activation not in _ACTIVATIONS:
            raise ValueError(f"hidden_act {block.activation!r} is not known; known: {', '.join(_ACTIVATIONS)}")
        self.head_dim, self.scale, self.rotary = head_dim, head_dim**-0.5, Rotary(rotary)
        self.activation = _ACTIVATIONS[block.activation]
        queries, keys, hidden = block.queries, block.keys, block.hidden

        def attention(**rows: int) -> nn.ModuleDict:
            parts = {name: nn.Linear(hidden, count) for name, count in rows.items()}
            return nn.ModuleDict(parts | {"o_proj": nn.Linear(queries, hidden, bias=False)})

        self.self_attn = attention(q_proj=queries, k_proj=keys, v_proj=keys)
        self.cross_attn = attention(q_proj=queries)
        wide = {name: nn.Linear(hidden, block.intermediate, bias=block.mlp_bias) for name in ("gate_proj", "up_proj")}
        down = nn.Linear(block.intermediate, hidden, bias=block.mlp_bias)
        self.mlp = nn.ModuleDict(wide | {"down_proj": down})
        eps = 1e-6 if block.eps is None else block.eps
        self.input_layernorm = nn.RMSNorm(hidden, eps=eps)
        self.post_self_attention_layernorm = nn.RMSNorm(hidden, eps=eps)
        self.post_cross_attention_layernorm = nn.RMSNorm(hidden, eps=eps)

    def forward(self, x: Tensor, tables: Tables, own: OwnAttention, cross: CrossAttention) -> Tensor:
        """Return what the LM head reads, [B, T, hidden].

        Args:
            x: Embeddings of the tokens, [B, T, hidden].
            tables: cos and sin of their positions, which serve both kinds of attention.
            own, cross: Attention over the block's own keys, these tokens' among them, and over the target's.
        """
        entry = self.input_layernorm(x)
        query = rotated(self._heads(self.self_attn["q_proj"](entry)), tables)
        x = x + self._out("self_attn", own(query, *self._keys_values(entry, tables)))
        query = rotated(self._heads(self.cross_attn["q_proj"](self.post_self_attention_layernorm(x))), tables)
        x = x + self._out("cross_attn", cross(query))
        normed = self.post_cross_attention_layernorm(x)
        gate, up, down = (self.mlp[f"{name}_proj"] for name in ("gate", "up", "down"))
        return x + down(self.activation(gate(normed)) * up(normed))

    def keys_values(self, x: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
        """Return rotated keys, and values, [B, G, T, D]: functions of token and position alone, never stale."""
        return self._keys_values(self.input_layernorm(x), tables)

    def _keys_values(self, entry: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
        key = rotated(self._heads(self.self_attn["k_proj"](entry)), tables)
        return key, self._heads(self.self_attn["v_proj"](entry))

    def _heads(self, flat: Tensor) -> Tensor:
        return flat.unflatten(-1, (-1, self.head_dim)).transpose(-3, -2)  # [B, T, H * D] -> [B, H, T, D]

    def _out(self, part: str, attended: Tensor) -> Tensor:
        return getattr(self, part)["o_proj"](attended.transpose(1, 2).flatten(2))  # [B, H, T, D] -> [B, T, H * D]
