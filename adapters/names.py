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
        kind: What it is; which adapter loads it is decided by its files.
        draft_context: Positions it was trained for, whatever its config claims; None: not known.
    """

    repo: str
    target: str
    kind: Literal["classic", "eagle", "longspec", "lookup"]
    draft_context: int | None


def _eagle(repo: str, target: str, draft_context: int | None = 2048) -> KnownDraft:
    """EAGLE's own heads were trained on 2048 tokens at most; of the others nothing is known but their configs."""
    return KnownDraft(repo, target, "eagle", draft_context)


def _longspec(name: str, target: str, draft_context: int) -> KnownDraft:
    """Positions shifted by up to 30000, or the target's own, whichever is less, is what they were trained on."""
    return KnownDraft(f"sail/longspec-{name}", target, "longspec", draft_context)


LOOKUP = "lookup"
WEIGHTS = (".pth", ".pt", ".bin", ".safetensors")  # as training programs save a draft without a config
DRAFTS = {
    "demo": KnownDraft("demo-draft", "demo", "classic", 1024),
    "demo-eagle1": _eagle("demo-eagle1", "demo"),
    "demo-eagle3": _eagle("demo-eagle3", "demo"),
    "demo-longspec": KnownDraft("demo-longspec", "demo", "longspec", 16384),
    LOOKUP: KnownDraft("", "demo", "lookup", None),
    "vicuna-68m": KnownDraft("double7/vicuna-68m", "vicuna-7b", "classic", 2048),
    "llama-68m": KnownDraft("JackFram/llama-68m", "longchat-7b", "classic", 2048),
    "eagle-vicuna-7b": _eagle("yuhuili/EAGLE-Vicuna-7B-v1.3", "vicuna-7b-v1.3"),
    "eagle-vicuna-13b": _eagle("yuhuili/EAGLE-Vicuna-13B-v1.3", "vicuna-13b-v1.3"),
    "eagle-vicuna-33b": _eagle("yuhuili/EAGLE-Vicuna-33B-v1.3", "vicuna-33b-v1.3"),
    "eagle-llama2-7b": _eagle("yuhuili/EAGLE-llama2-chat-7B", "llama2-chat-7b"),
    "eagle-llama2-13b": _eagle("yuhuili/EAGLE-llama2-chat-13B", "llama2-chat-13b"),
    "eagle-llama2-70b": _eagle("yuhuili/EAGLE-llama2-chat-70B", "llama2-chat-70b"),
    "eagle-llama3-8b": _eagle("yuhuili/EAGLE-LLaMA3-Instruct-8B", "llama3-8b"),
    "eagle-llama3-70b": _eagle("yuhuili/EAGLE-LLaMA3-Instruct-70B", "llama3-70b"),
    "eagle-llama3.1-8b": _eagle("yuhuili/EAGLE-LLaMA3.1-Instruct-8B", "llama3.1-8b"),
    "eagle-qwen2-7b": _eagle("yuhuili/EAGLE-Qwen2-7B-Instruct", "qwen2-7b"),
    "eagle-qwen2-72b": _eagle("yuhuili/EAGLE-Qwen2-72B-Instruct", "qwen2-72b"),
    "eagle-mixtral-8x7b": _eagle("yuhuili/EAGLE-mixtral-instruct-8x7B", "mixtral-8x7b"),
    "eagle3-vicuna-13b": _eagle("yuhuili/EAGLE3-Vicuna1.3-13B", "vicuna-13b-v1.3"),
    "eagle3-llama3.1-8b": _eagle("yuhuili/EAGLE3-LLaMA3.1-Instruct-8B", "llama3.1-8b"),
    "eagle3-llama3.3-70b": _eagle("yuhuili/EAGLE3-LLaMA3.3-Instruct-70B", "llama3.3-70b"),
    "eagle3-deepseek-r1-llama-8b": _eagle("yuhuili/EAGLE3-DeepSeek-R1-Distill-LLaMA-8B", "deepseek-r1-llama-8b"),
    "eagle3-qwen3-8b": _eagle("RedHatAI/Qwen3-8B-speculator.eagle3", "qwen3-8b", None),
    "eagle3-qwen3-32b": _eagle("AngelSlim/Qwen3-32B_eagle3", "qwen3-32b", None),
    "eagle3-gpt-oss-120b": _eagle("RedHatAI/gpt-oss-120b-speculator.eagle3", "gpt-oss-120b", None),
    "longspec-vicuna-7b": _longspec("vicuna-7b-v1.5-16k", "vicuna-7b", 16384),
    "longspec-vicuna-13b": _longspec("vicuna-13b-v1.5-16k", "vicuna-13b", 16384),
    "longspec-longchat-7b": _longspec("longchat-7b-v1.5-32k", "longchat-7b-32k", 32768),
    "longspec-longchat-13b": _longspec("longchat-13b-16k", "longchat-13b", 16384),
    "longspec-llama3-8b": _longspec("Llama-3-8B-Instruct-262k", "llama3-8b-262k", 32768),
    "longspec-qwq-32b": _longspec("QwQ-32B-Preview", "qwq-32b", 32768),
}
TARGETS = {
    "demo": "demo-target",
    "vicuna-7b": "lmsys/vicuna-7b-v1.5-16k",
    "longchat-7b": "lmsys/longchat-7b-16k",
    "vicuna-13b": "lmsys/vicuna-13b-v1.5-16k",
    "longchat-7b-32k": "lmsys/longchat-7b-v1.5-32k",
    "longchat-13b": "lmsys/longchat-13b-16k",
    "llama3-8b-262k": "gradientai/Llama-3-8B-Instruct-262k",
    "qwq-32b": "Qwen/QwQ-32B-Preview",
    "vicuna-7b-v1.3": "lmsys/vicuna-7b-v1.3",
    "vicuna-13b-v1.3": "lmsys/vicuna-13b-v1.3",
    "vicuna-33b-v1.3": "lmsys/vicuna-33b-v1.3",
    "llama2-chat-7b": "meta-llama/Llama-2-7b-chat-hf",
    "llama2-chat-13b": "meta-llama/Llama-2-13b-chat-hf",
    "llama2-chat-70b": "meta-llama/Llama-2-70b-chat-hf",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama3-70b": "meta-llama/Meta-Llama-3-70B-Instruct",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "llama3.3-70b": "meta-llama/Llama-3.3-70B-Instruct",
    "qwen2-7b": "Qwen/Qwen2-7B-Instruct",
    "qwen2-72b": "Qwen/Qwen2-72B-Instruct",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-32b": "Qwen/Qwen3-32B",
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-Instruct-v0.1",
    "deepseek-r1-llama-8b": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    "gpt-oss-120b": "openai/gpt-oss-120b",
}


def locate(name: str, role: Literal["target", "draft"]) -> str:
    """Return where a checkpoint lies: a local directory, a draft's file of weights, or a hub id.

    What is there goes before a hub id of that name.

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
    if role == "draft" and path.is_file() and path.suffix in WEIGHTS:
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
