"""Measured costs on disk: one small JSON file for each target, draft and machine that `specx tune` has seen."""

import hashlib
import json
import os
import platform
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from specx.costs import Costs
from specx.draft import DraftModel
from specx.hf import HFModel


@dataclass(frozen=True, slots=True)
class Profile:
    """What is known of costs.

    Attributes:
        costs: None: nothing.
        about: Where they come from, or why there are none, in words.
        ignored: Whether there is a file, but an unusable one.
    """

    costs: Costs | None
    about: str
    ignored: bool = False


NO_PROFILE = Profile(None, "none")
_FORMAT = 2  # 1: its levels were measured in rounds that did not always ask the draft
_NOT_COSTS = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")  # of a config; the dtype has its own key
Key = dict[str, str]


def folder() -> Path:
    """Return where profiles lie: below SPECX_CACHE, else below specx/ in XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("SPECX_CACHE"):
        return Path(own).expanduser() / "profiles"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return (cache if cache.is_absolute() else Path.home() / ".cache") / "specx" / "profiles"  # as the standard says


def key_of(target: HFModel, draft: DraftModel) -> Key:
    """Return all that costs depend on, in words: models, machine, how they run, and by which versions."""
    name = str(getattr(target.model, "name_or_path", ""))
    small = getattr(draft, "model", None)
    shape = _digest(small.config.to_dict()) if isinstance(small, HFModel) else _digest(list(draft.about))
    return {
        "target": f"{name} {_digest(target.config.to_dict())}",
        "draft": f"{draft.name} {shape}, context {draft.draft_context}",
        "device": _device(target),
        "dtype": str(target.dtype).removeprefix("torch."),
        "backend": target.backend + ("" if target.hybrid else ", dense trees"),
        "weights": "packed" if len(target.packed) else "as they are",
        "steps": "eager" if target.no_graphs else "static",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def path_of(key: Key) -> Path:
    """Return the file of a key's profile, which need not exist."""
    return folder() / f"{_digest(key)}.json"


def load_profile(key: Key) -> Profile:
    """Return the profile stored under `key`; a file that is damaged or of something else is ignored, and says so."""
    path = path_of(key)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT or content["key"] != key:
            return Profile(None, f"{path} is ignored: it was measured for something else. specx tune replaces it", True)
        return Profile(_parse(content["costs"]), f"of {content['measured']}, {path}")
    except FileNotFoundError:
        return NO_PROFILE
    except (OSError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        return Profile(None, f"{path} is ignored: it is damaged ({reason}). specx tune replaces it", True)


def save_profile(costs: Costs, key: Key) -> Path:
    """Store costs under `key`, whole or not at all, and return the file.

    Raises:
        RuntimeError: If it cannot be written.
    """
    path = path_of(key)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    measured = datetime.now().astimezone().isoformat(timespec="minutes")
    content = {"format": _FORMAT, "key": key, "measured": measured, "costs": asdict(costs)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        raise RuntimeError(
            f"the profile cannot be written to {path}: {error.strerror or error}; SPECX_CACHE names another folder"
        ) from error
    finally:
        if draft.exists():
            draft.unlink()
    return path


def _parse(found: dict[str, Any]) -> Costs:
    tree = found["tree"]
    return Costs(
        contexts=tuple(found["contexts"]),
        nodes=tuple(found["nodes"]),
        verify=tuple(tuple(row) for row in found["verify"]),
        level=tuple(found["level"]),
        beam=found["beam"],
        rest=found["rest"],
        tau=found["tau"],
        tree=None if tree is None else tuple(tree),
    )


def processor() -> str:
    """Return the name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.machine()


def _device(target: HFModel) -> str:
    if target.device.type == "cuda":
        return f"{torch.cuda.get_device_name(target.device)}, on {len(target.devices())} devices"
    return f"{processor()}, {torch.get_num_threads()} threads"


def _digest(content: Any) -> str:
    if isinstance(content, dict):
        content = {name: each for name, each in content.items() if name not in _NOT_COSTS}
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
