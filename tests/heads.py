"""EAGLE heads for tiny targets: random or lightly fitted, saved as any of the dialects would save them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from conftest import FIXED
from safetensors.torch import save_file
from transformers import PreTrainedModel

from specx.adapters.eagle import EagleModel
from specx.adapters.eagle_checkpoints import read_head
from specx.adapters.eagle_head import EagleHead
from specx.adapters.loader import load_eagle
from specx.api import SpeculativeModel
from specx.cache import TreeCache
from specx.hf import HFModel
from specx.target import Target

Tensors = dict[str, torch.Tensor]
HIDDEN, HEADS, GROUPS, HEAD_DIM, WIDE, VOCAB, DRAFT_VOCAB = 48, 4, 2, 12, 80, 64, 56
EAGLE3, EAGLE1 = "eagle3", "eagle1"


def tiny_target(kind: str = "Llama", **overrides: Any) -> PreTrainedModel:
    """A random target of eight layers: EAGLE-3 reads three of them."""
    options = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": 8,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 8192,
        "initializer_range": 0.2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(options | overrides))
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def head_tensors(kind: str = EAGLE3, seed: int = 0, layers: int = 1, **sizes: int) -> Tensors:
    """Random weights of a head under the official names (`midlayer` for EAGLE-3)."""
    generator = torch.Generator().manual_seed(seed)
    hidden, target = sizes.get("hidden", HIDDEN), sizes.get("target_hidden", HIDDEN)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    wide = 3 * target if kind == EAGLE3 else 2 * hidden
    found = {"fc.weight": random(hidden, wide)}
    for number in range(layers):
        first = kind == EAGLE3 and number == 0
        prefix = "midlayer." if first else f"layers.{number}."
        read = 2 * hidden if first else hidden
        rows = {"q": HEADS * HEAD_DIM, "k": GROUPS * HEAD_DIM, "v": GROUPS * HEAD_DIM}
        found |= {f"{prefix}self_attn.{name}_proj.weight": random(count, read) for name, count in rows.items()}
        found[f"{prefix}self_attn.o_proj.weight"] = random(hidden, HEADS * HEAD_DIM)
        for name, shape in {"gate": (WIDE, hidden), "up": (WIDE, hidden), "down": (hidden, WIDE)}.items():
            found[f"{prefix}mlp.{name}_proj.weight"] = random(*shape)
        norms = ["post_attention_layernorm", *(["hidden_norm"] if first else [])]
        norms += ["input_layernorm"] if first or number else []
        found |= {f"{prefix}{name}.weight": 1 + 0.1 * random(hidden) for name in norms}
    if kind == EAGLE1:
        return found | {"fc.bias": 0.1 * random(hidden)}
    kept = torch.randperm(VOCAB, generator=generator)[:DRAFT_VOCAB].sort().values
    return found | {
        "norm.weight": 1 + 0.1 * random(hidden),
        "lm_head.weight": random(DRAFT_VOCAB, hidden),
        "d2t": kept - torch.arange(DRAFT_VOCAB),
        "t2d": torch.isin(torch.arange(VOCAB), kept),
    }


def flat_config(**extra: Any) -> dict[str, Any]:
    """A config.json as EAGLE's own training saves it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "num_hidden_layers": 1,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "vocab_size": VOCAB,
        "hidden_act": "silu",
    } | extra


def save(folder: Path, config: dict[str, Any], tensors: Tensors, file: str = "pytorch_model.bin") -> str:
    """Write a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if file.endswith(".bin"):
        torch.save(tensors, folder / file)
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file)
    return str(folder)


def couple(target: PreTrainedModel | HFModel, folder: str, context: int | None = None) -> SpeculativeModel:
    """A target with the head in a folder, ids only."""
    engine = target if isinstance(target, HFModel) else HFModel(target)
    return SpeculativeModel(engine, load_eagle(folder, folder, engine, context), None, FIXED)


def prompt_of(count: int) -> torch.Tensor:
    """`count` random ids, the same each time."""
    return torch.randint(1, VOCAB, (count,), generator=torch.Generator().manual_seed(count))


def fitted(target: PreTrainedModel, folder: Path, kind: str, lengths: Sequence[int], **options: Any) -> str:
    """Teach a random head by heart what the target answers to `prompt_of` each length, and save it.

    It goes through the head's own forward: that the forward is right, other tests show.
    """
    engine, config = HFModel(target), flat_config(num_hidden_layers=options.get("layers", 1))
    head, tensors = read_head(save(folder, config, head_tensors(kind, **options)))
    table = tensors.get("d2t")
    vocabulary = None if table is None else table + torch.arange(len(table))
    model = EagleModel("", EagleHead(head, tensors, engine.embedding, engine.lm_head), engine, vocabulary, 2048, "")
    answers = [_answer(model, engine, length) for length in lengths]
    ids = torch.cat([ids for ids, _ in answers])
    features = {layer: torch.cat([own[layer] for _, own in answers]) for layer in model.taps}
    weights = [each for each in model.head.parameters() if not any(each is own for own in target.parameters())]
    for weight in weights:
        weight.requires_grad_(True)
    _train(model, ids, features, weights)  # in place: the parameters share their memory with `tensors`
    named = {name.replace("layers.0.", "midlayer.") if table is not None else name: tensors[name] for name in tensors}
    return save(folder, config, named)


def _answer(model: EagleModel, engine: HFModel, length: int) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """The answer and the prompt's end, with the features of these tokens."""
    ids = engine.model.generate(prompt_of(length)[None], max_new_tokens=56, do_sample=False)[0]
    found: list[Any] = []
    Target(engine, len(ids), taps=model.taps).prefill(ids, found.append)
    features = {layer: torch.cat([each.features[layer] for each in found]) for layer in model.taps}
    return ids[-64:], {layer: each[-64:] for layer, each in features.items()}


def _train(model: EagleModel, ids: torch.Tensor, features: dict[int, torch.Tensor], weights: list[Any]) -> None:
    head, optimizer = model.head, torch.optim.Adam(weights, 4e-3)
    labels = ids[2:]
    if model.vocabulary is not None:
        column = torch.full((VOCAB,), -100)
        column[model.vocabulary] = torch.arange(len(model.vocabulary))
        labels = column[labels]
    count = len(ids) - 2
    for _ in range(60):
        states, loss = model.head.fuse([features[layer] for layer in model.sources])[:count], torch.zeros(())
        truth = states.detach()
        for _ in range(2):  # the second pass reads the first one's own outputs
            cache = TreeCache(head.head.layers, count, one_block=False)  # autograd forbids writing into a shared one
            out = head(ids[1:-1], states, cache, model.call(cache, torch.arange(count)))
            loss = loss + F.cross_entropy(head.logits(out.read), labels)
            if not head.head.is_eagle3:
                loss = loss + F.mse_loss(out.states[:-1], truth[1:])
            states = torch.cat([truth[:1], out.states[:-1]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
