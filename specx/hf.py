"""The only file that touches transformers internals: one attention function, enabled around each forward of ours.

An unmodified model reaches our attention through three seams: `past_key_values.update`, the attention function looked
up by `config._attn_implementation`, and `position_ids`. What the attention layers must know about a forward is one
`Call`, set on them while it runs (two model families drop extra keyword arguments silently), off again in a `finally`.
"""

import copy
import inspect
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, LogitsProcessorList, PreTrainedModel

from specx import attention
from specx.cache import TreeCache
from specx.config import SamplingConfig

IMPLEMENTATION = "specx"
_SUPPORTED_LAYERS = {"full_attention", "sliding_attention", "attention"}
_checked: "weakref.WeakSet[PreTrainedModel]" = weakref.WeakSet()


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


@dataclass(frozen=True, slots=True)
class Output:
    """What one forward gave: logits [n, V]; features of tapped layers {layer: [T, hidden]}; score-layer queries."""

    logits: Tensor
    features: dict[int, Tensor]
    scored: ScoredRows | None


@dataclass(slots=True)
class Call:
    """One forward as its attention layers see it. Prefix row r sits at position r.

    Attributes:
        prefix: Committed rows L.
        positions: Of the T new tokens, int64 [T].
        mask: Which of the P tail rows each token sees, bool [T, P]; None: causal, P == T.
        tail_positions: Of the P tail rows, int64 [P].
        backend: Name of the attention backend.
        hybrid: False attends in one pass with a dense mask over prefix and tail.
        score_layer: Layer whose queries are kept.
    """

    prefix: int
    positions: Tensor
    mask: Tensor | None
    tail_positions: Tensor
    backend: str
    hybrid: bool
    score_layer: int | None
    layers_seen: int = 0
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
        dtype = query.dtype
        if not self.hybrid and not single and self.prefix:
            dense = self._bias("dense", window, start, dtype)
            return attention.attend(query, key[:, :, start:], value[:, :, start:], bias=dense, **options)
        causal = self.mask is None and (window is None or rows <= window)
        tail_bias = None if single or causal else self._bias("tail", window, start, dtype)
        cuts_prefix = window is not None and not single and self.prefix > start
        prefix_bias = self._bias("prefix", window, start, dtype) if cuts_prefix else None
        return attention.hybrid_tree_attention(
            query, key, value, self.prefix, tail_bias=tail_bias, prefix_bias=prefix_bias, start=start, **options
        )

    def _bias(self, part: str, window: int | None, start: int, dtype: torch.dtype) -> Tensor:
        """Build a bias once a forward, not once a layer."""
        found = self._biases.get((part, window, dtype))
        if found is None or found.device != self.positions.device:
            masks = []
            if part in ("prefix", "dense"):
                past = torch.arange(start, self.prefix, device=self.positions.device)
                distance = self.positions[:, None] - past
                masks.append(distance < window if window is not None else torch.ones_like(distance, dtype=torch.bool))
            if part in ("tail", "dense"):
                distance = self.positions[:, None] - self.tail_positions
                seen = self.mask if self.mask is not None else distance >= 0
                masks.append(seen & (distance < window) if window is not None else seen)
            found = attention.additive(torch.cat(masks, dim=1), dtype)
            self._biases[part, window, dtype] = found
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
        attention_mask: Always None: no mask function is registered under this name.
        s_aux: Attention sinks, [H]: logits without a value (gpt-oss).

    Returns:
        [1, T, H, Dv] and None.
    """
    call: Call | None = getattr(module, "_specx_call", None)
    if call is None:
        raise RuntimeError("the specx attention runs only inside specx; set another attn_implementation on this model")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out, lse = call.attend(query, key, value, sliding_window, scale=scale, softcap=softcap)
    call.layers_seen += 1
    if getattr(module, "layer_idx", None) == call.score_layer:
        call.scored = ScoredRows(query[0], lse[0], scale, softcap)
    if s_aux is not None:  # a sink takes its share of the softmax and gives nothing
        out = out * torch.sigmoid(lse - s_aux.float()[None, :, None])[..., None].to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, specx_attention)


class HFModel:
    """An unmodified causal LM that can run trees. Checked once per model object; never changed between our forwards.

    Args:
        model: A `transformers` causal LM in eval mode.
        backend: "auto" or a backend of `specx.attention`.
        hybrid: False: one dense mask instead of hybrid tree attention (for ablation).

    Raises:
        ValueError: If the model cannot be enhanced; the message says why.
    """

    def __init__(self, model: PreTrainedModel, backend: str = "auto", hybrid: bool = True) -> None:
        self.model, self.hybrid = model, hybrid
        self.config = model.config.get_text_config(decoder=True)
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.dtype: torch.dtype = model.dtype
        self.backend, self.backend_reason = attention.choose_backend(backend, self.device)
        self._attentions = [m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int)]
        configs = [model.config, self.config, *(m.config for m in self._attentions if hasattr(m, "config"))]
        self._configs = list({id(each): each for each in configs}.values())
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        if model not in _checked:
            self_check(self)
            _checked.add(model)

    @property
    def vocab_size(self) -> int:
        """Rows of the LM head's output."""
        return int(self.config.vocab_size)

    @property
    def max_positions(self) -> int | None:
        """Positions that the config claims, or None."""
        return getattr(self.config, "max_position_embeddings", None)

    def new_cache(self, capacity: int) -> TreeCache:
        """Return an empty cache for this model with room for `capacity` rows."""
        spread = len(set(getattr(self.model, "hf_device_map", {}).values())) > 1
        return TreeCache(self.config.num_hidden_layers, capacity, one_block=not spread)

    def score_layer(self) -> int | None:
        """Return the last layer that attends to the whole context; None where every layer slides."""
        types = getattr(self.config, "layer_types", None)
        if types:
            return max((i for i, kind in enumerate(types) if kind != "sliding_attention"), default=None)
        slides = getattr(self.config, "sliding_window", None) and getattr(self.config, "use_sliding_window", True)
        return None if slides else self.config.num_hidden_layers - 1

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        cache: TreeCache,
        *,
        mask: Tensor | None = None,
        tail_positions: Tensor | None = None,
        keep_logits: int | None = None,
        taps: Sequence[int] = (),
        score_layer: int | None = None,
    ) -> Output:
        """Run T tokens; their keys and values become pending rows of `cache`.

        Args:
            ids, positions: int64 [T].
            mask: bool [T, P] over the pending rows, new ones last; None: causal, with nothing pending before.
            tail_positions: int64 [P]; None: `positions`.
            keep_logits: Logits of the last n tokens only; None: all.
            taps: Decoder layers whose outputs (raw, before the final norm) are returned.
            score_layer: Layer whose queries are kept.
        """
        tail = positions if tail_positions is None else tail_positions
        call = Call(cache.committed, positions, mask, tail, self.backend, self.hybrid, score_layer)
        options = {"logits_to_keep": keep_logits} if keep_logits is not None and self._keeps_logits else {}
        with torch.no_grad(), self._enabled(call), self._tapped(taps) as features:
            out = self.model(
                input_ids=ids[None], position_ids=positions[None], past_key_values=cache, use_cache=True, **options
            )
        cache.advance(ids.shape[0])
        logits = out.logits[0] if keep_logits is None else out.logits[0, -keep_logits:]
        if call.layers_seen == 0:
            raise RuntimeError(f"{type(self.model).__name__} did not call the attention function")
        self._last_layers_seen = call.layers_seen
        return Output(logits.to(self.device), features, call.scored)

    @contextmanager
    def _enabled(self, call: Call) -> Iterator[None]:
        before = [config._attn_implementation for config in self._configs]
        try:
            for config in self._configs:
                config._attn_implementation = IMPLEMENTATION
            for module in self._attentions:
                module._specx_call = call
            yield
        finally:
            for config, implementation in zip(self._configs, before, strict=True):
                config._attn_implementation = implementation
            for module in self._attentions:
                module.__dict__.pop("_specx_call", None)

    @contextmanager
    def _tapped(self, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        features: dict[int, Tensor] = {}

        def keep(layer: int) -> Any:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                features[layer] = (output[0] if isinstance(output, tuple) else output)[0].detach()

            return hook

        stack = self.model.get_decoder().layers if layers else ()
        handles = [stack[layer].register_forward_hook(keep(layer)) for layer in layers]
        try:
            yield features
        finally:
            for handle in handles:
                handle.remove()


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
    if model.training:
        return "it is in training mode: call model.eval() first"
    return None


def self_check(wrapped: HFModel) -> None:
    """Run a 4-node tree on random ids and compare it with the model's own forward along each path.

    Raises:
        ValueError: Saying what disagreed, if the model cannot be enhanced.
    """
    model, device = wrapped.model, wrapped.device
    name = type(model).__name__
    reason = refusal(model)
    if reason:
        raise ValueError(f"{name} cannot be enhanced: {reason}")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, wrapped.vocab_size, (10,), generator=generator).to(device)
    prompt, nodes = ids[:6], ids[6:]  # node 0 is the root; 1 and 2 its children; 3 a child of 1
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]], dtype=torch.bool, device=device)
    cache = wrapped.new_cache(16)
    wrapped.forward(prompt, torch.arange(6, device=device), cache, keep_logits=1)
    cache.commit(range(6))
    tree = wrapped.forward(nodes, torch.tensor([6, 7, 7, 8], device=device), cache, mask=mask).logits
    if wrapped._last_layers_seen != wrapped.config.num_hidden_layers:
        seen, total = wrapped._last_layers_seen, wrapped.config.num_hidden_layers
        raise ValueError(f"{name} cannot be enhanced: {seen} of its {total} layers use the attention interface")
    with torch.no_grad():
        for path in ([0, 1, 3], [0, 2]):
            own = model(input_ids=torch.cat([prompt, nodes[path]])[None], use_cache=False).logits[0, -len(path) :]
            error = (own.to(device) - tree[path]).abs().max().item()
            allowed = (1e-3 if own.dtype == torch.float32 else 0.1) * max(1.0, own.abs().max().item())
            if not error <= allowed:
                raise ValueError(f"{name} cannot be enhanced: a tree's logits differ by {error:.2g} from its own")


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
