"""What measured numbers depend on: versions, machine, models, load."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers

import specx
from specx.api import SpeculativeModel
from specx.profiles import processor


def facts_of(command: str, data: str, target: str | None, model: SpeculativeModel) -> dict[str, str]:
    """Return what the numbers depend on.

    Args:
        command: That measured them.
        data: What was read, in words.
        target: Name that was asked for; None: the draft's own target.
    """
    engine, draft = model.engine, model.draft
    drafting = f"draft {draft.name}, context {draft.draft_context} ({draft.context_source})" if draft else "no draft"
    return {
        "command": command,
        "specx": version_of(),
        "machine": machine_of(engine.device),
        "models": f"target {target or Path(model.target.name_or_path).name or type(model.target).__name__}, "
        f"{str(engine.dtype).removeprefix('torch.')} on {engine.device}; {drafting}",
        "data": data,
        "profile": model.profile.about,
        "attention": f"{engine.backend}: {engine.backend_reason}",
        "load average before": f"{os.getloadavg()[0]:.2f} on {os.cpu_count()} cores",
    }  # fmt: skip


def described(command: str, facts: dict[str, str], model: SpeculativeModel) -> dict[str, Any]:
    """Return the same for `summary.json`, part by part; `facts` as `facts_of` gives them."""
    device = model.engine.device
    return {
        "command": command,
        "versions": {
            "specx": specx.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "commit": _commit(),
        "hardware": {
            "device": device.type,
            "name": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
            "cores": os.cpu_count() or 1,
            "threads": torch.get_num_threads(),
        },
        "models": facts["models"],
        "attention": facts["attention"],
        "data": facts["data"],
    }


def version_of() -> str:
    """Return the version and commit that measure."""
    return f"{specx.__version__}, commit {_commit()}"


def machine_of(device: torch.device) -> str:
    """Return the device's name, and what runs there."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return (
        f"{name}, {torch.get_num_threads()} threads; Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )


def _commit() -> str:
    root = Path(specx.__file__).resolve().parent.parent
    if not (root / ".git").exists():  # installed somewhere, perhaps inside another repository
        return "unknown"
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
