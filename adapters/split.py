"""Loading one target into several processes: which targets, drafts and options allow it, and how it is asked for."""

import inspect
from typing import Any

from transformers import AutoConfig
from transformers.distributed import DistributedConfig

from specx.adapters.weights import kind_of
from specx.config import LoadConfig

_KEYS = ("k_proj", "qkv_proj", "query_key_value")  # layers whose outputs hold an attention's keys


def check_ranks(config: LoadConfig) -> None:
    """Raise ValueError if an option says otherwise where torchrun splits the target over processes."""
    for option, value in (
        ("--device", config.device),
        ("--device-map", config.device_map),
        ("--quantization", config.quantization),
        ("--graphs", config.graphs),
    ):
        if value:
            raise ValueError(f"{option} does not go with torchrun, which gives each process a device: leave it away")


def check_split(
    target: Any, where: str | None, draft: Any, draft_where: str | None, size: int, trust_remote_code: bool
) -> bool:
    """Tell whether the draft reads the target's LM head, of which each of `size` processes will hold a part.

    Args:
        target, draft: As the user named them; `where`, `draft_where` are their directories.

    Raises:
        ValueError: If the processes cannot hold the target together, or the draft reads its keys and values.
    """
    if where is None:
        raise ValueError("a live target cannot be split over processes: give a name or a directory")
    reason = unsplittable(AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code), size)
    if reason:
        raise ValueError(
            f"target {target} cannot be split over {size} processes: {reason}; start another number of them, or one "
            "with --device-map auto"
        )
    kind = kind_of(draft_where) if draft_where is not None else "classic"
    if kind == "longspec":
        raise ValueError(
            f"draft {draft} reads the target's keys and values, of which each process holds a part: use another draft, "
            "or one process with --device-map auto"
        )
    return kind == "eagle"


def unsplittable(config: Any, size: int) -> str | None:
    """Return why a model of this config cannot be split over `size` processes; None if nothing speaks against it."""
    text = config.get_text_config(decoder=True)
    plan = getattr(text, "base_model_tp_plan", None)
    if not plan:
        return f"transformers has no tensor-parallel plan for {text.model_type}"
    by_heads = any(name.rsplit(".", 1)[-1] in _KEYS and style == "colwise" for name, style in plan.items())
    query = text.num_attention_heads
    for count, what in ((query, "attention heads"), (getattr(text, "num_key_value_heads", query), "key/value heads")):
        if by_heads and count % size:
            return f"its {count} {what} cannot be shared among {size} processes"
    return None


def split_options(ranks: int) -> dict[str, Any]:
    """Return what `from_pretrained` takes to share a model among so many processes by its own plan."""
    if ranks == 1:
        return {}
    if "tp_size" in inspect.signature(DistributedConfig).parameters:
        return {"distributed_config": DistributedConfig(tp_size=ranks)}
    return {"tp_plan": "auto"}  # of all processes; what transformers took before
