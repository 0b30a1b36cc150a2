"""Enabling an unmodified transformers model around each forward of ours, and checking beforehand that this is right.

An unmodified model reaches our attention through three seams: `past_key_values.update`, the attention function looked
up by `config._attn_implementation`, and `position_ids`. What the attention layers must know about a forward is one
`Call`, set on them while it runs and off again in a `finally`. Only the hf*.py files touch transformers internals.
"""

import copy
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from specx import attention
from specx.cache import Memory, TreeCache
from specx.hf_attention import IMPLEMENTATION, Call, ScoredRows
from specx.hf_check import refusal, rope_types, self_check, static_trouble
from specx.hf_config import device_of, positions_of
from specx.packed import PackedLinears
from specx.retrieval import chunk_scores
from specx.static import BUCKETS, StaticCall, StaticSteps
from specx.static_attention import PLAIN, Kernel, triton_kernel, triton_move

_PREFILL_ROWS = 8  # more tokens in a row are a prefill, whose lengths are too many to capture a graph for each
_checked: "weakref.WeakSet[PreTrainedModel]" = weakref.WeakSet()


@dataclass(frozen=True, slots=True)
class Output:
    """What one forward gave.

    Attributes:
        logits: [n, V].
        features: Outputs of tapped layers, {layer: [T, hidden]}.
        scored: Queries of the score layer, if one was asked for.
        windows: The sliding window that each layer asked for.
    """

    logits: Tensor
    features: dict[int, Tensor]
    scored: ScoredRows | None
    windows: dict[int, int | None]

    def copy(self) -> "Output":
        """Return the same in memory of its own, which the next replay of a graph does not overwrite."""
        scored = self.scored and replace(self.scored, query=self.scored.query.clone(), lse=self.scored.lse.clone())
        features = {layer: each.clone() for layer, each in self.features.items()}
        return Output(self.logits.clone(), features, scored, self.windows)


class HFModel:
    """An unmodified causal LM that can run trees. Checked once per model object; never changed between our forwards.

    Args:
        model: A `transformers` causal LM in eval mode.
        backend: "auto" or a backend of `specx.attention`.
        hybrid: False: one dense mask instead of hybrid tree attention (for ablation).
        flash_prefill: False: the same for the chunks of a prefill.
        pack_weights: Whether a copy of the weights is laid out for fast products; see `packed.PackedLinears`.
        graphs: Whether steps run with static shapes, which CUDA graphs can capture; None: where that is worth it.

    Raises:
        ValueError: If the model cannot be enhanced; the message says why.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        backend: str = "auto",
        hybrid: bool = True,
        flash_prefill: bool = True,
        pack_weights: bool | None = None,
        graphs: bool | None = None,
    ) -> None:
        self.model, self.hybrid, self.flash_prefill = model, hybrid, flash_prefill
        self.config = model.config.get_text_config(decoder=True)
        self.device = device_of(model.get_input_embeddings())
        self.dtype: torch.dtype = model.dtype
        self.backend, self.backend_reason = attention.choose_backend(backend, self.device)
        self._attentions = [m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int)]
        # Setting a config's implementation sets that of its parts (a vision tower's) too, so they are restored as well.
        parts = [getattr(model.config, name, None) for name in model.config.sub_configs]
        configs = [model.config, *parts, self.config, *(getattr(m, "config", None) for m in self._attentions)]
        self._configs = list({id(each): each for each in configs if each is not None}.values())
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._longropes = [m for m in model.modules() if "longrope" in rope_types(m)]
        reason = refusal(model)
        if reason:
            raise ValueError(f"{type(model).__name__} cannot be enhanced: {reason}")
        self.packed = PackedLinears(model, pack_weights)
        self.no_graphs = "not asked for" if graphs is False else static_trouble(self, asked=graphs is True)
        self._steps: weakref.WeakKeyDictionary[TreeCache, StaticSteps] = weakref.WeakKeyDictionary()
        self._spare: tuple[Memory, StaticSteps] | None = None
        if model not in _checked:
            self_check(self)
            _checked.add(model)

    def with_parts(self, hybrid: bool, flash_prefill: bool) -> "HFModel":
        """Return this model with parts of ours on or off (for ablation); the weights are shared, packed ones too."""
        other = copy.copy(self)
        other.hybrid, other.flash_prefill = hybrid, flash_prefill
        other.no_graphs = self.no_graphs or static_trouble(other, asked=False)
        other._steps, other._spare = weakref.WeakKeyDictionary(), None
        return other

    @property
    def vocab_size(self) -> int:
        """Rows of the LM head's output."""
        return int(self.config.vocab_size)

    @property
    def embedding(self) -> nn.Embedding:
        """The input embeddings."""
        return self.model.get_input_embeddings()

    @property
    def lm_head(self) -> nn.Linear:
        """The LM head."""
        return self.model.get_output_embeddings()

    @property
    def max_positions(self) -> int | None:
        """Positions that the config claims, or None."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def rotary(self) -> nn.Module:
        """The rotary embedding that all layers share: (x, position_ids) -> cos, sin.

        Raises:
            ValueError: If there is none, or one for each type of layer.
        """
        found = getattr(self.model.get_decoder(), "rotary_emb", None)
        if found is None or len(rope_types(found)) > 1 or "layer_type" in inspect.signature(found.forward).parameters:
            raise ValueError(f"{type(self.model).__name__} has no rotary embedding that all of its layers share")
        return found

    @property
    def last_device(self) -> torch.device:
        """Where the last layer's keys and values lie."""
        layer = self._stack[-2]
        return device_of(next(each for each in layer.modules() if each._parameters))

    @property
    def head_dim(self) -> int:
        """Dims of an attention head."""
        config = self.config
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def new_cache(self, capacity: int) -> TreeCache:
        """Return an empty cache for this model with room for `capacity` rows.

        With static steps its memory, and the graphs captured over it, come from the last cache that is no more.
        """
        layers, one_block = self.config.num_hidden_layers, len(self.devices()) == 1
        if self.no_graphs:
            return TreeCache(layers, capacity, one_block)
        move = triton_move if self.backend == "triton" else None
        capacity += BUCKETS[-1]  # rows that pad a bucket
        unit = max(1024, 1 << capacity.bit_length() - 4)  # few sizes, so that memory and graphs serve again
        capacity = -(-capacity // unit) * unit
        spare, self._spare = self._spare, None
        if spare is None or any(pair[0].shape[3] != capacity for pair in spare[0].blocks):
            spare = Memory(), StaticSteps(self._run_static, self._static_kernel())
        memory, steps = spare
        cache = TreeCache(layers, capacity, one_block, memory, move)
        self._steps[cache] = steps
        weakref.finalize(cache, setattr, self, "_spare", (memory, steps))
        return cache

    def release(self) -> None:
        """Give back the memory, and the graphs over it, that are kept for the next cache."""
        self._spare = None

    @property
    def rope_border(self) -> int | None:
        """Context length above which longrope rotates by another table; None where no table depends on the length."""
        found = getattr(self.config, "rope_parameters", None) or {}
        kinds = [each for each in found.values() if isinstance(each, dict)] or [found]  # one for each type of layer
        long = [each for each in kinds if each.get("rope_type") == "longrope"]
        return min((int(each["original_max_position_embeddings"]) for each in long), default=None)

    def window(self, layer: int) -> int | None:
        """Return the sliding window that the config gives a layer; None if it sees every position there can be."""
        window, types = getattr(self.config, "sliding_window", None), getattr(self.config, "layer_types", None)
        slides = types[layer] == "sliding_attention" if types else getattr(self.config, "use_sliding_window", True)
        most = positions_of(self.config)
        return window if slides and window and (most is None or window < most) else None

    def score_layer(self) -> int | None:
        """Return the layer nearest to three quarters of the depth that attends to the whole context; None: all slide.

        Heads that find an earlier occurrence sit in middle to late layers. The last layer, which others use, found the
        right chunk in 3 % of the cases on the bundled pair where this one found it in 40 %.
        """
        goal = 3 * self.config.num_hidden_layers // 4
        layers = (layer for layer in range(self.config.num_hidden_layers) if self.window(layer) is None)
        return min(layers, key=lambda layer: abs(layer - goal), default=None)

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
        context: int = 0,
    ) -> Output:
        """Run T tokens; their keys and values become pending rows of `cache`.

        Args:
            ids, positions: int64 [T].
            mask: bool [T, P] over the pending rows, new ones last; None: causal, with nothing pending before.
            tail_positions: int64 [P]; None: `positions`.
            keep_logits: Logits of the last n tokens only; None: all.
            taps: Decoder layers whose outputs (raw, before the final norm) are returned; the number of layers itself
                stands for what the LM head reads, after that norm.
            score_layer: Layer whose queries are kept.
            context: Length of the prompt that these tokens are a chunk of; 0: they are no part of a longer one.
        """
        tail = positions if tail_positions is None else tail_positions
        most = _PREFILL_ROWS if mask is None else BUCKETS[-1]
        # What static steps write to outlives an inference mode that somebody may be in, and must serve outside of it.
        with nullcontext() if self.no_graphs else torch.inference_mode(False):
            if not self.no_graphs and len(ids) <= most and cache in self._steps:
                return self._static(ids, positions, cache, mask, tail, keep_logits, tuple(taps), score_layer)
            flash = self.flash_prefill if mask is None else self.hybrid
            call = Call(cache.committed, positions, mask, tail, self.backend, not flash, score_layer)
            logits, features = self._run(ids, positions, cache, call, keep_logits, taps, context)
        cache.advance(ids.shape[0])
        return Output(logits.to(self.device), features, call.scored, call.windows)

    def chunk_scores(
        self,
        cache: TreeCache,
        layer: int,
        scored: ScoredRows,
        node: int,
        chunk_size: int,
        heads: Literal["mean", "max"] = "mean",
    ) -> Tensor:
        """Score chunks of `cache`, float32 [C], by what row `node` of a forward's scored rows attended to."""
        key = cache.keys(layer)[0]
        query, lse = scored.query[:, node].to(key.device), scored.lse[:, node].to(key.device)
        fused = self.backend == "triton" and key.device.type == self.device.type
        return chunk_scores(key, query, lse, scored.scale, scored.softcap, chunk_size, heads, fused)

    def _run(
        self,
        ids: Tensor,
        positions: Tensor,
        cache: TreeCache,
        call: Call | StaticCall,
        keep_logits: int | None,
        taps: Sequence[int],
        context: int,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        options = {"logits_to_keep": keep_logits} if keep_logits is not None and self._keeps_logits else {}
        with (
            torch.no_grad(),
            self._enabled(call),
            self.packed.enabled(),
            self._rotated_for(context),
            self._tapped(taps) as features,
        ):
            out = self.model(
                input_ids=ids[None], position_ids=positions[None], past_key_values=cache, use_cache=True, **options
            )
        return out.logits[0] if keep_logits is None else out.logits[0, -keep_logits:], features

    def _static(
        self,
        ids: Tensor,
        positions: Tensor,
        cache: TreeCache,
        mask: Tensor | None,
        tail: Tensor,
        keep_logits: int | None,
        taps: tuple[int, ...],
        score_layer: int | None,
    ) -> Output:
        rows = len(ids)
        seen = torch.ones(rows, rows, dtype=torch.bool, device=ids.device).tril() if mask is None else mask
        step = self._steps[cache].run(cache, ids, positions, seen, tail, taps, score_layer)
        cache.advance(rows)
        logits = step.logits[:rows] if keep_logits is None else step.logits[rows - keep_logits : rows]
        features = {layer: each[:rows] for layer, each in step.features.items()}
        scored = step.scored and replace(step.scored, query=step.scored.query[:, :rows], lse=step.scored.lse[:, :rows])
        out = Output(logits, features, scored, step.windows)
        return out if mask is not None else out.copy()  # of a prompt's end, to which somebody may come back

    def _run_static(
        self, cache: TreeCache, ids: Tensor, positions: Tensor, taps: tuple[int, ...], call: StaticCall
    ) -> tuple[Tensor, dict[int, Tensor]]:
        return self._run(ids, positions, cache, call, None, taps, 0)

    def _static_kernel(self) -> Kernel:
        return triton_kernel() if self.backend == "triton" else PLAIN

    def devices(self) -> set[Any]:
        """Return the devices that the model lies on."""
        return set(getattr(self.model, "hf_device_map", {}).values()) or {self.device}

    @cached_property
    def _stack(self) -> list[nn.Module]:
        """The decoder's layers, and behind them the decoder itself, which ends with the final norm."""
        decoder, count = self.model.get_decoder(), self.config.num_hidden_layers
        lists = [each for each in decoder.modules() if isinstance(each, nn.ModuleList) and len(each) == count]
        if not lists:
            raise ValueError(f"{type(self.model).__name__} has no list of {count} layers whose outputs could be read")
        return [*lists[0], decoder]

    @contextmanager
    def _enabled(self, call: Call | StaticCall) -> Iterator[None]:
        before = [config._attn_implementation for config in self._configs]
        try:
            for config in self._configs:
                config._attn_implementation = IMPLEMENTATION
            for module in self._attentions:
                module.__dict__["_specx_call"] = call  # a module's own __setattr__ takes longer
            yield
        finally:
            for config, implementation in zip(self._configs, before, strict=True):
                config._attn_implementation = implementation
            for module in self._attentions:
                module.__dict__.pop("_specx_call", None)

    @contextmanager
    def _rotated_for(self, context: int) -> Iterator[None]:
        """Let longrope take the table that one forward over the whole prompt would take.

        It chooses by the highest position that it is shown, so it is shown the prompt's last one as well.
        """

        def widen(module: nn.Module, args: Any, kwargs: Any) -> Any:
            bound = inspect.signature(module.forward).bind(*args, **kwargs)
            positions = bound.arguments["position_ids"]
            bound.arguments["position_ids"] = F.pad(positions, (0, 1), value=context - 1)
            return bound.args, bound.kwargs

        def narrow(module: nn.Module, args: Any, output: Any) -> Any:
            return tuple(table[..., :-1, :] for table in output)

        handles = []
        for module in self._longropes if context else ():
            handles.append(module.register_forward_pre_hook(widen, with_kwargs=True))
            handles.append(module.register_forward_hook(narrow))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _tapped(self, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """Note what layers return. Hooks would do, but those of three layers took 1.5 % of a small model's step."""
        features: dict[int, Tensor] = {}

        def noting(layer: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            def noted(*args: Any, **kwargs: Any) -> Any:
                output = forward(*args, **kwargs)
                features[layer] = (output if isinstance(output, Tensor) else output[0])[0]
                return output

            return noted

        modules = {layer: self._stack[layer] for layer in layers}
        before = {layer: module.__dict__.get("forward") for layer, module in modules.items()}  # somebody's own
        try:
            for layer, module in modules.items():
                module.__dict__["forward"] = noting(layer, module.forward)
            yield features
        finally:
            for layer, module in modules.items():
                module.__dict__.pop("forward", None)
                if before[layer] is not None:
                    module.__dict__["forward"] = before[layer]
