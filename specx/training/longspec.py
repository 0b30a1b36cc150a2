"""Training LongSpec drafts (arXiv 2502.17421): anchor-offset indices, flash noisy training, the target frozen.

The block reads its own keys through a window and the target's last layer some tokens late, as it does when it drafts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from specx.adapters.longspec_block import WINDOW, LongSpecBlock
from specx.adapters.longspec_checkpoints import BlockFormat
from specx.adapters.longspec_loader import check_fit
from specx.hf import HFModel
from specx.training.features import directly
from specx.training.loss import cross_entropy, target_head

SINKS = 4  # of the first tokens, up to so many keep their places where the others are shifted
MAX_OFFSET = 30000


class LastLayer(Cache):
    """Takes the last layer's keys, rotated, and values, [B, G, T, D] each, from one forward; keeps no other layer's."""

    is_compileable = False
    is_sliding: Any = ()
    is_linear: Any = ()
    is_dummy: Any = ()

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[])
        self.last = layers - 1
        self.rows: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep the last layer's."""
        if layer_idx == self.last:
            self.rows = key_states, value_states
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return int(query_length), 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def __len__(self) -> int:
        return self.last + 1


@dataclass(frozen=True, slots=True)
class LongSpecLoss:
    """What is learnt, and how.

    Attributes:
        anchor_offset: Shift all but a few first tokens by a random distance, so that far positions are seen in short
            windows.
        noisy: Read the target 1 .. `lag` tokens late, drawn once a step; False: always 1, as at a tree's root.
        lag: The most.
        distill: Learn the target's distribution instead of the text's next token, which LongSpec learns.
        positions: That the target has.
    """

    anchor_offset: bool = True
    noisy: bool = True
    lag: int = 4
    distill: bool = False
    positions: int = MAX_OFFSET

    def place(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """Draw the positions of a window, int64 [length]."""
        positions = np.arange(length)
        if self.anchor_offset:
            sinks = int(rng.integers(0, SINKS + 1))
            positions[sinks:] += int(rng.integers(0, max(min(MAX_OFFSET, self.positions) - length, 0) + 1))
        return positions

    def late(self, rng: np.random.Generator) -> int:
        """Draw how late the target is read."""
        return int(rng.integers(1, self.lag + 1)) if self.noisy else 1


class LongSpecTask(nn.Module):
    """A block in training; its parameters are the block's.

    Args:
        target: Frozen; gives embeddings, last layer and LM head.
    """

    def __init__(self, target: PreTrainedModel, block: LongSpecBlock, loss: LongSpecLoss) -> None:
        super().__init__()
        self.target_of = [target]  # in a list, so that it is no part of this module
        self.block, self.how = block, loss
        self.watched: Callable[..., tuple[Tensor, ...]] = directly

    def forward(self, ids: Tensor, draw: tuple[int, ...]) -> Tensor:
        """Return the mean loss in nats on windows of tokens, int64 [B, T + 1]; `draw` seeds positions and lag."""
        rng = np.random.default_rng(draw)
        positions = torch.from_numpy(self.how.place(ids.shape[1] - 1, rng)).to(ids.device)
        return self.loss(ids, positions, self.how.late(rng))

    def loss(self, ids: Tensor, positions: Tensor, lag: int) -> Tensor:
        """Return the mean loss on tokens [B, T + 1] at positions int64 [T]; row t sees the target's rows up to t - lag.

        The first `lag` rows see none of them, and their cross-attention gives nothing.
        """
        target: Any = self.target_of[0]
        tokens = ids[:, :-1]
        keys, values, last = self.watched(self.watch, tokens, positions)
        embedding, lm_head = target.get_input_embeddings(), target.get_output_embeddings()
        x = embedding(tokens).to(self.block.input_layernorm.weight.dtype)
        tables = self.block.rotary.tables(positions, x)

        def cross(query: Tensor) -> Tensor:
            count = query.shape[2] - lag
            if count < 1:
                return torch.zeros_like(query)
            seen = (keys[:, :, :count].to(query.dtype), values[:, :, :count].to(query.dtype))
            options = {"is_causal": True, "scale": self.block.scale, "enable_gqa": True}
            out = F.scaled_dot_product_attention(query[:, :, lag:], *seen, **options)
            return F.pad(out, (0, 0, lag, 0))

        hidden = self.block(x, tables, self._own, cross).flatten(0, 1)
        # The draft's own logits are what the adapter computes: no softcap. The target's are what it says.
        columns = lm_head.weight.shape[0]

        def head(hidden: Tensor) -> Tensor:
            return lm_head(hidden.to(lm_head.weight.dtype))

        if self.how.distill:
            return cross_entropy(hidden, head, last.flatten(0, 1), columns, target_head(target))
        return cross_entropy(hidden, head, ids[:, 1:].flatten(), columns)

    @torch.no_grad()
    def watch(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the target's last keys and values, [B, G, T, D], and what its LM head reads, [B, T, hidden]."""
        target: Any = self.target_of[0]
        cache = LastLayer(target.config.get_text_config(decoder=True).num_hidden_layers)
        places = positions.expand(tokens.shape)
        decoder = target.get_decoder()
        out = decoder(input_ids=tokens, position_ids=places, past_key_values=cache, use_cache=True)
        if cache.rows is None:
            raise ValueError(f"{type(target).__name__}'s last layer has no keys of its own, which this draft reads")
        return *cache.rows, out.last_hidden_state

    def _own(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return banded(query, key, value, self.block.scale)


def banded(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attend to the `WINDOW` newest keys, a token's own among them; linear in T.

    Args:
        query: [B, H, T, D]; key, value: [B, G, T, D].
    """
    rows = query.shape[2]
    options: dict[str, Any] = {"scale": scale, "enable_gqa": True}
    if rows <= WINDOW:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, **options)
    size = WINDOW - 1  # of a block of queries; it sees itself and the block before
    missing = -rows % size
    blocks: Sequence[Tensor] = [F.pad(each, (0, 0, 0, missing)) for each in (query, key, value)]
    query, key, value = (each.unflatten(2, (-1, size)).transpose(1, 2) for each in blocks)  # [B, n, H, size, D]
    key, value = (torch.cat([F.pad(each, (*[0] * 6, 1, -1)), each], 3) for each in (key, value))
    at, seen = (torch.arange(count, device=query.device) for count in (size, 2 * size))
    distance = at[:, None] + size - seen
    mask = ((distance >= 0) & (distance < WINDOW)).repeat(query.shape[1], 1, 1)
    mask[0, :, :size] = False  # before the first block there is nothing
    mask = mask.repeat(query.shape[0], 1, 1)[:, None]
    query, key, value = (each.flatten(0, 1) for each in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)
    return out.unflatten(0, (-1, len(mask) // len(blocks[0]))).transpose(1, 2).flatten(2, 3)[:, :, :rows]


def fresh_block(target: HFModel, intermediate: int | None = None) -> LongSpecBlock:
    """Return a block for a target with random weights, float32, where the target's last layer lies.

    Args:
        intermediate: Width of its MLP; None: the target's.

    Raises:
        ValueError: A target without what such a draft reads.
    """
    block = block_format(target, intermediate)
    check_fit("in training", block, target)
    return LongSpecBlock(block, target.head_dim, target.rotary).to(target.last_device)


def block_format(target: HFModel, intermediate: int | None = None) -> BlockFormat:
    """Return the sizes of a block for a target."""
    config, head_dim = target.config, target.head_dim
    heads = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    return BlockFormat(
        hidden=config.hidden_size,
        intermediate=intermediate or config.intermediate_size,
        queries=heads * head_dim,
        keys=shared * head_dim,
        mlp_bias=False,
        heads=heads,
        kv_heads=shared,
        eps=float(getattr(config, "rms_norm_eps", 1e-6)),
        activation="silu",
    )


def longspec_config(block: LongSpecBlock, target: HFModel, positions: int) -> dict[str, Any]:
    """Return config.json as the drafts on the hub have it: their target's, with the block's own width."""
    config = target.config
    gate: Any = block.mlp["gate_proj"]
    rope = {key: getattr(config, key) for key in ("rope_theta", "rope_parameters") if hasattr(config, key)}
    return {
        "architectures": ["LlamaGlideDecoderLayer"],
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "intermediate_size": gate.out_features,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": block_format(target).kv_heads,
        "head_dim": target.head_dim,
        "vocab_size": target.vocab_size,
        "max_position_embeddings": positions,
        "rms_norm_eps": block.input_layernorm.eps,
        "hidden_act": "silu",
        "mlp_bias": False,
        **rope,
    }


def published_tensors(block: LongSpecBlock) -> dict[str, Tensor]:
    """Return a block's 20 tensors as LongSpec publishes them: also those that its own program loads and never reads."""
    found = {name: each.detach().contiguous() for name, each in block.state_dict().items()}
    for part in ("weight", "bias"):
        like = found[f"self_attn.k_proj.{part}"]
        found |= {f"cross_attn.{name}_proj.{part}": torch.zeros_like(like) for name in "kv"}
    return found
