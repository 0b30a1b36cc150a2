"""What the GPU suite measures with: shapes, lengths and models, for a GPU, and small ones that a CPU tries it with."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from specx import kernel_launch
from specx.api import SpeculativeModel, load
from specx.data.prompts import held_out_prompt
from specx.eval import gpu_stand_ins
from specx.eval.bench import OURS, Contender, contenders, copy_bandwidth, copy_bytes, fused
from specx.eval.growth import PAIRS, PairShape, Shape

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Task:
    """One row to measure.

    Attributes:
        name: What it is, unique in its section.
        run: Measures; returns the row's figures.
        kind: Tasks of one kind take about as long as the last of them, by `cost`.
        cost: Its work in any unit that its kind shares.
        about: Seconds to expect where none of its kind has run yet.
        extra: Seconds to expect besides, for what it is the first to need.
    """

    name: str
    run: Callable[[], Row]
    kind: str
    cost: float = 1.0
    about: float = 2.0
    extra: float = 0.0


@dataclass(frozen=True, slots=True)
class Kernels:
    """The three kernels, as `kernel_launch` has them."""

    tree_attention: Callable[..., Any]
    chunk_scores: Callable[..., Any]
    commit_rows: Callable[..., Any]


@dataclass(frozen=True)
class Setup:
    """Sizes of the suite; `dry` says that they are small and that a CPU runs them.

    Attributes:
        lengths: Contexts of steps and of whole generations, ascending.
        nodes: Sizes of the trees that are verified.
        kernel_lengths, kernel_heads, kernel_dim: Of the attention measured alone; heads are (H, G).
        new: Tokens of a generation.
        exact: (prompt tokens, new tokens) of the comparisons with Hugging Face.
        draft_context: What the draft is held to; None: what it was trained for.
        load_seconds: What growing a pair may take.
    """

    dry: bool
    device: torch.device
    dtype: torch.dtype
    pairs: tuple[PairShape, ...]
    lengths: tuple[int, ...]
    nodes: tuple[int, ...]
    kernel_lengths: tuple[int, ...]
    kernel_heads: tuple[tuple[int, int], ...]
    kernel_dim: int
    new: int
    exact: tuple[tuple[int, int], ...]
    repeats: int
    draft_context: int | None
    load_seconds: float
    _found: dict[str, Any] = field(default_factory=dict)

    @property
    def bandwidth(self) -> float:
        """Measured bandwidth of a copy, bytes a second read and written; once a process."""
        if "bandwidth" not in self._found:
            self._found["bandwidth"] = copy_bandwidth(self.device, copy_bytes(self.device) >> (3 * self.dry))
        return self._found["bandwidth"]

    @property
    def kernels(self) -> Kernels:
        """The Triton kernels; where no GPU is, what stands in for them."""
        found = gpu_stand_ins if self.dry else kernel_launch
        return Kernels(found.tree_attention, found.chunk_scores, found.commit_rows)

    def contenders(self) -> dict[str, Contender]:
        """Return the ways of attending on the device, our kernel first."""
        if "contenders" not in self._found:  # each backend is tried first
            self._found["contenders"] = {OURS: fused(self.kernels.tree_attention)} | contenders(self.device)
        return self._found["contenders"]

    def bundled(self, dtype: torch.dtype, graphs: bool | None = None) -> SpeculativeModel:
        """Return the bundled pair on the device."""
        options: dict[str, Any] = {"draft_context": self.draft_context} if self.draft_context else {}
        return load(dtype=dtype, device=self.device, graphs=graphs, profile=False, **options)

    def prompt(self, tokenizer: Any, tokens: int, number: int = 0) -> Tensor:
        """Return `data.prompts.held_out_prompt` on the device, int64 [L]."""
        return torch.tensor(held_out_prompt(tokenizer, tokens, number), device=self.device)


def setup_of(dry: bool) -> Setup:
    """Return the sizes for the GPU at hand, or the small ones for a CPU."""
    if not dry:
        return Setup(
            dry=False, device=torch.device("cuda"), dtype=torch.bfloat16, pairs=PAIRS,
            lengths=(2048, 8192, 15872),  # with the new tokens the last one ends below the target's 16384 positions
            nodes=(1, 16, 64), kernel_lengths=(2048, 8192, 32768, 131072), kernel_heads=((32, 8), (32, 32)),
            kernel_dim=128, new=64, exact=((600, 96), (3000, 96)), repeats=20, draft_context=None, load_seconds=25.0,
        )  # fmt: skip
    # one layer, one head or one unit more than the bundled pair
    target, draft = Shape("tiny", 256, 13, 12, 3, 32, 704, 4160), Shape("tiny draft", 192, 3, 6, 6, 32, 512, 4160)
    return Setup(
        dry=True, device=torch.device("cpu"), dtype=torch.float32, pairs=(PairShape("tiny", target, draft),),
        lengths=(120, 240), nodes=(1, 4), kernel_lengths=(60, 300), kernel_heads=((4, 2), (4, 4)), kernel_dim=32,
        new=8, exact=((160, 6),), repeats=1, draft_context=96, load_seconds=2.0,
    )  # fmt: skip


def free(device: torch.device) -> None:
    """Give back the memory of what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
