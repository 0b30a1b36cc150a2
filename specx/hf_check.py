"""What can be enhanced: judged by a model's class and config, then by running a small tree through it."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from specx.static_attention import kernel_serves

_SUPPORTED_LAYERS = {"full_attention", "sliding_attention", "attention"}


def refusal(model: PreTrainedModel) -> str | None:
    """Return why a model cannot run trees, judged by its class and config alone; None if nothing speaks against it."""
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ()) - _SUPPORTED_LAYERS
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder model"
    if not getattr(type(model), "_can_set_attn_implementation", lambda: True)():
        return "its layers do not use transformers' attention interface"
    if getattr(model, "_is_stateful", False):
        return "its layers carry a state that cannot branch into a tree"
    if kinds:
        return f"its layers of type {', '.join(sorted(kinds))} cannot run a tree"
    if getattr(config, "attention_chunk_size", None):
        return "its chunked attention is held only in a mask"
    if model.get_output_embeddings() is None:
        return "it has no language model head"
    if model.training:
        return "it is in training mode: call model.eval() first"
    return None


def static_trouble(wrapped: Any, asked: bool) -> str | None:
    """Return why a model's steps cannot have static shapes, or need none; None if they shall."""
    if wrapped.device.type != "cuda" and not asked:
        return f"{wrapped.device.type} needs none"
    if not wrapped.hybrid:
        return "one dense mask was asked for"
    if len(wrapped.devices()) > 1:
        return "the model is spread over several devices"
    kinds = {kind for module in wrapped.model.modules() for kind in rope_types(module)}
    if kinds & {"longrope", "dynamic"}:
        return "its rotary embedding looks at the positions on the host"
    if wrapped.backend == "triton":
        config = wrapped.config
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        value_dim = getattr(config, "v_head_dim", None) or dim
        key_dim = getattr(config, "qk_head_dim", None) or dim
        if not kernel_serves(wrapped.dtype, key_dim, value_dim):
            return f"the tree kernel takes no heads of {key_dim} and {value_dim} in {wrapped.dtype}"
    elif wrapped.device.type == "cuda" and not asked:
        return f"backend {wrapped.backend} attends without the tree kernel"
    return None


def rope_types(module: nn.Module) -> set[str]:
    """Return the kinds of rotary embedding that a module computes: one, or one for each type of layer."""
    kinds = getattr(module, "rope_type", None)
    return {kinds} if isinstance(kinds, str) else set(kinds.values()) if isinstance(kinds, dict) else set()


def self_check(wrapped: Any) -> None:  # an hf.HFModel
    """Run a 4-node tree on random ids and compare it with the model's own forward along each path.

    Raises:
        ValueError: Saying what disagreed, if the model cannot be enhanced.
    """
    model, device = wrapped.model, wrapped.device
    name = type(model).__name__
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, wrapped.vocab_size, (10,), generator=generator).to(device)
    prompt, nodes = ids[:6], ids[6:]  # node 0 is the root; 1 and 2 its children; 3 a child of 1
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]], dtype=torch.bool, device=device)
    cache = wrapped.new_cache(16)
    wrapped.forward(prompt, torch.arange(6, device=device), cache, keep_logits=1)
    cache.commit(range(6))
    out = wrapped.forward(nodes, torch.tensor([6, 7, 7, 8], device=device), cache, mask=mask)
    tree = out.logits
    seen, total = len(out.windows), wrapped.config.num_hidden_layers
    if seen != total:
        raise ValueError(f"{name} cannot be enhanced: {seen} of its {total} layers use the attention interface")
    for layer, window in out.windows.items():
        # These few tokens fit most windows, so that no logits would tell.
        if window is None and wrapped.window(layer) is not None:
            raise ValueError(f"{name} cannot be enhanced: the sliding window of layer {layer} is held only in a mask")
    with torch.no_grad():
        for path in ([0, 1, 3], [0, 2]):
            own = model(input_ids=torch.cat([prompt, nodes[path]])[None], use_cache=False).logits[0, -len(path) :]
            if own.isnan().any():
                raise ValueError(f"{name} cannot be enhanced: its own logits are not numbers (NaN)")
            error = (own.to(device) - tree[path]).abs().max().item()
            allowed = (1e-3 if own.dtype == torch.float32 else 0.1) * max(1.0, own.abs().max().item())
            if not error <= allowed:
                raise ValueError(f"{name} cannot be enhanced: a tree's logits differ by {error:.2g} from its own")
