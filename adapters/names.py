"""Names that users type, and the hub repositories behind them. No torch here."""

import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

from specx.config import nearest


@dataclass(frozen=True, slots=True)
class KnownDraft:
    """A published draft.

    Attributes:
        repo: Hub id, or the name of a bundled folder.
        target: Name of the target it was made for.
        kind: Which adapter loads it.
        draft_context: Positions it was trained for, whatever its config claims.
    """

    repo: str
    target: str
    kind: Literal["classic"]
    draft_context: int


DRAFTS = {
    "demo": KnownDraft("demo-draft", "demo", "classic", 1024),
    "vicuna-68m": KnownDraft("double7/vicuna-68m", "vicuna-7b", "classic", 2048),
    "llama-68m": KnownDraft("JackFram/llama-68m", "longchat-7b", "classic", 2048),
}
TARGETS = {
    "demo": "demo-target",
    "vicuna-7b": "lmsys/vicuna-7b-v1.5-16k",
    "longchat-7b": "lmsys/longchat-7b-16k",
}


def locate(name: str, role: Literal["target", "draft"]) -> str:
    """Return where a checkpoint lies: a local directory or a hub id. A directory goes before a hub id of that name.

    Raises:
        ValueError: If `name` is neither a known name, nor a directory, nor could be a hub id.
    """
    table = TARGETS if role == "target" else {key: known.repo for key, known in DRAFTS.items()}
    if name in table:
        bundled = Path(str(files("specx.data"))) / "models" / table[name]
        return table[name] if "/" in table[name] else str(bundled)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return str(path)
    if name and path.exists():
        raise ValueError(f"{role} {name!r} is a file; give the directory that holds config.json")
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        return name
    if "/" in name:
        siblings = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ValueError(f"{role} directory {name!r} does not exist{nearest(path.name, siblings)}")
    if name in DRAFTS or name in TARGETS:
        raise ValueError(f"{name!r} is no {role}: specx models lists which names are drafts and which are targets")
    raise ValueError(
        f"unknown {role} {name!r}{nearest(name, list(table))} "
        f"Known: {', '.join(table)}; or give a directory or a hub id like owner/name"
    )


def known_draft(name: str) -> KnownDraft | None:
    """Return what is known of a draft, by its name or its hub id."""
    return DRAFTS.get(name) or next((known for known in DRAFTS.values() if known.repo == name), None)
