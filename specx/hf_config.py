"""What `model.generate` would read from a model's configs (positions, end of text, logits processors) and hooks."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList, PreTrainedModel

from specx.config import SamplingConfig


def device_of(module: nn.Module) -> torch.device:
    """Return where a module computes; its weights may wait elsewhere, or on the disk, for accelerate to fetch them."""
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    hook: Any = getattr(module, "_hf_hook", None)
    places = (getattr(each, "execution_device", None) for each in getattr(hook, "hooks", (hook,)))
    return torch.device(next((place for place in places if place is not None), device))


def positions_of(config: Any) -> int | None:
    """Return the positions a target serves: its config's, stretched where its rotations are.

    Some checkpoints write the unstretched number beside a `rope_scaling` factor (lmsys/vicuna-7b-v1.5-16k: 4096 and
    linear, 4.0), or put the true one elsewhere. Where a config can be read in two ways the larger is right: too small a
    limit would refuse what the model was made for. A dynamic table is not stretched: it changes with every token, so
    that no tree, and no second forward over the same tokens, could give the same keys.
    """
    found = [getattr(config, "max_position_embeddings", None), getattr(config, "max_sequence_length", None)]
    rope = getattr(config, "rope_parameters", None) or {}
    claimed, factor = found[0], rope.get("factor") or 1.0
    if claimed and rope.get("rope_type") == "linear":
        found.append(int(claimed * factor))
    if rope.get("rope_type") == "yarn" and rope.get("original_max_position_embeddings"):
        found.append(int(rope["original_max_position_embeddings"] * factor))
    return max((each for each in found if each), default=None)


def logits_processors(
    model: PreTrainedModel, sampling: SamplingConfig, prompt: Tensor, max_new_tokens: int
) -> LogitsProcessorList:
    """Return the processors that `model.generate` would apply, in its order.

    The generation config's fields apply (repetition penalty, suppressed tokens, ...) except those of sampling, which
    come from `sampling` alone: unset top_k and top_p mean none.

    Args:
        prompt: int64 [L].
    """
    config = copy.deepcopy(model.generation_config)
    config.do_sample = sampling.temperature > 0
    config.temperature = sampling.temperature or 1.0
    config.top_k, config.top_p = sampling.top_k or 0, 1.0 if sampling.top_p is None else sampling.top_p
    for name in ("min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"):
        if hasattr(config, name):
            setattr(config, name, None)
    if sampling.repetition_penalty is not None:
        config.repetition_penalty = sampling.repetition_penalty
    config.max_length, config.num_beams = len(prompt) + max_new_tokens, 1
    model._prepare_special_tokens(config, True, device=prompt.device)
    return model._get_logits_processor(
        config,
        input_ids_seq_length=len(prompt),
        encoder_input_ids=prompt[None],
        logits_processor=LogitsProcessorList(),
        device=prompt.device,
        model_kwargs={},
    )


def end_ids(model: PreTrainedModel) -> frozenset[int]:
    """Return every end-of-text id of the generation config."""
    ids = model.generation_config.eos_token_id
    return frozenset() if ids is None else frozenset([ids] if isinstance(ids, int) else ids)
