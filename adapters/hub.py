"""Checkpoints on the Hugging Face hub: everything after this file sees local directories only."""

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

_SECONDS = 5.0  # one question, no retries: without a network an answer must not take minutes
_BESIDE_WEIGHTS = (".json", ".txt", ".model", ".py", ".jinja", ".tiktoken")
_OFFLINE = (
    "Offline you can use the bundled pair (specx run without names), a local directory (`hf download` on a connected "
    "machine makes one), or a filled cache (HF_HOME)."
)


def fetch(where: str, role: str) -> str:
    """Return the local directory of a checkpoint, downloading it from the hub if `where` is neither that nor a file.

    The hub is asked once. Where it cannot be reached, what its cache holds is used.

    Raises:
        RuntimeError: If the hub has no such repository, refuses it, or can neither be reached nor has it cached.
    """
    if Path(where).exists():
        return where
    if Path(where).is_absolute():  # not what users typed, which names.locate has checked: a bundled model
        raise RuntimeError(
            f"the bundled {Path(where).name} is not in this installation: reinstall specx, or train it in a checkout "
            "with python -m specx.training.demo; or give --target and --draft"
        )
    cached = try_to_load_from_cache(where, "config.json")
    snapshot = Path(cached).parent if isinstance(cached, str) else None
    try:
        info = HfApi().model_info(where, timeout=_SECONDS)
    except Exception as error:  # no such repository, or whatever the HTTP client raises without a network
        if snapshot is not None:
            return str(snapshot)
        raise RuntimeError(f"{role} {where}: no such directory here, and {_refusal(error)}") from error
    wanted = _needed([each.rfilename for each in info.siblings or ()])
    if snapshot is not None and snapshot.name == info.sha and all((snapshot / name).exists() for name in wanted):
        return str(snapshot)
    try:
        return str(snapshot_download(where, allow_patterns=wanted))
    except GatedRepoError as error:
        raise RuntimeError(f"{role} {where}: {_refusal(error)}") from error
    except Exception as error:
        raise RuntimeError(f"{role} {where}: the download broke off ({brief(error)}); run again to resume") from error


def _refusal(error: Exception) -> str:
    if isinstance(error, GatedRepoError):
        return "the hub restricts access to it: accept its terms there, then set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return "no such repository on the hub (if it is private, set HF_TOKEN)"
    offline = isinstance(error, OfflineModeIsEnabled)
    reason = "HF_HUB_OFFLINE is set" if offline else f"the hub cannot be reached ({brief(error)})"
    return f"{reason} with nothing of it in the cache. {_OFFLINE}"


def _needed(names: Sequence[str]) -> list[str]:
    """Choose the files of a repository that loading reads: safetensors where there are any, no other format twice."""
    top = [name for name in names if "/" not in name]
    weights: list[str] = []
    for pattern in ("model*.safetensors", "*.safetensors", "pytorch_model*.bin"):
        weights = weights or [name for name in top if fnmatch(name, pattern)]
    return weights + [name for name in top if name.endswith(_BESIDE_WEIGHTS)]


def brief(error: Exception) -> str:
    """Return an error's text on one line, cut where it becomes a page."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = f"{type(error).__name__}: {text}" if isinstance(error, LookupError) else text
    return text if len(text) <= 300 else text[:300] + " ..."
