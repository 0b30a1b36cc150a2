"""Times of attention over a long prefix and a tree, beside the time that the same bytes take to copy.

At batch 1 a step reads the weights and the keys and values once, and little else matters: the bandwidth that a plain
copy reaches on the same device is the yardstick, measured, not looked up.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specx.attention import additive, hybrid_tree_attention
from specx.backends import DEVICE_OF, trouble_with
from specx.cuda import GraphPool, synchronize

Row = dict[str, Any]
OURS = "specx"  # the kernel of ours, as tables name it
BASELINE = "sdpa"
_COLD = 1 << 28  # bytes of keys and values to walk through, so that no cache of a GPU holds them from call to call
_MOST_COPIES = 64


@dataclass(frozen=True, slots=True)
class Problem:
    """Attention of `rows` tree nodes over a prefix of `length` tokens and themselves."""

    length: int
    rows: int
    heads: int
    groups: int
    dim: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        return 2 * (self.length + self.rows) * self.groups * self.dim * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Inputs:
    """Tensors of a problem: query [1, H, T, D]; keys and values [n, 1, G, capacity, D], n alike; mask bool [T, T]."""

    problem: Problem
    query: Tensor
    keys: Tensor
    values: Tensor
    length: Tensor
    mask: Tensor


# Brings what does not depend on the layer into form, once; what it returns attends to one key and value buffer.
Contender = Callable[[Inputs], Callable[[Tensor, Tensor], Any]]


def median_ms(run: Callable[[], Any], device: torch.device, repeats: int, warm: int = 2) -> float:
    """Return the median milliseconds of `run`, until its work is done."""
    times = []
    for number in range(warm + repeats):
        synchronize(device)
        began = time.perf_counter()
        run()
        synchronize(device)
        if number >= warm:
            times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def captured(run: Callable[[], Any], device: torch.device) -> Callable[[], Any] | None:
    """Return the replay of a CUDA graph of `run`, which waits for no launch; None where it cannot be captured."""
    if device.type != "cuda":
        return None
    try:
        return GraphPool(device).capture(run).replay
    except RuntimeError:  # a host read, an op that cannot be captured
        return None


def copy_bandwidth(device: torch.device, nbytes: int, repeats: int = 9) -> float:
    """Return the bytes a second that a copy of `nbytes` reads and writes, both counted."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / (median_ms(lambda: target.copy_(source), device, repeats) / 1000)


def copy_bytes(device: torch.device) -> int:
    """Return the size of a copy that no cache holds: 1 GiB, and 64 MiB on a CPU."""
    return 1 << (30 if device.type == "cuda" else 26)


def inputs_of(problem: Problem, device: torch.device, cold: int | None = None) -> Inputs:
    """Make random inputs; `cold` bytes of keys and values in all, by default more than a GPU caches."""
    wanted = (_COLD if device.type == "cuda" else 0) if cold is None else cold
    copies = min(_MOST_COPIES, max(1, -(-wanted // problem.nbytes)))
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, dtype=problem.dtype, device=device, generator=generator)

    shape = (copies, 1, problem.groups, problem.length + problem.rows, problem.dim)
    length = torch.tensor([problem.length], dtype=torch.int32, device=device)
    query = normal(1, problem.heads, problem.rows, problem.dim)
    return Inputs(problem, query, normal(*shape), normal(*shape), length, tree_mask(problem.rows).to(device))


def tree_mask(rows: int) -> Tensor:
    """Return the ancestor mask, bool [T, T], of a tree in which node i hangs below node (i - 1) // 2."""
    seen = torch.eye(rows, dtype=torch.bool)
    for node in range(1, rows):
        seen[node] |= seen[(node - 1) // 2]
    return seen


def contenders(device: torch.device) -> dict[str, Contender]:
    """Return the ways of attending that run on `device`: our kernel, hybrid attention by backend, and Hugging Face's.

    A backend is left out if it is wrong on small inputs. Our kernel needs a GPU.
    """
    found: dict[str, Contender] = {}
    if device.type == "cuda" and find_spec("triton") is not None:
        from specx.kernel_launch import tree_attention

        found[OURS] = fused(tree_attention)
    names = [name for name, kind in DEVICE_OF.items() if kind == device.type and name != "triton"]
    for name in [*names, *(["reference"] if device.type == "cpu" else [])]:
        if trouble_with(name, device) is None:
            found[name] = hybrid(name)
    return found | {BASELINE: sdpa}


def fused(kernel: Callable[..., Any]) -> Contender:
    """Return prefix and tree in one pass, by `kernel_launch.tree_attention` or what stands in for it."""

    def prepare(inputs: Inputs) -> Callable[[Tensor, Tensor], Any]:
        from specx.kernel_launch import pack_mask

        words, rows, scale = pack_mask(inputs.mask), inputs.problem.rows, inputs.problem.dim**-0.5
        return lambda key, value: kernel(inputs.query, key, value, inputs.length, words, rows, scale=scale)

    return prepare


def hybrid(backend: str) -> Contender:
    """Return hybrid tree attention by `backend`: prefix without a mask, tree with one, merged."""

    def prepare(inputs: Inputs) -> Callable[[Tensor, Tensor], Any]:
        problem = inputs.problem
        bias = additive(inputs.mask, problem.dtype) if problem.rows > 1 else None
        options = {"tail_bias": bias, "scale": problem.dim**-0.5, "backend": backend}
        return lambda key, value: hybrid_tree_attention(inputs.query, key, value, problem.length, **options)

    return prepare


def sdpa(inputs: Inputs) -> Callable[[Tensor, Tensor], Any]:
    """PyTorch's attention as transformers calls it for a tree: a 4-D mask, and so heads of keys repeated."""
    problem = inputs.problem
    seen = torch.ones(problem.rows, problem.length, dtype=torch.bool, device=inputs.mask.device)
    mask = torch.cat([seen, inputs.mask], 1)[None, None] if problem.rows > 1 else None
    share, scale = problem.heads // problem.groups, problem.dim**-0.5

    def repeated(each: Tensor) -> Tensor:
        return each if share == 1 else each.repeat_interleave(share, 1)

    return lambda key, value: F.scaled_dot_product_attention(
        inputs.query, repeated(key), repeated(value), attn_mask=mask, scale=scale
    )


def attention_row(
    problem: Problem,
    contender: Contender,
    device: torch.device,
    bandwidth: float,
    repeats: int,
    cold: int | None = None,
) -> Row:
    """Time one way of attending.

    Args:
        bandwidth: Of `copy_bandwidth`, bytes a second.
        cold: As for `inputs_of`.

    Returns:
        ms: of one call, by CUDA graph where that can be; ms_eager: called one by one; bytes: of keys and values;
        share: of the bandwidth that these take in `ms`.
    """
    inputs = inputs_of(problem, device, cold)
    attend = contender(inputs)

    def walk() -> None:
        for key, value in zip(inputs.keys, inputs.values, strict=True):
            attend(key, value)

    eager = median_ms(walk, device, repeats) / len(inputs.keys)
    replay = captured(walk, device)
    ms = median_ms(replay, device, repeats) / len(inputs.keys) if replay else eager
    return {
        "length": problem.length, "rows": problem.rows, "heads": problem.heads, "groups": problem.groups,
        "dim": problem.dim, "dtype": str(problem.dtype).removeprefix("torch."), "ms": ms, "ms_eager": eager,
        "graph": replay is not None, "bytes": problem.nbytes, "share": problem.nbytes / (ms / 1000) / bandwidth,
    }  # fmt: skip
