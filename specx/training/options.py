"""Every option of `specx train`, its default and its rule. No torch here: `specx train --help` reads this module."""

from dataclasses import dataclass, field
from typing import Literal

from specx.config import Checked, option


@dataclass(frozen=True, slots=True)
class TrainConfig(Checked):
    """What all kinds of training share. A step's windows are those of all processes together."""

    steps: int = option(2000, "Steps to take.", low=1)
    length: int = option(1024, "Tokens of a window.", low=64)
    batch: int = option(8, "Windows a step, over all processes.", low=1)
    rows: int | None = option(None, "Windows a forward; a step adds up several. Default: all of a process.", low=1)
    learning_rate: float = option(5e-4, "The highest.", low=0.0)
    warmup: float = option(
        0.1, "Share of the steps in which it rises; then it falls along a cosine.", low=0.0, high=0.9
    )
    weight_decay: float = option(0.1, "Of AdamW.", low=0.0)
    precision: Literal["auto", "float32", "bf16"] = option(
        "auto",
        "What is computed in; weights stay float32. auto: bf16 on CUDA, float32 elsewhere.",
        choices=("auto", "float32", "bf16"),
    )
    seed: int = option(42, "Of weights, windows and draws.", low=0, high=2**31 - 1)
    save_seconds: float = option(300.0, "Seconds between two saved states.", low=0.0)
    feature_cache: str | None = option(
        None, "Folder for what the target gives for a window, read by later trainings on the same windows."
    )
    feature_cache_size: float = option(10.0, "GiB at most; then nothing more is written there.", low=0.0)
    measure_every: int = option(200, "Steps between two measurements of acceptance on held-out text; 0: none.", low=0)
    measure_prompts: int = option(4, "Prompts of a measurement.", low=1)
    measure_context: int = option(512, "Tokens of each.", low=8)
    measure_tokens: int = option(64, "Tokens generated after each.", low=2)


@dataclass(frozen=True, slots=True)
class LongSpecConfig(Checked):
    """What `specx train longspec` adds."""

    anchor_offset: bool | None = field(
        default=None, metadata={"help": "Shift a window's tokens, but for 0 to 4 first ones, far ahead. Default: on."}
    )
    noisy: bool | None = field(
        default=None,
        metadata={"help": "Read the target a random 1 to --lag tokens late; off: always 1. Default: on."},
    )
    lag: int = option(4, "The most; a tree of n levels reads up to n tokens late.", low=1, high=33)
    distill: bool = field(
        default=False, metadata={"help": "Learn the target's distribution, not the text's next token."}
    )
    intermediate: int | None = option(None, "Width of the MLP. Default: the target's.", low=1)


@dataclass(frozen=True, slots=True)
class Eagle3Config(Checked):
    """What `specx train eagle3` adds."""

    unrolled: int = option(3, "Steps of the training-time test.", low=1, high=8)
    draft_vocabulary: int | None = option(
        None, "Tokens the head can draft: the most frequent ones of the data. Default: all.", low=16
    )
    intermediate: int | None = option(None, "Width of the MLP. Default: the target's.", low=1)


@dataclass(frozen=True, slots=True)
class ClassicConfig(Checked):
    """What `specx train classic` adds: a small Llama on the target's tokenizer."""

    hidden: int = option(768, "Width.", low=8)
    layers: int = option(2, "Layers.", low=1)
    heads: int = option(12, "Attention heads.", low=1)
    kv_heads: int | None = option(None, "Key/value heads. Default: as many.", low=1)
    intermediate: int | None = option(None, "Width of the MLP. Default: 8/3 of the width.", low=1)
    positions: int | None = option(None, "Positions that it declares. Default: --length.", low=64)
    distill: bool = field(
        default=False, metadata={"help": "Learn the target's distribution, not the text's next token."}
    )
