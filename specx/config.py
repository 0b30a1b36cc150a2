"""Every option, its default and its rule, written once; the command line is generated from these fields.

No torch here: `specx --help` reads this module.
"""

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, Self

Policy = Literal["full", "window", "retrieval", "auto"]


def option(default: Any, text: str, *, low: float | None = None, high: float | None = None, choices: Any = None) -> Any:
    """Declare an option: a dataclass field whose rule and help text travel with it."""
    return field(default=default, metadata={"help": text, "low": low, "high": high, "choices": choices})


class Checked:
    """A frozen dataclass whose fields are checked against their declared rules when it is made."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __post_init__(self) -> None:
        for each in fields(self):
            value = checked(each.name, getattr(self, each.name), each.default, each.metadata)
            object.__setattr__(self, each.name, value)


def checked(name: str, value: Any, default: Any, rule: Any) -> Any:
    """Return `value`, a number as a plain int or float, because transformers takes no 2 for 2.0.

    Raises:
        ValueError: If `value` breaks `rule`, naming the option, the value and what is allowed.
    """
    if value is None and default is None:
        return None
    if rule.get("choices") and value not in rule["choices"]:
        raise ValueError(f"{name} must be one of {', '.join(rule['choices'])}; got {value!r}")
    low, high = rule.get("low"), rule.get("high")
    if low is None and high is None:
        return value
    wants_int = isinstance(low, int)
    number = isinstance(value, Integral if wants_int else Real) and not isinstance(value, bool)
    if not number or abs(value) == math.inf:
        raise ValueError(f"{name} must be {'an integer' if wants_int else 'a number'}; got {value!r}")
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name} must be {bounds}; got {value}")
    return int(value) if wants_int else float(value)


@dataclass(frozen=True, slots=True)
class TreeConfig(Checked):
    """Size of the draft tree. `nodes` counts the root; `depth` d gives d + 1 levels below the root, as in EAGLE-2."""

    nodes: int = option(16, "Nodes of a draft tree, root included; 1 is plain decoding.", low=1, high=256)
    depth: int = option(3, "The tree has depth + 1 levels below its root.", low=0, high=32)
    beam: int = option(4, "Branching: children drafted a node, and nodes expanded a level.", low=1, high=64)
    tree_threshold: float | None = option(
        None, "Stop growing when a level adds less expected tokens than this (OPT-Tree).", low=0.0
    )
    tree_shape: tuple[int, ...] | None = field(
        default=None,
        metadata={
            "help": "Nodes of each level, as in LongSpec: 4,16,16,16,16. All of them are verified; nodes, depth and "
            "beam follow from it."
        },
    )

    def __post_init__(self) -> None:
        if self.tree_shape is not None:
            shape = _levels(self.tree_shape)
            derived = {"tree_shape": shape, "nodes": 1 + sum(shape), "depth": len(shape) - 1, "beam": max(shape)}
            for name, value in derived.items():
                object.__setattr__(self, name, value)
        Checked.__post_init__(self)


def _levels(given: Any) -> tuple[int, ...]:
    """Read a tree's shape: a list of integers, or a text of them with commas or blanks between."""
    parts = given.replace(",", " ").split() if isinstance(given, str) else given
    wrong = f"tree_shape must be positive integers, one a level, such as 4,16,16,16,16; got {given!r}"
    try:
        shape = tuple(int(part) for part in parts)
    except (TypeError, ValueError) as error:
        raise ValueError(wrong) from error
    if not shape or min(shape) < 1 or any(isinstance(part, bool | float) for part in parts):
        raise ValueError(wrong)
    for most, found, what in (
        (64, max(shape), "nodes a level"),
        (255, sum(shape), "nodes"),
        (33, len(shape), "levels"),
    ):
        if found > most:
            raise ValueError(f"tree_shape has {found} {what}; at most {most} are possible")
    return shape


@dataclass(frozen=True, slots=True)
class CacheConfig(Checked):
    """What the draft's key/value cache holds once the context no longer fits `draft_context`."""

    policy: Policy | None = option(
        None,
        "full; window (sinks + recent); retrieval (also what the target attends to); auto (full while it fits, "
        "then retrieval). Default: auto with --use-specextend, else full.",
        choices=("full", "window", "retrieval", "auto"),
    )
    draft_context: int | None = option(
        None, "Positions the draft was trained for. Default: known name, else its config.", low=16
    )
    chunk_size: int = option(32, "Tokens of a chunk that retrieval keeps or drops.", low=1)
    top_chunks: int = option(32, "Chunks that retrieval keeps at most.", low=0)
    retrieve_every: int = option(2, "Verification steps between two retrievals.", low=1)
    sinks: int = option(4, "First tokens of the context that are always kept.", low=0)
    recent: int | None = option(
        None,
        "Newest tokens always kept. Default: all that fits (window), a quarter and what chunks leave (retrieval).",
        low=1,
    )
    refill: Literal["gather", "recompute"] | None = option(
        None,
        "How kept tokens get their keys and values: recompute runs them through the draft again; gather fetches them "
        "from a store of all tokens and turns them to their new positions. Default: gather where the draft's keys can.",
        choices=("gather", "recompute"),
    )
    store: Literal["auto", "host", "device"] = option(
        "auto",
        "Where the store of gather lives; on the device it grows there with the context. auto: there if it takes at "
        "most an eighth of the free memory of a CUDA device.",
        choices=("auto", "host", "device"),
    )
    score_heads: Literal["mean", "max"] = option(
        "mean", "How the target's heads agree on a chunk's score.", choices=("mean", "max")
    )
    score_layer: int | None = option(
        None,
        "Target layer whose attention scores the chunks. Default: the full-attention one nearest to 3/4 of the depth.",
        low=0,
    )


@dataclass(frozen=True, slots=True)
class RoundConfig(Checked):
    """What drafts besides the draft model, and who says what each round may spend."""

    lookup: bool | None = field(
        default=None,
        metadata={"help": "Also draft what followed earlier occurrences. Default: with a draft and --use-specextend."},
    )
    controller: Literal["auto", "off"] | None = option(
        None,
        "auto: each round as plain, from the context, or with the draft, whichever gives most tokens a millisecond; "
        "off: always the whole tree. Default: auto with --use-specextend, else off.",
        choices=("auto", "off"),
    )
    copy_nodes: int = option(
        64,
        "Nodes, where that is more, of a tree from the context alone while a long passage is being copied; only the "
        "controller makes such trees.",
        low=1,
        high=256,
    )


# What measures a draft itself: it alone drafts, its whole tree in every round.
DRAFT_ALONE: dict[str, Any] = {"lookup": False, "controller": "off"}


@dataclass(frozen=True, slots=True)
class SamplingConfig(Checked):
    """How a token is drawn from the target's logits. Temperature 0 is greedy."""

    temperature: float = option(0.0, "0 is greedy.", low=0.0)
    top_k: int | None = option(None, "Sample from the k most likely tokens only.", low=1)
    top_p: float | None = option(None, "Sample from the smallest set with this probability.", low=0.0, high=1.0)
    repetition_penalty: float | None = option(
        None, "Over 1 makes seen tokens less likely. Default: the model's.", low=1e-6
    )
    seed: int = option(0, "Seed of the draws.", low=0, high=2**32 - 1)


@dataclass(frozen=True, slots=True)
class StopConfig(Checked):
    """When a generation ends, besides the target's end-of-text tokens."""

    max_new_tokens: int = option(256, "Tokens to generate at most.", low=1)
    stop: tuple[str, ...] = field(default=(), metadata={"help": "End after this text (may be given several times)."})

    def __post_init__(self) -> None:
        Checked.__post_init__(self)
        given = self.stop or ()
        given = (given,) if isinstance(given, str) or not isinstance(given, Iterable) else tuple(given)
        if self.stop == "" or any(not isinstance(text, str) or not text for text in given):
            raise ValueError(f"stop must be non-empty texts; got {self.stop!r}")
        object.__setattr__(self, "stop", given)


@dataclass(frozen=True, slots=True)
class Settings:
    """All options of one generation, by concern."""

    tree: TreeConfig = field(default_factory=TreeConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    rounds: RoundConfig = field(default_factory=RoundConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    stopping: StopConfig = field(default_factory=StopConfig)
    use_specextend: bool = True

    @property
    def policy(self) -> Policy:
        """The cache policy in force."""
        return self.cache.policy or ("auto" if self.use_specextend else "full")

    @property
    def lookup(self) -> bool:
        """Whether the context drafts beside a draft model."""
        return self.use_specextend if self.rounds.lookup is None else self.rounds.lookup

    @property
    def controlled(self) -> bool:
        """Whether a controller chooses what each round may spend. A tree's shape is meant as it is."""
        wanted = self.use_specextend if self.rounds.controller is None else self.rounds.controller == "auto"
        return wanted and self.tree.tree_shape is None

    @property
    def largest_tree(self) -> int:
        """Nodes of the largest tree there can be."""
        return (
            max(self.tree.nodes, self.rounds.copy_nodes) if self.controlled and self.tree.nodes > 1 else self.tree.nodes
        )

    def override(self, **options: Any) -> Self:
        """Return a copy with flat option names replaced.

        Raises:
            ValueError: An unknown name (the nearest known one is offered) or a value out of its range.
        """
        result = self
        if "use_specextend" in options:
            result = replace(result, use_specextend=bool(options.pop("use_specextend")))
        for concern in ("tree", "cache", "rounds", "sampling", "stopping"):
            part = getattr(result, concern)
            mine = {each.name: options.pop(each.name) for each in fields(part) if each.name in options}
            if mine:
                result = replace(result, **{concern: replace(part, **mine)})
        for name in options:
            parts = (TreeConfig, CacheConfig, RoundConfig, SamplingConfig, StopConfig)
            known = [each.name for part in parts for each in fields(part)] + ["use_specextend"]
            loading = [each.name for each in fields(LoadConfig)]
            if name in loading:
                raise ValueError(f"option {name!r} belongs to load, not to one generation")
            close = nearest(name, known + loading)
            raise ValueError(
                f"unknown option {name!r}{close} Known: {', '.join(known)}; when loading {', '.join(loading)}."
            )
        return result


@dataclass(frozen=True, slots=True)
class LoadConfig(Checked):
    """How checkpoints are loaded and where they run."""

    backend: str = option(
        "auto", "Attention backend.", choices=("auto", "reference", "cpu", "triton", "torch", "flash")
    )
    dtype: str = option("auto", "auto is the checkpoint's.", choices=("auto", "float32", "bfloat16", "float16"))
    device: str | None = option(None, "cpu, cuda, cuda:1, ... Default: cuda where there is one.")
    device_map: str | None = option(None, "auto spreads the target over devices (needs accelerate).", choices=("auto",))
    flash_prefill: bool | None = field(
        default=None, metadata={"help": "Prefill without a mask over the prompt. Default: as --use-specextend."}
    )
    hybrid_attention: bool | None = field(
        default=None, metadata={"help": "Trees by hybrid tree attention. Default: as --use-specextend."}
    )
    pack_weights: bool | None = field(
        default=None,
        metadata={"help": "Copy bfloat16 weights into the layout that a CPU computes with. Default: up to 1 GiB."},
    )
    graphs: bool | None = field(
        default=None,
        metadata={"help": "Steps of static shapes, captured as CUDA graphs. Default: on CUDA, where they can be."},
    )
    profile: bool | None = field(
        default=None,
        metadata={
            "help": "Choose nodes, depth and beam by what specx tune measured. Default: where it has, for these."
        },
    )
    quantization: str | None = option(None, "Of the target (needs bitsandbytes).", choices=("4bit", "8bit"))
    draft_vocab: str | None = option(
        None,
        "Tokens that an EAGLE head which uses the target's LM head may draft: a list of ids (.json, .pt), or a text, "
        "whose most frequent ones are taken.",
    )
    draft_vocab_size: int = option(32768, "Take so many tokens of --draft-vocab at most.", low=1)
    window_alignment: Literal["exact", "reference"] = option(
        "exact",
        "How far back a tree's nodes see in a LongSpec draft: as it was trained, or as LongSpec's own program cuts it.",
        choices=("exact", "reference"),
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that a checkpoint brings."})


def nearest(name: str, known: list[str]) -> str:
    """Return "; did you mean 'x'?" for the closest known name, or "."."""
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]!r}?" if close else "."
