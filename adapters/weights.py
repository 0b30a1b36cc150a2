"""The tensors of a checkpoint without a model class, and what kind of draft they are."""

import json
from pathlib import Path
from typing import Any, Literal
from zipfile import is_zipfile

import torch
from safetensors import safe_open
from torch import Tensor

_FORMATS = ("model*.safetensors", "*.safetensors", "pytorch_model*.bin", "*.bin", "*.pth")
_PREFIXES = ("module.", "model.", "draft_model.", "glide.")  # what training programs put before a draft's names


def read_config(directory: str) -> dict[str, Any]:
    """Return a checkpoint's config.json."""
    return json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))


def read_tensors(directory: str, names_only: bool = False) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint on the CPU: safetensors where there are any, else .bin, else .pth files.

    Args:
        directory: Of the checkpoint, or one file of weights.
        names_only: Read the headers only: the tensors lie on the meta device.

    Raises:
        RuntimeError: If a file cannot be read, or holds something else than plain tensors.
    """
    path, found = Path(directory), dict[str, Tensor]()
    files = [path] if path.is_file() else None
    for file in files or next((files for each in _FORMATS if (files := sorted(path.glob(each)))), ()):
        try:
            found |= _safetensors(file, names_only) if file.suffix == ".safetensors" else _pickled(file, names_only)
        except Exception as error:  # whatever a broken file raises
            raise RuntimeError(
                f"cannot load the draft from {directory}: its {file.name} is damaged or holds pickled code, which is "
                "never run"
            ) from error
    return found


def _safetensors(file: Path, names_only: bool) -> dict[str, Tensor]:
    with safe_open(file, "pt") as opened:
        names = opened.keys()
        if names_only:
            return {name: torch.empty(opened.get_slice(name).get_shape(), device="meta") for name in names}
        return {name: opened.get_tensor(name) for name in names}


def _pickled(file: Path, names_only: bool) -> dict[str, Tensor]:
    place, lazily = ("meta", is_zipfile(file)) if names_only else ("cpu", False)
    content = torch.load(file, map_location=place, weights_only=True, mmap=lazily)
    wrong = [name for name, each in content.items() if not isinstance(each, Tensor)]
    if wrong:
        raise ValueError(f"{wrong[0]} is no tensor")
    return content


def plain_name(key: str) -> str:
    """Return a tensor's name without what training programs put before it."""
    while (prefix := next((each for each in _PREFIXES if key.startswith(each)), None)) is not None:
        key = key.removeprefix(prefix)
    return key


def kind_of(directory: str) -> Literal["classic", "eagle", "longspec"]:
    """Say which adapter a draft's checkpoint is for, by the names of its tensors, never by its own."""
    raw = read_tensors(directory, names_only=True)
    if {plain_name(name) for name in raw} >= {"cross_attn.q_proj.weight", "post_cross_attention_layernorm.weight"}:
        return "longspec"
    names = {name.removeprefix("model.") for name in raw}
    marks = {"fc.weight", "d2t", "layers.0.hidden_norm.weight"}
    return "eagle" if marks & names or any(name.startswith("midlayer.") for name in names) else "classic"
