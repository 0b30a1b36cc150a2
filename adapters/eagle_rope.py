"""How an EAGLE head rotates: by its own config, never by the target's. Tables are float32 at any length."""

import math
from typing import Any

import torch
from torch import Tensor

from specx.rotary import Rotation

_KNOWN = ("default", "linear", "dynamic", "llama3", "yarn", "mrope")


def rope_options(config: dict[str, Any]) -> dict[str, Any]:
    """Return a head's rotation as written in its config, in one form: rope_type, rope_theta and what they need.

    A config without any rotates by 10000 as the heads' training code does, whatever the target's base is.

    Raises:
        ValueError: A kind of rotation that is not known.
    """
    found = config.get("rope_parameters") or {}
    if found and all(isinstance(each, dict) for each in found.values()):  # one for each type of layer
        kind = (config.get("layer_types") or ["sliding_attention"])[0]
        found = found.get(kind) or next(iter(found.values()))
    found = found or config.get("rope_scaling") or {}
    kind = found.get("rope_type") or found.get("type") or "default"
    if kind not in _KNOWN:
        raise ValueError(f"the head rotates by rope_type {kind!r}; known are {', '.join(_KNOWN)}")
    theta = found.get("rope_theta") or config.get("rope_theta") or 10000.0
    whole = {"original_max_position_embeddings": config.get("max_position_embeddings") or 2048}
    share = {"partial_rotary_factor": config.get("partial_rotary_factor") or 1.0}
    return whole | share | found | {"rope_type": kind, "rope_theta": float(theta)}


def rotation(rope: dict[str, Any], head_dim: int, device: torch.device) -> tuple[Rotation, float]:
    """Return the rotation of queries and keys, and the factor that yarn puts on both.

    dynamic and mrope are the plain rotation here: the first changes only beyond the positions the head was trained at,
    the second only for images.
    """
    dim = int(head_dim * rope["partial_rotary_factor"])
    inverse = rope["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    kind, attention = rope["rope_type"], 1.0
    if kind == "linear":
        inverse = inverse / rope["factor"]
    elif kind == "llama3":
        inverse = _llama3(inverse, rope)
    elif kind == "yarn":
        inverse, attention = _yarn(inverse, rope, dim)
    return Rotation(inverse.to(device), interleaved=False), attention


def _llama3(inverse: Tensor, rope: dict[str, Any]) -> Tensor:
    """Slow rotations are stretched, fast ones are not, those between by degrees (Llama 3.1)."""
    turns = rope["original_max_position_embeddings"] * inverse / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    fast = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - fast) * inverse / rope["factor"] + fast * inverse


def _yarn(inverse: Tensor, rope: dict[str, Any], dim: int) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): the same by degrees between two numbers of turns, and hotter attention."""
    factor, length = rope["factor"], rope["original_max_position_embeddings"]

    def index(turns: float) -> float:  # of the pair that turns so often within the length
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    low, high = index(rope.get("beta_fast") or 32), index(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    slow = ((torch.arange(dim // 2) - low) / max(high - low, 0.001)).clamp(0, 1)

    def heat(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = rope.get("attention_factor")
    if attention is None:
        own, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
        attention = heat(own) / heat(all_dim) if own and all_dim else heat(1.0)
    return slow * inverse / factor + (1 - slow) * inverse, float(attention)
