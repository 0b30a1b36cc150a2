"""LongSpec drafts on disk: one block under 20 names, with or without a config and a prefix. Recognised by their keys.

Facts of the layout: github.com/sail-sg/LongSpec (MIT) and arXiv 2502.17421. Nothing is ignored: a key too few or too
many is an error.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from specx.adapters.weights import plain_name, read_config, read_tensors

# In the checkpoint, but nobody reads them: the keys and values are the target's.
UNUSED = tuple(f"cross_attn.{name}_proj.{part}" for name in "kv" for part in ("weight", "bias"))
_BUFFERS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """What a draft is. What a file without a config leaves open is None, and the target's.

    Attributes:
        hidden: Width of its input, the target's embeddings.
        intermediate: Width of its MLP.
        queries, keys: Rows of q_proj and k_proj: heads times head dim.
        mlp_bias: Whether its MLP has biases.
        heads, kv_heads: As its config counts them.
        eps, activation: Of its norms and MLP.
        config: Its config.json, or empty.
    """

    hidden: int
    intermediate: int
    queries: int
    keys: int
    mlp_bias: bool
    heads: int | None
    kv_heads: int | None
    eps: float | None
    activation: str | None
    config: dict[str, Any] = field(default_factory=dict)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor that is computed with."""
        norms = ("input_layernorm", "post_self_attention_layernorm", "post_cross_attention_layernorm")
        found: dict[str, tuple[int, ...]] = {f"{norm}.weight": (self.hidden,) for norm in norms}
        rows = {f"self_attn.{name}_proj": self.keys for name in "kv"}
        rows |= {f"{part}.q_proj": self.queries for part in ("self_attn", "cross_attn")}
        for name, count in rows.items():
            found |= {f"{name}.weight": (count, self.hidden), f"{name}.bias": (count,)}
        found |= {f"{part}.o_proj.weight": (self.hidden, self.queries) for part in ("self_attn", "cross_attn")}
        wide = {"gate": (self.intermediate, self.hidden), "up": (self.intermediate, self.hidden)}
        for name, shape in (wide | {"down": (self.hidden, self.intermediate)}).items():
            found[f"mlp.{name}_proj.weight"] = shape
            if self.mlp_bias:
                found[f"mlp.{name}_proj.bias"] = shape[:1]
        return found

    def about(self) -> list[str]:
        """Describe it in words."""
        count = sum(math.prod(shape) for shape in self.shapes().values())
        heads = f", {self.heads} heads sharing {self.kv_heads}" if self.heads else ", no config: heads as the target's"
        return [f"LongSpec, one block: {count / 1e6:.1f}M weights, hidden size {self.hidden}{heads}"]

    def unused_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor of the layout that nobody reads."""
        return {name: (self.keys, self.hidden) if name.endswith("weight") else (self.keys,) for name in UNUSED}


def read_block(path: str) -> tuple[BlockFormat, dict[str, Tensor]]:
    """Read a LongSpec draft.

    Args:
        path: A directory with weights (safetensors, .bin or .pth) and mostly a config.json, or a file of weights.

    Returns:
        What it is, and its tensors on the CPU under the published names, without those that nobody reads.

    Raises:
        RuntimeError: A file that cannot be read; a key that is missing or unknown, or of the wrong shape.
    """
    has_config = Path(path, "config.json").is_file()
    return parse_block(f"draft {path}", read_config(path) if has_config else {}, read_tensors(path))


def parse_block(name: str, config: dict[str, Any], raw: dict[str, Tensor]) -> tuple[BlockFormat, dict[str, Tensor]]:
    """Make sense of a draft's config and tensors, wherever they come from; see `read_block`. Tensors are not copied.

    Args:
        name: What messages call it.
    """
    tensors = dict[str, Tensor]()
    for key, tensor in raw.items():
        plain = plain_name(key)
        if plain in tensors:
            raise RuntimeError(f"{name}: it holds {plain} twice, under two prefixes")
        if not plain.endswith(_BUFFERS):
            tensors[plain] = tensor
    try:
        block = _format(config, tensors)
        _check(block, tensors)
    except ValueError as error:
        raise RuntimeError(f"{name}, read as a LongSpec draft: {error}") from error
    return block, {key: tensor for key, tensor in tensors.items() if key not in UNUSED}


def _format(config: dict[str, Any], tensors: dict[str, Tensor]) -> BlockFormat:
    def rows(key: str) -> int:
        if key not in tensors:
            raise ValueError(f"it lacks {key}")
        return tensors[key].shape[0]

    eps = config.get("rms_norm_eps")
    heads = config.get("num_attention_heads")
    return BlockFormat(
        hidden=rows("input_layernorm.weight"),
        intermediate=rows("mlp.gate_proj.weight"),
        queries=rows("self_attn.q_proj.weight"),
        keys=rows("self_attn.k_proj.weight"),
        mlp_bias=any(key.startswith("mlp.") and key.endswith(".bias") for key in tensors)
        or bool(config.get("mlp_bias")),
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        eps=None if eps is None else float(eps),
        activation=config.get("hidden_act"),
        config=config,
    )


def _check(block: BlockFormat, tensors: dict[str, Tensor]) -> None:
    """Compare keys and shapes with what such a draft has.

    Raises:
        ValueError: Naming the key.
    """
    needed = block.shapes()
    missing, unknown = sorted(needed.keys() - tensors.keys()), sorted(tensors.keys() - needed.keys() - set(UNUSED))
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    if unknown:
        raise ValueError(f"it holds unknown keys: {', '.join(unknown[:8])}{' ...' if len(unknown) > 8 else ''}")
    for key, shape in needed.items():
        if tuple(tensors[key].shape) != shape:
            raise ValueError(f"{key} is {list(tensors[key].shape)}, not {list(shape)}")
