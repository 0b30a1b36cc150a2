"""A LongSpec checkpoint becomes a draft for one target, if it fits."""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from specx.adapters.longspec import LongSpecModel
from specx.adapters.longspec_block import LongSpecBlock
from specx.adapters.longspec_checkpoints import BlockFormat, read_block
from specx.hf import HFModel
from specx.hf_config import positions_of


def load_longspec(
    name: str,
    path: str,
    target: HFModel,
    draft_context: int | None = None,
    context_source: str = "asked for",
    alignment: Literal["exact", "reference"] = "exact",
    tokens: Tensor | None = None,
) -> LongSpecModel:
    """Load a LongSpec draft for `target`, where its last layer lies and in its dtype.

    Args:
        path: A directory or a file of weights; see `longspec_checkpoints.read_block`.
        draft_context: Positions it was trained for; None: its config's, or the target's.
        tokens: The only ones to draft, ascending ids.

    Raises:
        RuntimeError: A draft that cannot be read.
        ValueError: A draft that was made for another target, or a target without what it reads.
    """
    block, tensors = read_block(path)
    module = fitted_block(name, block, target)
    tensors = {key: tensor.to(target.last_device, target.dtype) for key, tensor in tensors.items()}
    module.load_state_dict(tensors, assign=True)
    module.requires_grad_(False)
    if draft_context is None:
        claimed = block.config.get("max_position_embeddings")
        draft_context = claimed or positions_of(target.config) or 1 << 30
        context_source = "its config's max_position_embeddings" if claimed else "the target's positions"
    about = [*block.about(), *_oddities(block, target), "it reads the keys and values of the target's last layer"]
    if tokens is not None:
        tokens = tokens[tokens < target.vocab_size].to(module.input_layernorm.weight.device)
        about.append(f"it drafts {len(tokens)} of the target's {target.vocab_size} tokens, as asked for")
    return LongSpecModel(name, module, target, tokens, alignment, draft_context, context_source, about)


def fitted_block(name: str, block: BlockFormat, target: HFModel) -> LongSpecBlock:
    """Return the block for a target, without weights: on the meta device.

    Raises:
        ValueError: As `check_fit`.
    """
    check_fit(name, block, target)
    eps = getattr(target.config, "rms_norm_eps", 1e-6) if block.eps is None else block.eps
    activation = block.activation or getattr(target.config, "hidden_act", None) or "silu"
    with torch.device("meta"):
        return LongSpecBlock(replace(block, eps=eps, activation=activation), target.head_dim, target.rotary)


def check_fit(name: str, block: BlockFormat, target: HFModel) -> None:
    """Compare a draft with a target.

    Raises:
        ValueError: Saying in which numbers they differ, or what the target lacks.
    """
    config = target.config
    heads = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    numbers = [
        ("hidden size", block.hidden, config.hidden_size),
        ("attention heads", block.heads or heads, heads),
        ("key/value heads", block.kv_heads or shared, shared),
        ("numbers in all query heads", block.queries, heads * target.head_dim),
        ("numbers in all key heads", block.keys, shared * target.head_dim),
    ]
    wrong = [f"{what} {found}, the target has {wanted}" for what, found, wanted in numbers if found != wanted]
    if wrong:
        raise ValueError(f"draft {name} does not fit this target: {'; '.join(wrong)}")
    if getattr(config, "num_kv_shared_layers", 0):
        raise ValueError(f"draft {name} reads the target's last layer, which has no keys of its own in this target")
    _ = target.rotary


def _oddities(block: BlockFormat, target: HFModel) -> list[str]:
    """Say what in a draft's config speaks of another target, though its shapes fit."""
    found: list[Any] = []
    for key, what in (("num_hidden_layers", "layers"), ("vocab_size", "tokens")):
        claimed, own = block.config.get(key), getattr(target.config, key, None)
        if claimed and own and claimed != own:
            found.append(f"{claimed} {what} where this target has {own}")
    return [f"its config speaks of {' and '.join(found)}: was it made for another one?"] if found else []
