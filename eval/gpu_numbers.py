"""GPU suite, numbers: kernels against float64, backends against plain products, outputs against Hugging Face's."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specx.api import SpeculativeModel
from specx.backends import DEVICE_OF, trouble_with
from specx.eval.bench_step import graph_trouble
from specx.eval.gpu_setup import Row, Setup, Task, free
from specx.eval.methods import build, huggingface, parse_methods
from specx.eval.speed import compared
from specx.kernel_launch import naive_chunk_scores, naive_commit_rows, naive_tree_attention, pack_mask

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Largest error of an output over its largest value: rounding of the weights and of the output, and some room.
ALLOWED = {FP32: 2e-5, FP16: 2e-3, BF16: 1.6e-2}
ALLOWED_LSE, ALLOWED_SCORES = 2e-4, 1e-4
Truths = dict[tuple[torch.dtype, int, int], list[int]]  # by dtype, prompt tokens and number of the prompt
MARGIN = 1e-4  # where Hugging Face's two best logits are nearer, float32 outputs may part


@dataclass(frozen=True, slots=True)
class Case:
    """Tree attention of T queries over L committed rows, `earlier` tail rows and their own."""

    tokens: int
    length: int
    heads: int
    groups: int
    dim: int
    dtype: torch.dtype
    earlier: int = 0
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    splits: int | None = None

    def __str__(self) -> str:
        extras = {"earlier": self.earlier, "window": self.window, "cap": self.softcap, "sinks": self.sinks or None,
                  "splits": self.splits}  # fmt: skip
        shape = f"T{self.tokens} L{self.length} H{self.heads}/{self.groups} D{self.dim} {str(self.dtype)[6:]}"
        return " ".join([shape, *(f"{name}={value}" for name, value in extras.items() if value)])


CASES = (
    Case(1, 4097, 32, 8, 128, BF16),
    Case(16, 2048, 32, 8, 128, BF16),
    Case(64, 16384, 32, 8, 128, BF16),
    Case(64, 2048, 32, 32, 128, BF16),
    Case(16, 2048, 32, 32, 128, FP16, earlier=40),
    Case(16, 3000, 8, 2, 32, FP32, earlier=5),
    Case(7, 0, 8, 2, 32, BF16, earlier=3),
    Case(7, 300, 8, 1, 64, BF16, earlier=90, window=128, softcap=30.0, sinks=True),
    Case(65, 31, 4, 4, 80, FP16, earlier=63),
    Case(63, 1000, 8, 4, 96, BF16, window=65),
    Case(16, 4097, 4, 1, 256, BF16, splits=16),
    Case(130, 257, 8, 2, 64, FP32, softcap=1.5, splits=3),
    Case(4, 513, 6, 6, 128, BF16, earlier=12),
    Case(4, 513, 6, 6, 128, FP32, earlier=12),
)
SCORES = ((15872, 32, 8, 128, BF16, 32), (5000, 32, 32, 128, BF16, 32), (1000, 8, 2, 32, FP32, 48),
          (777, 8, 1, 256, FP16, 100))  # fmt: skip
COMMITS: tuple[list[int], ...] = ([0, 2, 3, 9, 63], [1, 3, 4, 5, 40, -1, -1], list(range(1, 90)))


def tasks(setup: Setup) -> Iterator[Task]:
    """Yield what is to be checked, most wanted first."""
    for name in (name for name, kind in DEVICE_OF.items() if kind == setup.device.type):
        yield Task(f"backend {name}", partial(_backend, setup, name), "backend", about=5.0)
    for case in CASES[5::3] if setup.dry else CASES:
        yield Task(f"tree_attention {case}", partial(_attention, setup, case), "attention", about=6.0)
    for shape in SCORES[2:] if setup.dry else SCORES:
        length, heads, groups, dim, dtype, size = shape
        name = f"chunk_scores L{length} H{heads}/{groups} D{dim} {str(dtype)[6:]} chunk={size}"
        yield Task(name, partial(_scores, setup, *shape), "scores", about=6.0)
    for dtype in (FP32, BF16):
        for rows in COMMITS:
            run = partial(_commit, setup, rows, dtype)
            yield Task(f"commit_rows {len(rows)} {str(dtype)[6:]}", run, "commit", about=4.0)
    truths: Truths = {}  # Hugging Face's outputs
    for dtype, graphs in ((FP32, True), (FP32, False), (setup.dtype, None)):
        yield from _exactness(setup, dtype, graphs, truths)
    free(setup.device)


def _backend(setup: Setup, name: str) -> Row:
    trouble = trouble_with(name, setup.device)
    absent = trouble is not None and "not installed" in trouble
    return {"check": "backend", "ok": None if absent else trouble is None, "trouble": trouble}


def _exactness(setup: Setup, dtype: torch.dtype, graphs: bool | None, truths: Truths) -> Iterator[Task]:
    found: list[SpeculativeModel] = []

    def model() -> SpeculativeModel:
        if not found:
            found.append(setup.bundled(dtype, graphs))
        return found[0]

    form = {True: "graphs", False: "eager", None: "as chosen"}[graphs]
    for method in ("full", "window", "auto"):
        for place, (tokens, new) in enumerate(setup.exact):
            yield Task(
                f"output {method} {str(dtype).removeprefix('torch.')} {form} after {tokens}",
                partial(_output, setup, model, method, tokens, new, truths),
                f"output {graphs}", cost=new, about=20.0, extra=5.0 * (place == 0 and not found),
            )  # fmt: skip


def _output(setup: Setup, model: Any, method: str, tokens: int, new: int, truths: Truths) -> Row:
    """Compare greedy outputs after a few prompts with `model.generate`."""
    pair: SpeculativeModel = model()
    small: Any = pair.draft
    ours, theirs = build(parse_methods(method), pair)[method], huggingface(pair, {})
    exact, found = pair.engine.dtype == FP32, []
    for number in range(2 if exact else 4):
        ids = setup.prompt(pair.tokenizer, tokens, number)
        if (pair.engine.dtype, tokens, number) not in truths:
            truths[pair.engine.dtype, tokens, number] = theirs(ids, new).tokens
        truth = truths[pair.engine.dtype, tokens, number]
        found.append(compared(pair, ids, ours(ids, new).tokens, truth))
    margins = [each["margin"] for each in found if not each["same"]]
    wrong = [margin for margin in margins if margin >= MARGIN]
    return {
        "check": "output", "method": method, "same": len(found) - len(margins), "of": len(found),
        "error": max(margins, default=0.0), "allowed": MARGIN if exact else None, "ok": not wrong if exact else None,
        "first_difference": min((each["divergence"] for each in found if not each["same"]), default=None),
        "backend": pair.engine.backend, "backend_reason": pair.engine.backend_reason,
        "no_graphs": graph_trouble(pair.engine), "draft_no_graphs": graph_trouble(small.model),
        "dtype": str(pair.engine.dtype).removeprefix("torch."),
    }  # fmt: skip


def _attention(setup: Setup, case: Case) -> Row:
    generator, device = torch.Generator().manual_seed(0), setup.device

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device, case.dtype)

    tail = case.earlier + case.tokens
    seen = _random_tree(tail)
    places = case.length + seen.sum(1) - 1
    mask, positions = seen[case.earlier :], places[case.earlier :]
    if case.window is not None:
        mask = mask & (positions[:, None] - places < case.window)
    query = normal(1, case.tokens, case.heads, case.dim).transpose(1, 2)
    key, value = (normal(1, case.groups, case.length + tail + 37, case.dim) for _ in range(2))
    for each in (key, value):
        each[:, :, case.length + tail :] = torch.nan  # what was never written must not be read
    sinks = normal(case.heads).float() if case.sinks else None
    options = {"scale": case.dim**-0.5, "window": case.window, "softcap": case.softcap, "sinks": sinks}
    mask = mask.to(device)
    true_out, true_lse = naive_tree_attention(
        query.double(), key.double(), value.double(), case.length, mask, positions=positions.to(device), **options
    )
    out, lse = setup.kernels.tree_attention(
        query, key, value, torch.tensor([case.length], dtype=torch.int32, device=device), pack_mask(mask), tail,
        positions=positions.to(device, torch.int32), splits=case.splits, **options,
    )  # fmt: skip
    error, error_lse = _relative(out, true_out), (lse.double() - true_lse).abs().max().item()
    allowed = ALLOWED[case.dtype]
    return {
        "check": "tree_attention", "error": error, "allowed": allowed, "error_lse": error_lse,
        "ok": error <= allowed and error_lse <= ALLOWED_LSE,
    }  # fmt: skip


def _scores(setup: Setup, length: int, heads: int, groups: int, dim: int, dtype: torch.dtype, size: int) -> Row:
    generator, device, scale = torch.Generator().manual_seed(0), setup.device, dim**-0.5
    key = torch.full((groups, length + 200, dim), torch.nan, dtype=dtype, device=device)
    key[:, :length] = torch.randn(groups, length, dim, generator=generator).to(device, dtype)
    query = torch.randn(heads, dim, generator=generator).to(device, dtype)
    repeated = key[:, :length].double().repeat_interleave(heads // groups, 0)
    lse = ((repeated @ query.double()[:, :, None])[:, :, 0] * scale).logsumexp(1).float()
    wide = key.double(), query.double(), lse.double()
    expected = naive_chunk_scores(*wide, length, scale=scale, chunk_size=size)
    on_device = torch.tensor([length], dtype=torch.int32, device=device)
    got = setup.kernels.chunk_scores(key, query, lse, on_device, scale=scale, chunk_size=size, heads=None)
    used = expected.shape[1]
    error = max(_relative(got[:, :used], expected), got[:, used:].abs().max().item())
    return {"check": "chunk_scores", "error": error, "allowed": ALLOWED_SCORES, "ok": error <= ALLOWED_SCORES}


def _commit(setup: Setup, rows: list[int], dtype: torch.dtype) -> Row:
    generator, length = torch.Generator().manual_seed(0), 5
    blocks = [torch.randn(3, 1, 2, 120, 128, generator=generator).to(setup.device, dtype) for _ in range(2)]
    expected = [naive_commit_rows(block, rows, length) for block in blocks]
    numbers = [torch.tensor(each, dtype=torch.int32, device=setup.device) for each in (rows, [length])]
    setup.kernels.commit_rows(*blocks, *numbers)
    error = max((got.double() - true.double()).abs().max().item() for got, true in zip(blocks, expected, strict=True))
    return {"check": "commit_rows", "error": error, "allowed": 0.0, "ok": error == 0.0}


def _relative(got: Tensor, expected: Tensor) -> float:
    """Return the largest error over the largest value; infinite if there is a NaN."""
    error = ((got.double() - expected).abs().max() / expected.abs().max()).item()
    return error if error == error else float("inf")


def _random_tree(nodes: int) -> Tensor:
    """Return ancestors, the node itself included, bool [N, N], of a tree whose parents are any earlier nodes."""
    chance, seen = random.Random(nodes), torch.eye(nodes, dtype=torch.bool)
    for node in range(1, nodes):
        parent = chance.randrange(-1, node)
        if parent >= 0:
            seen[node] |= seen[parent]
    return seen
