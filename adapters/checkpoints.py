"""Checkpoints from a directory or the hub, with errors that say what to do."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from specx.config import LoadConfig

OFFLINE_HINT = (
    "If the hub cannot be reached from here, give a local directory (huggingface-cli download on another machine "
    "makes one), set HF_HOME to a filled cache, or run the bundled pair: specx run"
)


def default_device() -> str:
    """Return cuda where there is one, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(name: str) -> torch.device:
    """Return the device, or raise ValueError if this machine has none of that name."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is not a torch device; try cpu or cuda") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} asked for, but torch sees {torch.cuda.device_count()} CUDA devices; try cpu")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not supported; use cpu or cuda")
    return device


def load_model(where: str, config: LoadConfig, role: str) -> PreTrainedModel:
    """Load a causal LM in eval mode.

    Args:
        where: A directory or a hub id.
        config: dtype, device and, for the target, device_map and quantization.
        role: "target" or "draft", for messages.

    Raises:
        RuntimeError: If it cannot be loaded, or weights are missing from it.
        ValueError: If an option cannot be met on this machine.
    """
    device = check_device(config.device or default_device())
    options: dict[str, Any] = {"dtype": "auto" if config.dtype == "auto" else getattr(torch, config.dtype)}
    if role == "target":
        options |= _placement(config)
    if Path(where).is_dir() and not (Path(where) / "config.json").is_file():
        raise RuntimeError(f"{role} directory {where} has no config.json, so it is not a Hugging Face checkpoint")
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            where, trust_remote_code=config.trust_remote_code, output_loading_info=True, **options
        )
    except Exception as error:  # whatever a broken checkpoint or an unreachable hub raises
        raise RuntimeError(_explain(where, role, error)) from error
    finally:
        hf_logging.set_verbosity(verbosity)
    lacking = sorted(report["missing_keys"]) + [str(key) for key in report.get("mismatched_keys", ())]
    if lacking:
        raise RuntimeError(f"{role} {where} lacks {len(lacking)} weights, the first one {lacking[0]}")
    return model.eval() if "device_map" in options or "quantization_config" in options else model.to(device).eval()


def load_tokenizer(where: str, trust_remote_code: bool = False) -> Any | None:
    """Load a tokenizer, or return None where a checkpoint brings none."""
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        return AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
    except Exception:  # a checkpoint without a tokenizer raises many things
        names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
        if any((Path(where) / name).is_file() for name in names):
            raise RuntimeError(
                f"the tokenizer in {where} cannot be read (is sentencepiece or tiktoken missing?)"
            ) from None
        return None
    finally:
        hf_logging.set_verbosity(verbosity)


def _placement(config: LoadConfig) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for option, value, module in (
        ("--device-map", config.device_map, "accelerate"),
        ("--quantization", config.quantization, "bitsandbytes"),
    ):
        if value and importlib.util.find_spec(module) is None:
            raise ValueError(f"{option} {value} needs {module}: pip install {module}")
    if config.device_map:
        options["device_map"] = config.device_map
    if config.quantization:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=config.quantization == "4bit", load_in_8bit=config.quantization == "8bit"
        )
    return options


def _explain(where: str, role: str, error: Exception) -> str:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    message = f"cannot load the {role} from {where}: {reason}"
    return message if Path(where).is_dir() else f"{message}\n{OFFLINE_HINT}"


def compare_tokenizers(target: Any, draft: Any) -> tuple[int, list[str]]:
    """Compare two tokenizers id by id; vocabularies of different size are normal.

    Returns:
        The number of ids that both know, and a line for each of the first five that mean different tokens.
    """
    mine = {index: token for token, index in target.get_vocab().items()}
    other = {index: token for token, index in draft.get_vocab().items()}
    shared = sorted(mine.keys() & other.keys())
    wrong = [index for index in shared if mine[index] != other[index]]
    return len(shared), [f"id {i} is {mine[i]!r} for the target, {other[i]!r} for the draft" for i in wrong[:5]]
