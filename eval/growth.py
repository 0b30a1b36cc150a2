"""A small Llama grown to a large one's shape and cost, computing what it computed: speed without large weights at hand.

Every dimension grows by parts that add nothing. The residual stream gets channels that stay zero: RMSNorm then averages
over more channels, which a factor on its weights and epsilon undoes. Attention gets head dims that the query leaves at
zero, and heads, units and whole layers whose output projections are zero. Where a factor comes in it is a power of two,
exact in every dtype. Weights that do not matter are random, for zeros would draw less power than real ones.

What this does not show is the acceptance of real models of that size on real text: it is that of the small pair.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from specx.adapters.classic import ClassicModel
from specx.api import SpeculativeModel
from specx.hf import HFModel

_SPREAD = 0.02  # standard deviation of weights that do not matter
_LOW_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Shape:
    """Dimensions of a Llama; `kv_heads` heads of keys and values serve `heads` query heads, `ffn` units a layer."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int


@dataclass(frozen=True, slots=True)
class PairShape:
    """A target's shape and its draft's."""

    name: str
    target: Shape
    draft: Shape


# The first is vicuna-7b's shape, with a draft of vicuna-68m's parameters (heads of 128 dims where that has 64); the
# second is that of Llama 3 8B. A draft shares the target's vocabulary, which makes the second one 216M.
SMALL_7B = Shape("68M", 768, 2, 6, 6, 128, 3072, 32000)
SMALL_8B = Shape("216M", 768, 2, 6, 6, 128, 3072, 128256)
PAIRS = (
    PairShape("7B", Shape("7B", 4096, 32, 32, 32, 128, 11008, 32000), SMALL_7B),
    PairShape("8B", Shape("8B", 4096, 32, 32, 8, 128, 14336, 128256), SMALL_8B),
)


def grow(
    model: LlamaForCausalLM,
    shape: Shape,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> LlamaForCausalLM:
    """Return a Llama of `shape` with the logits of `model` for its ids; the other ids never win an argmax.

    It is made on `device` in `dtype` at once; nothing of its size exists besides it.

    Args:
        model: The small one, left as it is.
        device, dtype: Default: the small one's.
        seed: Of the weights that do not matter.

    Raises:
        ValueError: If no exact growth leads to `shape`; the message names the dimension.
    """
    _check(model, shape)
    device, dtype = torch.device(device or model.device), dtype or model.dtype
    with torch.device(device):
        grown: LlamaForCausalLM = AutoModelForCausalLM.from_config(_config(model.config, shape), dtype=dtype)
    grown.generation_config = copy.deepcopy(model.generation_config)
    grown.eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for name, weight in grown.named_parameters():
        if name.endswith("norm.weight"):
            weight.uniform_(0.5, 1.5, generator=generator)
        else:
            weight.normal_(0.0, _SPREAD, generator=generator)
    with torch.no_grad():
        _place_vocabulary(model, grown)
        places = layer_places(len(model.model.layers), shape.layers)
        for number, layer in enumerate(grown.model.layers):
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
            if number in places:
                _place_layer(model.config, model.model.layers[places.index(number)], shape, layer)
    return grown


def grown_pair(
    source: SpeculativeModel,
    shape: PairShape,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    graphs: bool | None = None,
) -> SpeculativeModel:
    """Return a pair with target and draft grown: a small draft beside a large target's cost would flatter every speed.

    Args:
        source: Llamas, the draft a classic one.
        device, dtype: Default: the source's.
        backend, graphs: Of `HFModel`.

    Raises:
        ValueError: If the source has no such draft, or a shape cannot be grown to.
    """
    if not isinstance(source.draft, ClassicModel):
        raise ValueError("only a pair with a classic draft, a small language model, can be grown")
    target = grow(_llama(source.target), shape.target, device, dtype)
    draft = grow(_llama(source.draft.model.model), shape.draft, device, dtype)
    engine = HFModel(target, backend, graphs=graphs)
    return wrapped_pair(source, shape, engine, HFModel(draft, backend, graphs=graphs))


def wrapped_pair(source: SpeculativeModel, shape: PairShape, target: HFModel, draft: HFModel) -> SpeculativeModel:
    """Return grown and enhanced models as a pair with the source's tokenizer, settings and draft context."""
    assert source.draft is not None
    old = source.draft
    small = ClassicModel(
        f"{old.name} as {shape.draft.name}", draft, target.vocab_size, old.draft_context, old.context_source
    )
    return SpeculativeModel(target, small, source.tokenizer, source.settings)


def layer_places(old: int, new: int) -> list[int]:
    """Return where each old layer goes among the new ones.

    They are spread evenly, but the last stays last, and the one at three quarters of the depth, whose attention chooses
    what a draft keeps, stays there: a layer that does nothing attends to nothing in particular.
    """
    old_scored, new_scored = 3 * old // 4, 3 * new // 4
    if old_scored >= old - 1:  # the last one itself
        old_scored = new_scored = 0
    before = [round(i * new_scored / max(1, old_scored)) for i in range(old_scored + 1)]
    steps = old - 1 - old_scored
    after = [new_scored + round(i * (new - 1 - new_scored) / steps) for i in range(1, steps + 1)]
    return before + after if steps else [new - 1]


def head_sources(heads: int, kv_heads: int, new_heads: int, new_kv_heads: int) -> tuple[list[int], list[int]]:
    """Return the old query head that each new one copies, and the old KV head of each new KV head.

    The first copy of a head gives the output; the others, whose output is dropped, keep the mean of all heads'
    attention, which chooses what a draft keeps, what it was. Where fewer query heads share a new KV head than shared an
    old one, the old one comes several times.

    Raises:
        ValueError: If the new heads cannot serve the old ones.
    """
    if new_heads % new_kv_heads:
        raise ValueError(f"{new_heads} query heads cannot share {new_kv_heads} key heads evenly")
    share, new_share = heads // kv_heads, new_heads // new_kv_heads
    parts = [(kv, list(range(first, min(first + new_share, (kv + 1) * share))))
             for kv in range(kv_heads) for first in range(kv * share, (kv + 1) * share, new_share)]  # fmt: skip
    if new_kv_heads < len(parts):
        raise ValueError(
            f"kv_heads must be at least {len(parts)} with {new_heads} heads, to serve those of the small model; "
            f"got {new_kv_heads}"
        )
    chosen = [parts[number % len(parts)] for number in range(new_kv_heads)]
    return [own[slot % len(own)] for _, own in chosen for slot in range(new_share)], [kv for kv, _ in chosen]


def rotary_places(dim: int, new_dim: int) -> list[int]:
    """Return the new index of each old head dim: a rotary pair (i, i + D/2) goes to the pair of its own frequency."""
    stretch = new_dim // dim
    pairs = [i * stretch for i in range(dim // 2)]
    return pairs + [new_dim // 2 + i for i in pairs]


def _check(model: LlamaForCausalLM, shape: Shape) -> None:
    config = model.config
    if not isinstance(model, LlamaForCausalLM):
        raise ValueError(f"only a Llama can be grown; got {type(model).__name__}")
    if config.rope_parameters["rope_type"] != "default" or config.attention_bias or config.mlp_bias:
        raise ValueError("only a Llama with default rotary positions and without biases can be grown")
    dim, layers = _head_dim(config), config.num_hidden_layers
    for what, old, new in (("hidden", config.hidden_size, shape.hidden), ("head_dim", dim, shape.head_dim)):
        if new not in [old * 4**power for power in range(8)]:  # its square root is a power of two
            raise ValueError(f"{what} {new} cannot be grown to exactly: it must be {old} times 1, 4, 16, ...")
    sizes = (("layers", layers, shape.layers), ("ffn", config.intermediate_size, shape.ffn),
             ("vocab", config.vocab_size, shape.vocab))  # fmt: skip
    for what, old, new in sizes:
        if new < old:
            raise ValueError(f"{what} must be at least {old}, the small model's; got {new}")
    head_sources(config.num_attention_heads, config.num_key_value_heads, shape.heads, shape.kv_heads)


def _config(old: LlamaConfig, shape: Shape) -> LlamaConfig:
    config = copy.deepcopy(old)
    config.hidden_size, config.intermediate_size, config.vocab_size = shape.hidden, shape.ffn, shape.vocab
    config.num_hidden_layers, config.head_dim = shape.layers, shape.head_dim
    config.num_attention_heads, config.num_key_value_heads = shape.heads, shape.kv_heads
    config.rms_norm_eps = old.rms_norm_eps * old.hidden_size / shape.hidden
    config.tie_word_embeddings = False
    return config


def _head_dim(config: LlamaConfig) -> int:
    return config.head_dim or config.hidden_size // config.num_attention_heads


def _llama(model: object) -> LlamaForCausalLM:
    if not isinstance(model, LlamaForCausalLM):
        raise ValueError(f"only a Llama can be grown; got {type(model).__name__}")
    return model


def _norm(old: Tensor, new: Tensor) -> None:
    """The mean over H channels of which h are not zero is h / H of what it was."""
    new[: len(old)] = old.to(new) * (len(old) / len(new)) ** 0.5


def _place_vocabulary(old: LlamaForCausalLM, new: LlamaForCausalLM) -> None:
    table, head = old.get_input_embeddings().weight, old.get_output_embeddings().weight
    size, hidden = table.shape
    new.model.embed_tokens.weight[:, hidden:] = 0.0
    new.model.embed_tokens.weight[:size, :hidden] = table.to(new.device)
    new.lm_head.weight[:size, :hidden] = head.to(new.device)
    if new.config.vocab_size > size:
        new.lm_head.weight[size:, :hidden] = _low_row(old).to(new.device)
    _norm(old.model.norm.weight, new.model.norm.weight)


def _low_row(model: LlamaForCausalLM) -> Tensor:
    """Return a row of the LM head for ids that there are none: the mean of those of unlikely tokens, float32 [h].

    No mean of logits exceeds the largest one, so that it never wins an argmax. That of all rows would do for this, but
    100,000 such ids would take most of the probability where a draft is in doubt, and so change which trees it grows.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, 256), generator=generator).to(model.device)
    low = model(input_ids=ids, use_cache=False).logits[0].float().mean(0).argsort()[:_LOW_TOKENS]
    return model.get_output_embeddings().weight[low].float().mean(0)


def _place_layer(config: LlamaConfig, old: Any, shape: Shape, new: Any) -> None:
    """Copy one decoder layer into a grown one whose output projections are zero."""
    hidden, dim, ffn = config.hidden_size, _head_dim(config), config.intermediate_size
    heads, groups, device = config.num_attention_heads, config.num_key_value_heads, new.mlp.up_proj.weight.device
    sources, copied = head_sources(heads, groups, shape.heads, shape.kv_heads)
    dims = torch.tensor(rotary_places(dim, shape.head_dim), device=device)

    def heads_of(module: Any, count: int, width: int) -> Tensor:
        return module.weight.to(device).view(count, width, -1)

    def place(name: str, count: int, old_count: int, chosen: list[int], factor: float = 1.0) -> None:
        large = heads_of(getattr(new.self_attn, name), count, shape.head_dim)
        if name == "q_proj":  # of a score only the old dims count; the keys' other dims are free
            others = torch.ones(shape.head_dim, dtype=torch.bool, device=device).index_fill(0, dims, False)
            large[:, others] = 0.0
        small = heads_of(getattr(old.self_attn, name), old_count, dim)[chosen]
        large[:, dims, :hidden] = (small * factor).to(large.dtype)

    # sqrt(head dim), by which scores are divided, has grown
    place("q_proj", shape.heads, heads, sources, (shape.head_dim / dim) ** 0.5)
    place("k_proj", shape.kv_heads, groups, copied)
    place("v_proj", shape.kv_heads, groups, copied)
    first = torch.tensor([sources.index(head) for head in range(heads)], device=device)
    out = new.self_attn.o_proj.weight.view(shape.hidden, shape.heads, shape.head_dim)
    out[:hidden, first[:, None], dims] = old.self_attn.o_proj.weight.to(out).view(hidden, heads, dim)
    for name in ("gate_proj", "up_proj"):
        getattr(new.mlp, name).weight[:ffn, :hidden] = getattr(old.mlp, name).weight.to(device)
    new.mlp.down_proj.weight[:hidden, :ffn] = old.mlp.down_proj.weight.to(device)
    _norm(old.input_layernorm.weight, new.input_layernorm.weight)
    _norm(old.post_attention_layernorm.weight, new.post_attention_layernorm.weight)
