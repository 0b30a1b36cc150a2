"""What measured numbers depend on: versions, machine, models, load."""

import os
import platform
import subprocess
from pathlib import Path

import torch
import transformers

import specx
from specx.api import SpeculativeModel


def facts_of(command: str, data: str, target: str | None, model: SpeculativeModel) -> dict[str, str]:
    """Return what the numbers depend on.

    Args:
        command: That measured them.
        data: What was read, in words.
        target: Name that was asked for; None: the draft's own target.
    """
    engine, draft = model.engine, model.draft
    drafting = f"draft {draft.name}, context {draft.draft_context} ({draft.context_source})" if draft else "no draft"
    device = torch.cuda.get_device_name() if engine.device.type == "cuda" else _processor()
    return {
        "command": command,
        "specx": f"{specx.__version__}, commit {_commit()}",
        "machine": f"{device}, {torch.get_num_threads()} threads; Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}",
        "models": f"target {target or Path(model.target.name_or_path).name or type(model.target).__name__}, "
        f"{str(engine.dtype).removeprefix('torch.')} on {engine.device}; {drafting}",
        "data": data,
        "attention": f"{engine.backend}: {engine.backend_reason}",
        "load average before": f"{os.getloadavg()[0]:.2f} on {os.cpu_count()} cores",
    }  # fmt: skip


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


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.machine()
