"""Checkpoints: checked before they are loaded, with errors that say what to do."""

import importlib.util
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from specx.adapters.hub import brief, fetch
from specx.adapters.split import split_options
from specx.config import LoadConfig

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
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
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not supported; use cpu or cuda")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"device {name!r} asked for, but torch sees {count} CUDA devices here; use cpu")
    return device


def check_machine(config: LoadConfig) -> None:
    """Raise ValueError if this machine cannot load models as `config` asks."""
    if config.device is not None:
        check_device(config.device)
    for option, value, module in (
        ("--device-map", config.device_map, "accelerate"),
        ("--quantization", config.quantization, "bitsandbytes"),
    ):
        if value and not _installed(module):
            raise ValueError(f"{option} {value} needs {module}: pip install {module}")


def check_files(directory: str, role: str) -> None:
    """Raise RuntimeError if a checkpoint cannot be whole: before anything is loaded, which may take minutes."""
    path, name = Path(directory), f"{role} directory {directory}"
    if path.is_file():  # a draft's weights alone
        return _check_weights(path, f"{role} {directory}")
    bare = role == "draft" and any(path.glob("*.pth"))
    if not bare and not (path / "config.json").is_file():
        raise RuntimeError(f"{name} has no config.json, so it is not a Hugging Face checkpoint")
    weights = sorted(path.glob("*.safetensors")) + sorted(path.glob("*.bin"))
    for each in [path / "config.json", path / "generation_config.json", *path.glob("*.index.json")]:
        content = _read_json(each, name) if each.exists() else {}
        named = set(content.get("weight_map", {}).values())
        absent = sorted(file for file in named if not (path / file).is_file())
        if absent and not (path / "model.safetensors").is_file():
            raise RuntimeError(f"{name} lacks {absent[0]}, which its {each.name} names; complete the download")
    if not weights and not bare:
        raise RuntimeError(f"{name} has no weights (model.safetensors or pytorch_model.bin)")
    for file in weights:
        _check_weights(file, name)


def check_config(directory: str, role: str, trust_remote_code: bool = False) -> None:
    """Raise RuntimeError if transformers cannot make sense of a checkpoint's config.json."""
    try:
        with quiet():
            AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a broken config, or the code that it asks for, raises
        raise RuntimeError(f"cannot load the {role} from {directory}: {_explain(error)}") from error


def _read_json(file: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError: no JSON, or no UTF-8
        raise RuntimeError(f"{name}: its {file.name} is broken: {error}") from error
    if not isinstance(content, dict):
        raise RuntimeError(f"{name}: its {file.name} is broken: a JSON object is expected")
    return content


def _check_weights(file: Path, name: str) -> None:
    with file.open("rb") as stream:
        if stream.read(20).startswith(b"version https://git"):
            raise RuntimeError(f"{name}: {file.name} is a Git LFS pointer, not the weights; run `git lfs pull` there")
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt"):  # reads the header, which must cover the file exactly
                pass
        except Exception as error:
            raise RuntimeError(f"{name}: {file.name} is damaged or cut off ({error}); download it again") from error


def load_model(where: str, config: LoadConfig, role: str, ranks: int = 1) -> PreTrainedModel:
    """Load a causal LM in eval mode.

    Args:
        where: A directory or a hub id.
        config: dtype, device and, for the target, device_map and quantization.
        role: "target" or "draft", for messages.
        ranks: Processes that hold it together, by its own tensor-parallel plan; all of them call this.

    Raises:
        RuntimeError: If it cannot be loaded, or weights are missing from it.
        ValueError: If an option cannot be met on this machine.
    """
    check_machine(config)
    device = torch.device(config.device or default_device())
    options: dict[str, Any] = {"dtype": "auto" if config.dtype == "auto" else getattr(torch, config.dtype)}
    if role == "target":
        options |= _placement(config) | split_options(ranks)
    directory = fetch(where, role)
    check_files(directory, role)
    try:
        with quiet():
            model, report = AutoModelForCausalLM.from_pretrained(
                directory,
                trust_remote_code=config.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, with the weight's name
                **options,
            )
    except Exception as error:  # whatever a broken checkpoint raises
        raise RuntimeError(f"cannot load the {role} from {where}: {_explain(error)}") from error
    _check_report(report, f"{role} {where}")
    placed = ranks > 1 or "device_map" in options or "quantization_config" in options
    return model.eval() if placed else model.to(device).eval()


def _check_report(report: dict[str, Any], name: str) -> None:
    missing, wrong = sorted(report["missing_keys"]), sorted(report["mismatched_keys"])
    if missing:
        raise RuntimeError(
            f"{name} lacks {len(missing)} of the weights its config asks for, the first one {missing[0]}"
        )
    if wrong:
        key, found, expected = wrong[0]
        raise RuntimeError(
            f"{name}: {len(wrong)} weights do not fit its config; {key} is {list(found)}, not {list(expected)}"
        )
    unused = sorted(report["unexpected_keys"])
    if unused:
        text = "%s: %d weights of the checkpoint are not used, the first one %s; does config.json belong to it?"
        logging.getLogger("specx").warning(text, name, len(unused), unused[0])


def load_tokenizer(where: str, trust_remote_code: bool = False) -> Any | None:
    """Load a tokenizer from a directory or a hub id, or return None where a checkpoint brings none.

    Raises:
        RuntimeError: If there is one that cannot be read.
    """
    path = Path(fetch(where, "tokenizer"))
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except Exception as error:  # a broken tokenizer raises many things
        lacking = [each for each in ("sentencepiece", "google.protobuf") if not _installed(each)]
        if lacking and (path / "tokenizer.model").is_file() and not (path / "tokenizer.json").is_file():
            reason = "tokenizer.model needs two packages: pip install sentencepiece protobuf"
        else:
            reason = _explain(error)
        raise RuntimeError(f"the tokenizer in {where} cannot be read: {reason}") from error


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is not there
        return False


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' log lines and loading bars off the screen; downloads keep theirs, they take minutes."""
    verbosity, bars, downloads = (
        hf_logging.get_verbosity(),
        hf_logging.is_progress_bar_enabled(),
        not are_progress_bars_disabled(),
    )
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
        (enable_progress_bars if downloads else disable_progress_bars)()


def _placement(config: LoadConfig) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if config.device_map:
        options["device_map"] = config.device_map
    if config.quantization:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=config.quantization == "4bit", load_in_8bit=config.quantization == "8bit"
        )
    return options


def _explain(error: Exception) -> str:
    """Say in a user's words what transformers says in its own."""
    text = str(error)
    if "Weights only load failed" in text:
        return "its pytorch_model.bin is damaged or holds pickled code, which is never run"
    if "trust_remote_code" in text:
        return "it brings its own Python code; read that, then allow it with --trust-remote-code"
    if "Unrecognized configuration class" in text:
        return "it is no causal language model"
    return brief(error)


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
