"""LongSpec drafts for tiny targets: random, in the published layout. They agree with their target now and then.

Target and draft share embeddings and LM head; with small weights between these both follow them (see `tiny_target`).
"""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from conftest import FIXED
from safetensors.torch import save_file
from transformers import PreTrainedModel

from specx.adapters.longspec_checkpoints import BlockFormat
from specx.adapters.longspec_loader import load_longspec
from specx.api import SpeculativeModel
from specx.hf import HFModel

HIDDEN, HEADS, GROUPS, HEAD_DIM, WIDE, VOCAB = 48, 4, 2, 12, 80, 64
SHAPE = BlockFormat(HIDDEN, WIDE, HEADS * HEAD_DIM, GROUPS * HEAD_DIM, False, HEADS, GROUPS, 1e-5, "silu")
LINEAR = {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0}}
Tensors = dict[str, torch.Tensor]


def tiny_target(kind: str = "Llama", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random target that mostly says what its LM head makes of the last token's embedding."""
    options = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": 3,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**(options | overrides))
    model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config).eval()
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            std = 1.0 if "embed" in name else 0.3 if "lm_head" in name else 0.08
            weight.data = torch.randn(weight.shape) * std
    return model


def block_tensors(seed: int = 1, shape: BlockFormat = SHAPE) -> Tensors:
    """Random weights under the published names, those that nobody reads among them."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, size in (shape.shapes() | shape.unused_shapes()).items():
        noise = torch.randn(size, generator=generator)
        found[name] = 1 + 0.1 * noise if "layernorm" in name else 0.1 * noise if len(size) == 1 else 0.08 * noise
    return found


def config_of(**changed: Any) -> dict[str, Any]:
    """A config.json as the drafts on the hub have it: that of their target."""
    return {
        "architectures": ["LlamaGlideDecoderLayer"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "num_hidden_layers": 3,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "mlp_bias": False,
        "max_position_embeddings": 4096,
    } | changed


def save(folder: Path, tensors: Tensors | None = None, config: dict[str, Any] | None = None, shards: int = 1) -> str:
    """Write a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of() if config is None else config))
    tensors = block_tensors() if tensors is None else tensors
    names, index = sorted(tensors), {}
    for number in range(shards):
        mine = names[number::shards]
        file = "model.safetensors" if shards == 1 else f"model-{number + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in mine}, folder / file)
        index |= dict.fromkeys(mine, file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return str(folder)


def couple(target: PreTrainedModel | HFModel, path: str, context: int | None = None, **options: Any) -> Any:
    """A target with the draft at `path`, ids only."""
    engine = target if isinstance(target, HFModel) else HFModel(target)
    return SpeculativeModel(engine, load_longspec("tiny", path, engine, context, **options), None, FIXED)


def prompt_of(count: int) -> torch.Tensor:
    """`count` random ids, the same each time."""
    return torch.randint(1, VOCAB, (count,), generator=torch.Generator().manual_seed(count))
