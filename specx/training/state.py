"""What a training run needs to go on exactly where it was: weights, optimizers, counts. Whole or not there at all."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

_KEPT = 2  # the newest ones; with one alone there would be a moment without any


@dataclass(slots=True)
class Progress:
    """Where a training is.

    Attributes:
        run: Number of the run; later ones go on from the weights of the one before.
        step, tokens: Done in this run.
    """

    run: int = 0
    step: int = 0
    tokens: int = 0


def save_state(folder: Path, model: nn.Module, optimizers: Sequence[Any], progress: Progress) -> None:
    """Write a state as a folder of safetensors below `folder`. A process killed meanwhile leaves the one before."""
    name = f"run-{progress.run}-step-{progress.step:08}"
    partial = folder / f"{name}.partial"
    for stale in folder.glob("*.partial"):
        shutil.rmtree(stale)
    partial.mkdir(parents=True)
    save_model(model, str(partial / "model.safetensors"))
    for number, optimizer in enumerate(optimizers):
        found = optimizer.state_dict()["state"]
        tensors = {
            f"{index}.{key}": torch.as_tensor(value).contiguous()
            for index, values in found.items()
            for key, value in values.items()
            if value is not None
        }
        save_file(tensors, partial / f"optimizer-{number}.safetensors")
    (partial / "progress.json").write_text(json.dumps(asdict(progress)))
    shutil.rmtree(folder / name, ignore_errors=True)
    os.replace(partial, folder / name)
    for old in states(folder)[:-_KEPT]:
        shutil.rmtree(old)


def states(folder: Path) -> list[Path]:
    """Return the whole states in `folder`, oldest first."""
    found = [each for each in folder.glob("run-*-step-*") if each.suffix != ".partial"]
    return sorted(found, key=lambda each: (int(each.name.split("-")[1]), int(each.name.split("-")[3])))


def load_state(folder: Path, model: nn.Module, optimizers: Sequence[Any], device: torch.device) -> Progress:
    """Load the newest state of `folder` into a model and its optimizers; return where it was, or a fresh start."""
    found = states(folder)
    if not found:
        return Progress()
    load_model(model, str(found[-1] / "model.safetensors"), device=str(device))
    for number, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Any]] = {}
        for key, tensor in load_file(found[-1] / f"optimizer-{number}.safetensors", device=str(device)).items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = tensor.cpu() if name == "step" else tensor  # as AdamW has it
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return Progress(**json.loads((found[-1] / "progress.json").read_text()))
