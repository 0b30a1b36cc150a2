"""What a live `EaModel` holds, as specx needs it, without a copy: its target as a transformers model, and its head.

Works on objects of the released `eagle-llm` and of EAGLE's repository: both keep a transformers model rewritten for a
cache of their own under `base_model`, whose weights have transformers' names, and the head under `ea_layer`.
"""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from specx.adapters.eagle_checkpoints import parse_head
from specx.adapters.eagle_format import HeadFormat

_NEEDED = ("base_model", "ea_layer", "eagenerate", "ea_generate")


def check_live(ea_model: Any) -> None:
    """Raise ValueError if an object is no `EaModel`, or one that cannot be shared."""
    missing = [name for name in _NEEDED if not hasattr(ea_model, name)]
    if missing:
        raise ValueError(f"{type(ea_model).__name__} is no EaModel: it has no {missing[0]}")
    places = {str(each.device) for part in (ea_model.base_model, ea_model.ea_layer) for each in part.parameters()}
    if len(places) != 1:
        raise ValueError(
            f"this EaModel lies on {', '.join(sorted(places))}; retrofit serves those on one device. For several, load "
            "its checkpoints by specx.load(target, head, device_map='auto')"
        )


def shared_target(base_model: Any) -> PreTrainedModel:
    """Return the unmodified transformers model of a rewritten one's config, with the very same weights.

    Only the tables of its rotary embedding are its own: they follow the config, whatever the
    rewritten model made of it.

    Args:
        base_model: Not touched.

    Raises:
        ValueError: If transformers has no model that these weights fit.
    """
    weights = {name: each for name, each in base_model.state_dict().items() if not name.endswith("rotary_emb.inv_freq")}
    device = base_model.lm_head.weight.device
    name = type(base_model).__name__
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(base_model.config), attn_implementation="sdpa")
        model.load_state_dict(weights, strict=True, assign=True)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"the weights of {name} cannot be shared with a transformers model: {reason}") from error
    for path, module in list(model.named_modules()):
        if any(each.is_meta for each in module.buffers(recurse=False)):
            model.set_submodule(path, type(module)(config=model.config).to(device))
    empty = [path for path, each in [*model.named_parameters(), *model.named_buffers()] if each.is_meta]
    if empty:
        raise ValueError(f"{name} gives transformers' model no {empty[0]}")
    model.generation_config = GenerationConfig()  # EAGLE knows no penalties, and ends by the tokenizer alone
    return model.requires_grad_(False).eval()


def live_head(ea_layer: Any) -> tuple[HeadFormat, dict[str, Tensor]]:
    """Return what a live head is, and its tensors; see `eagle_checkpoints.read_head`.

    EAGLE-3 keeps its config, EAGLE-1 and 2 leave it with the first layer's attention.

    Raises:
        ValueError: It has no config.
        RuntimeError: It is no head that specx knows.
    """
    first = next(iter(getattr(ea_layer, "layers", None) or [getattr(ea_layer, "midlayer", None)]))
    config = getattr(ea_layer, "config", None) or getattr(getattr(first, "self_attn", None), "config", None)
    if config is None:
        raise ValueError(f"{type(ea_layer).__name__} keeps no config, neither its own nor its attention's")
    return parse_head("the live head", config.to_dict(), ea_layer.state_dict())


def ignored_rotation(base_model: Any) -> str | None:
    """Say how a rewritten target's rotation differs from its config's; None if it does not as far as it shows."""
    config, made = base_model.config, getattr(base_model.model.layers[0].self_attn, "rotary_emb", None)
    rope = getattr(config, "rope_parameters", None) or {}
    theta = rope.get("rope_theta") or getattr(config, "rope_theta", None)
    base = getattr(made, "base", None)
    if theta is None or base is None or float(theta) == float(base):
        return None
    return (
        f"this EaModel's target rotates by base {base:g} although its config says rope_theta {theta:g}, so that it "
        "computes another model than its checkpoint; specx follows the config, and their outputs differ"
    )
