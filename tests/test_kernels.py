"""Every kernel against its plain truth in float64, on odd shapes, and what its launcher refuses.

Without a GPU the kernels run in Triton's interpreter, which must be switched on before Triton is imported: the first
test runs this file again in one process with TRITON_INTERPRET=1, and only there (or on a GPU) the others are collected.
"""

import importlib.util
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

from specx import kernel_launch, retrieval
from specx.kernel_launch import (
    attention_plan,
    choose_splits,
    chunk_scores,
    commit_rows,
    naive_chunk_scores,
    naive_commit_rows,
    naive_tree_attention,
    pack_mask,
    tree_attention,
)

ROOT = Path(__file__).resolve().parent.parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
TOLERANCE = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
FP32, FP16, BF16 = TOLERANCE
SEEDS = pytest.mark.parametrize("seed", range(12))


def kernel_test(test: Callable[..., None]) -> Callable[..., None] | None:
    """Hide a test from a process that can run no kernel."""
    return test if INTERPRETED or DEVICE == "cuda" else None


if INTERPRETED:
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    _dot, _patch_tensor = interpreter.InterpreterBuilder.create_dot, interpreter._patch_lang_tensor

    def _widened(handle):
        """The interpreter keeps bfloat16 as its bits and multiplies those; products in float32 are exact."""
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def _patch_tensor_for_new_numpy(tensor, *rest):
        """NumPy 2.4 makes no int of an array of one element any more, which Triton 3.6 asks for in a loop's bounds."""
        _patch_tensor(tensor, *rest)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: _dot(self, _widened(a), _widened(b), *rest)
    interpreter._patch_lang_tensor = _patch_tensor_for_new_numpy
else:

    def test_all_kernels_in_the_interpreter():
        command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "--durations=5", __file__]
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        print(done.stdout)  # noqa: T201
        assert done.returncode == 0, done.stdout + done.stderr
        assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 80


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that nobody has written holds NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(torch.nan))


# Tree attention


@dataclass(frozen=True)
class Case:
    tokens: int
    length: int
    heads: int
    groups: int
    dim: int
    dtype: torch.dtype
    earlier: int = 0  # tail rows before the queries' own
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    splits: int | None = None
    layout: str = "plain"
    batch: int = 1
    spare: int = 37
    seed: int = 0

    def __str__(self) -> str:
        shape = f"T{self.tokens}-L{self.length}-H{self.heads}-G{self.groups}-D{self.dim}-{str(self.dtype)[6:]}"
        extras = {"P+": self.earlier, "W": self.window, "cap": self.softcap, "sinks": self.sinks, "S": self.splits}
        return "-".join([shape, *(f"{name}{value}" for name, value in extras.items() if value), self.layout])


@dataclass
class Given:
    """Arguments of one case; the cache's rows behind the tail hold NaN."""

    query: Tensor
    key: Tensor
    value: Tensor
    length: Tensor
    mask: Tensor
    positions: Tensor
    sinks: Tensor | None


def random_tree(nodes: int, seed: int) -> tuple[Tensor, Tensor]:
    """A tree whose parents are any earlier nodes: ancestors, the node itself included, bool [N, N], and depths [N]."""
    chance = random.Random(seed)
    seen = torch.eye(nodes, dtype=torch.bool)
    for node in range(1, nodes):
        parent = chance.randrange(-1, node)
        if parent >= 0:
            seen[node] |= seen[parent]
    return seen, seen.sum(1) - 1


def empty_cache(case: Case, capacity: int) -> Tensor:
    shape = (case.batch, case.groups, capacity, case.dim)
    options = {"dtype": case.dtype, "device": DEVICE}
    if case.layout == "block":  # one layer of a block for all
        return torch.full((3, *shape), torch.nan, **options)[1]
    if case.layout == "transposed":  # rows before heads
        return torch.full((shape[0], shape[2], shape[1], shape[3]), torch.nan, **options).transpose(1, 2)
    return torch.full(shape, torch.nan, **options)


def given(case: Case) -> Given:
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(case.dtype).to(DEVICE)

    tail = case.earlier + case.tokens
    seen, depths = random_tree(tail, case.seed)
    tail_positions = case.length + depths
    positions = tail_positions[case.earlier :]
    mask = seen[case.earlier :]
    if case.window is not None:
        mask = mask & (positions[:, None] - tail_positions < case.window)
    caches = []
    for _ in range(2):
        cache = empty_cache(case, case.length + tail + case.spare)
        cache[:, :, : case.length + tail] = normal(case.batch, case.groups, case.length + tail, case.dim)
        caches.append(cache)
    return Given(
        query=normal(case.batch, case.tokens, case.heads, case.dim).transpose(1, 2),
        key=caches[0],
        value=caches[1],
        length=torch.tensor([case.length], dtype=torch.int32, device=DEVICE),
        mask=mask.to(DEVICE),
        positions=positions.to(torch.int32).to(DEVICE),
        sinks=normal(case.heads).float() if case.sinks else None,
    )


def attend(case: Case, it: Given, **changes: object) -> tuple[Tensor, Tensor]:
    """The kernel, into poisoned memory."""
    out = torch.full_like(it.query, torch.nan)
    lse = torch.full(it.query.shape[:3], torch.nan, device=DEVICE)
    options = {"window": case.window, "softcap": case.softcap, "splits": case.splits, "out": out, "lse": lse} | changes
    words = pack_mask(it.mask)
    returned = tree_attention(
        it.query, it.key, it.value, it.length, words, it.mask.shape[1],
        scale=case.dim**-0.5, positions=it.positions, sinks=it.sinks, **options,
    )  # fmt: skip
    assert returned[0] is out
    assert returned[1] is lse
    return out, lse


def truth(case: Case, it: Given, length: int | None = None) -> tuple[Tensor, Tensor]:
    return naive_tree_attention(
        it.query.double(), it.key.double(), it.value.double(), case.length if length is None else length, it.mask,
        scale=case.dim**-0.5, positions=it.positions, window=case.window, softcap=case.softcap, sinks=it.sinks,
    )  # fmt: skip


def difference(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference, relative to the norm of what is expected."""
    return ((got.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def assert_same(dtype: torch.dtype, got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert not got[0].isnan().any(), "out holds NaN"
    ratio = difference(got[0], expected[0])
    assert ratio < TOLERANCE[dtype], f"out differs by {ratio:.1e} of its norm"
    torch.testing.assert_close(got[1].double(), expected[1], rtol=1e-5, atol=1e-4 if dtype != FP32 else 1e-5)


CASES = [
    Case(1, 0, 8, 8, 32, FP32),
    Case(1, 1, 4, 1, 256, FP16, layout="block"),
    Case(1, 4097, 8, 1, 128, FP16, splits=16),
    Case(7, 31, 4, 1, 80, FP16, earlier=9),
    Case(7, 0, 8, 1, 96, FP32, earlier=3, layout="transposed"),
    Case(7, 4097, 4, 4, 32, BF16, splits=16, layout="block"),
    Case(63, 31, 8, 1, 96, BF16, earlier=70, layout="block"),
    Case(63, 1, 8, 8, 64, FP16, splits=3),
    Case(64, 4097, 4, 1, 128, BF16, splits=3, layout="transposed"),
    Case(64, 0, 4, 4, 128, FP16, earlier=1, splits=1),
    Case(65, 31, 4, 1, 32, FP32, earlier=64, splits=3),
    Case(65, 1, 1, 1, 80, BF16, earlier=63),
    Case(7, 30, 4, 1, 64, FP16, earlier=90),  # one block of 128 keys holds bits of three words
    Case(7, 130, 4, 2, 64, BF16, batch=2, layout="block"),
    Case(7, 4097, 4, 1, 80, FP32, window=100),
    Case(64, 200, 4, 1, 128, BF16, window=65, earlier=30),
    Case(65, 31, 4, 4, 96, FP16, window=7),
    Case(1, 4097, 4, 4, 32, FP16, window=4000, splits=3),
    Case(7, 63, 8, 1, 128, FP32, softcap=1.5),
    Case(63, 64, 4, 4, 32, BF16, softcap=1.5, earlier=5),
    Case(7, 65, 4, 1, 128, BF16, sinks=True),
    Case(65, 128, 8, 8, 32, FP32, sinks=True, splits=1),
    Case(7, 300, 8, 1, 80, FP16, window=128, softcap=1.5, sinks=True, earlier=66),
    Case(64, 257, 8, 2, 128, BF16, window=128, softcap=1.5, sinks=True, splits=3, layout="block"),
    Case(63, 31, 4, 4, 96, FP32, window=33, softcap=1.5, sinks=True, splits=16, layout="transposed"),
]


@kernel_test
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_equals_its_truth(case):
    it = given(case)
    assert_same(case.dtype, attend(case, it), truth(case, it))


@kernel_test
@SEEDS
def test_attention_on_random_cases(seed):
    chance = random.Random(seed)
    groups = chance.choice([1, 2])
    case = Case(
        tokens=chance.randint(1, 40),
        length=chance.randint(0, 300),
        heads=groups * chance.choice([1, 3, 4]),
        groups=groups,
        dim=chance.choice([32, 64, 80, 128]),
        dtype=chance.choice([FP32, FP16, BF16]),
        earlier=chance.choice([0, chance.randint(1, 100)]),
        window=chance.choice([None, chance.randint(1, 200)]),
        softcap=chance.choice([None, 2.0]),
        sinks=chance.random() < 0.3,
        splits=chance.choice([None, 1, 3, 16]),
        layout=chance.choice(["plain", "block", "transposed"]),
        batch=chance.choice([1, 2]),
        spare=chance.randint(0, 100),
        seed=seed,
    )
    it = given(case)
    assert_same(case.dtype, attend(case, it), truth(case, it))


@kernel_test
@pytest.mark.parametrize("splits", [1, 3, 16])
def test_splits_change_nothing(splits):
    case = Case(7, 200, 4, 2, 32, FP32, earlier=20, window=90, sinks=True)
    it = given(case)
    assert_same(FP32, attend(case, it, splits=splits), truth(case, it))


@kernel_test
def test_one_launch_serves_every_length():
    """Only the tensor that holds the length changes, as between replays of a captured graph."""
    case = Case(7, 200, 4, 2, 64, FP16)
    it = given(case)
    for length in (200, 0, 1, 63, 64, 65, 127):
        it.length.fill_(length)
        it.positions = (it.positions - it.positions.min() + length).to(torch.int32)
        assert_same(FP16, attend(case, it), truth(case, it, length))


@kernel_test
@pytest.mark.parametrize("length", [0, 70])
def test_a_row_that_sees_nothing_is_empty(length):
    """Without prefix, or with a window that ends before it."""
    case = Case(5, length, 4, 2, 32, FP32, window=3, sinks=True)
    it = given(case)
    it.mask[2] = False
    it.positions[2] = length + 100
    out, lse = attend(case, it)
    assert_same(FP32, (out, lse), truth(case, it))
    assert not out[:, :, 2].any()
    assert (lse[:, :, 2] == -torch.inf).all()
    assert lse[:, :, [0, 1, 3, 4]].isfinite().all()


@kernel_test
def test_no_tail_at_all():
    case = Case(3, 50, 4, 2, 32, FP32)
    it = given(case)
    it.mask = it.mask[:, :0]
    assert_same(FP32, attend(case, it), truth(case, it))


@kernel_test
def test_bits_behind_the_tail_mean_nothing():
    case = Case(7, 90, 4, 2, 32, FP32)
    it = given(case)
    words = pack_mask(it.mask) | ~0x7F
    got = tree_attention(it.query, it.key, it.value, it.length, words, 7, scale=case.dim**-0.5)
    assert_same(FP32, got, truth(case, it))


@kernel_test
def test_a_tail_that_ends_with_the_capacity_reads_nothing_beyond():
    case = Case(7, 90, 4, 2, 32, FP32, spare=0, layout="block")
    it = given(case)
    assert_same(FP32, attend(case, it), truth(case, it))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_offsets_beyond_32_bits():
    """Two KV heads that lie 2^31 elements apart."""
    apart = 1 << 31
    case = Case(3, 40, 4, 2, 32, FP16)
    it = given(case)
    for name in ("key", "value"):
        small = getattr(it, name)
        far = torch.zeros(apart + small.stride(1), dtype=FP16, device=DEVICE)
        wide = far.as_strided(small.shape, (small.stride(0), apart, small.stride(2), 1))
        wide.copy_(small)
        setattr(it, name, wide)
    assert_same(FP16, attend(case, it), truth(case, it))


@kernel_test
def test_buffers_are_optional_and_laid_out_for_the_projection():
    case = Case(7, 20, 4, 2, 32, FP32)
    it = given(case)
    words = pack_mask(it.mask)
    out, lse = tree_attention(it.query, it.key, it.value, it.length, words, 7, scale=case.dim**-0.5)
    assert_same(FP32, (out, lse), truth(case, it))
    assert out.transpose(1, 2).is_contiguous()


@kernel_test
@SEEDS
def test_one_wrong_mask_bit_shows(seed):
    """These tests can fail: with any single bit flipped, the kernel is not what the truth says."""
    case = Case(9, 40, 2, 1, 32, BF16, earlier=70, seed=seed)
    it = given(case)
    expected = truth(case, it)
    chance = random.Random(seed)
    row, column = chance.randrange(9), chance.randrange(79)
    it.mask[row, column] ^= True
    out, lse = attend(case, it)
    assert (lse[:, :, row].double() - expected[1][:, :, row]).abs().max() > 1e-3
    with pytest.raises(AssertionError):
        assert_same(BF16, (out, lse), expected)


@kernel_test
@pytest.mark.parametrize("change", [{"window": 51}, {"window": 49}, {"softcap": 2.1}, {"sinks": None}], ids=str)
def test_a_wrong_option_shows(change):
    case = Case(7, 120, 4, 2, 32, FP32, window=50, softcap=2.0, sinks=True)
    it = given(case)
    expected = truth(case, it)
    if "sinks" in change:
        it.sinks = None
        change = {}
    with pytest.raises(AssertionError):
        assert_same(FP32, attend(case, it, **change), expected)


# Masks


@SEEDS
def test_packed_masks(seed):
    generator = torch.Generator().manual_seed(seed)
    rows, tail = random.Random(seed).randint(1, 9), [0, 1, 63, 64, 65, 127, 128, 129, 500, 1024, 7, 190][seed]
    mask = torch.rand(rows, tail, generator=generator) < 0.5
    expected = torch.zeros(rows, -(-tail // 64), dtype=torch.int64)
    for row in range(rows):
        for word in range(expected.shape[1]):
            bits = sum(1 << i for i, seen in enumerate(mask[row, word * 64 : (word + 1) * 64].tolist()) if seen)
            expected[row, word] = bits - (1 << 64) if bits >> 63 else bits
    assert torch.equal(pack_mask(mask), expected)


# Chunk scores


def scored(length, capacity, heads, groups, dim, dtype=FP32, seed=0):
    """Key [G, capacity, D] with NaN from `length` on, query [H, D], and the row's log-sum-exp over the keys [H]."""
    generator = torch.Generator().manual_seed(seed)
    key = torch.full((capacity, groups, dim), torch.nan, dtype=dtype, device=DEVICE).transpose(0, 1)
    key[:, :length] = torch.randn(groups, length, dim, generator=generator).to(dtype).to(DEVICE)
    query = torch.randn(heads, dim, generator=generator).to(dtype).to(DEVICE)
    repeated = key[:, :length].double().repeat_interleave(heads // groups, 0)
    lse = (torch.einsum("hd,hnd->hn", query.double(), repeated) * dim**-0.5).logsumexp(1).float()
    return key, query, lse, torch.tensor([length], dtype=torch.int32, device=DEVICE)


@kernel_test
@pytest.mark.parametrize("heads", ["mean", "max"])
@pytest.mark.parametrize(
    ("length", "chunk_size", "shape", "softcap", "splits"),
    [
        (1000, 32, (8, 2, 64), None, None),
        (1, 32, (4, 4, 128), None, None),
        (64, 32, (4, 1, 80), 1.5, 3),
        (517, 48, (4, 1, 96), None, 3),
        (700, 256, (8, 1, 32), None, 1),
        (300, 100, (2, 2, 256), 1.5, None),
        (77, 1, (3, 1, 32), None, 16),
        (300, 7, (20, 1, 32), None, None),
    ],
)
def test_chunk_scores_equal_retrieval(length, chunk_size, shape, softcap, splits, heads):
    key, query, lse, device_length = scored(length, length + 200, *shape)
    scale = shape[2] ** -0.5
    got = chunk_scores(
        key, query, lse, device_length, scale=scale, softcap=softcap, chunk_size=chunk_size, heads=heads, splits=splits
    )
    expected = retrieval.chunk_scores(key[:, :length], query, lse, scale, softcap, chunk_size, heads)
    assert got.shape == (-(-(length + 200) // chunk_size),)
    torch.testing.assert_close(got[: len(expected)], expected, rtol=1e-5, atol=1e-9)
    assert not got[len(expected) :].any()


@kernel_test
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("chunk_size", [32, 48, 256])
def test_chunk_scores_of_single_heads(dtype, chunk_size):
    key, query, lse, length = scored(700, 1000, 8, 2, 128, dtype)
    got = chunk_scores(key, query, lse, length, scale=0.1, softcap=3.0, chunk_size=chunk_size, heads=None)
    expected = naive_chunk_scores(
        key.double(), query.double(), lse.double(), 700, scale=0.1, softcap=3.0, chunk_size=chunk_size
    )
    torch.testing.assert_close(got[:, : expected.shape[1]].double(), expected, rtol=1e-5, atol=1e-9)
    assert not got[:, expected.shape[1] :].any()


@kernel_test
def test_chunk_scores_of_nothing_are_zero():
    key, query, lse, length = scored(0, 100, 4, 2, 32)
    assert not chunk_scores(key, query, lse.zero_(), length, scale=1.0, chunk_size=32).any()


# Commit


@kernel_test
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize(
    "rows",
    [
        [0],
        [3],
        [0, 1, 2],
        [1, 2, 3, 4],
        [0, 2, 3, 9, 63],
        [1, 3, 4, 5, 6, 7, 8, 40],
        [2, 5, -1, -1],
        list(range(1, 90)),
    ],
    ids=len,
)
def test_commit_moves_rows(rows, dtype):
    """Overlapping moves read what was there, not what another move has just written."""
    generator = torch.Generator().manual_seed(0)
    length, capacity = 5, 120
    blocks = [torch.randn(3, 2, 2, capacity, dim, generator=generator).to(dtype).to(DEVICE) for dim in (32, 80)]
    expected = [naive_commit_rows(block, rows, length) for block in blocks]
    device_rows = torch.tensor(rows, dtype=torch.int32, device=DEVICE)
    commit_rows(*blocks, device_rows, torch.tensor([length], dtype=torch.int32, device=DEVICE))
    assert all(map(torch.equal, blocks, expected))


@kernel_test
def test_commit_in_strided_blocks_touches_nothing_else():
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(4, 1, 50, 3, 40, generator=generator).to(DEVICE) for _ in range(2)]
    views = [each.transpose(2, 3)[1:3, :, :, :, :32] for each in whole]
    expected = [each.clone() for each in whole]
    for each, view in zip(expected, views, strict=True):
        each.transpose(2, 3)[1:3, :, :, :, :32] = naive_commit_rows(view, [1, 4, 5], 7)
    length = torch.tensor([7], dtype=torch.int32, device=DEVICE)
    commit_rows(*views, torch.tensor([1, 4, 5], dtype=torch.int32, device=DEVICE), length)
    assert all(map(torch.equal, whole, expected))


@kernel_test
def test_commit_of_no_rows_changes_nothing():
    block = torch.randn(1, 1, 1, 8, 32, device=DEVICE)
    before, none = block.clone(), torch.empty(0, dtype=torch.float32, device=DEVICE).to(torch.int32)
    commit_rows(block, block, none, torch.tensor([2], dtype=torch.int32, device=DEVICE))
    assert torch.equal(block, before)


# Plans


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("dim", kernel_launch.HEAD_DIMS)
@pytest.mark.parametrize("limit", [99, 163, 227])
def test_plans_fit_the_shared_memory(dim, dtype, limit):
    for rows in (1, 16, 17, 64, 65, 1000):
        plan = attention_plan(dim, rows, dtype, limit << 10)
        assert plan.block_m >= 16
        assert plan.block_n >= 16
        assert plan.shared(1 << (dim - 1).bit_length(), dtype.itemsize) <= limit << 10


def test_splits_fill_the_device_and_never_outnumber_the_blocks():
    assert choose_splits(programs=8, blocks=4096, slots=264) == 32
    assert choose_splits(programs=16, blocks=4096, slots=132) == 8
    assert choose_splits(programs=8, blocks=5, slots=264) == 5
    assert choose_splits(programs=1000, blocks=4096, slots=264) == 1
    assert choose_splits(programs=1, blocks=1 << 20, slots=1 << 20) <= kernel_launch.MAX_SPLITS


# What is refused


GOOD = Case(3, 10, 4, 2, 32, FP32)


def cut(tensor: Tensor) -> Tensor:
    """The same shape with a last stride of 2."""
    return tensor.repeat_interleave(2, -1)[..., ::2]


@kernel_test
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda it: {"query": it.query[0]}, "query must be"),
        (lambda it: {"query": it.query[:, :3]}, "3 query heads cannot share 2"),
        (lambda it: {"query": it.query.expand(2, -1, -1, -1)}, "B 2"),
        (lambda it: {"query": it.query.half()}, "agree in dtype"),
        (lambda it: {"query": cut(it.query)}, "last stride of query"),
        (lambda it: {"query": it.query.repeat(1, 1, 100, 1)}, "T must lie between 1 and 256, got 300"),
        (lambda it: {"key": it.key[..., :16]}, "key and value must both be"),
        (lambda it: {"key": cut(it.key)}, "last stride of the cache"),
        (lambda it: {"query": it.query[..., :31], "key": it.key[..., :31], "value": it.value[..., :31]}, "got 31"),
        (lambda it: {"query": it.query.double(), "key": it.key.double(), "value": it.value.double()}, "float64"),
        (lambda it: {"length": it.length.long()}, "length must be torch.int32"),
        (lambda it: {"length": it.length[0]}, "length must be"),
        (lambda it: {"words": it.mask}, "words must be torch.int64"),
        (lambda it: {"words": pack_mask(it.mask)[:2]}, "words must be"),
        (lambda it: {"tail": 100}, "tail must lie between 0 and"),
        (lambda it: {"window": 0}, "window must be at least 1"),
        (lambda it: {"window": 5, "positions": None}, "needs the positions"),
        (lambda it: {"window": 5, "positions": it.positions.long()}, "positions must be torch.int32"),
        (lambda it: {"sinks": torch.zeros(3, device=DEVICE)}, "sinks must be"),
        (lambda it: {"scale": 0.0}, "scale must be positive"),
        (lambda it: {"softcap": -1.0}, "softcap must be positive"),
        (lambda it: {"splits": 0}, "splits must lie between 1 and"),
        (lambda it: {"out": it.query.half()}, "out must be"),
        (lambda it: {"out": cut(it.query)}, "last stride of out"),
        (lambda it: {"lse": it.query[0]}, "lse must be"),
    ],
)
def test_attention_refuses(change, message):
    it = given(GOOD)
    good = {"query": it.query, "key": it.key, "value": it.value, "length": it.length, "words": pack_mask(it.mask)}
    arguments = good | {"tail": 3, "scale": 1.0, "positions": it.positions} | change(it)
    with pytest.raises(ValueError, match=message):
        tree_attention(**arguments)


@pytest.mark.parametrize("mask", [torch.ones(3, 3), torch.ones(3, dtype=torch.bool)], ids=["float", "vector"])
def test_pack_mask_refuses(mask):
    with pytest.raises(ValueError, match="bool"):
        pack_mask(mask)


@kernel_test
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(2, 20, 64)}, "H a multiple of G"),
        ({"query": torch.zeros(3, 32)}, "H a multiple of G"),
        ({"lse": torch.zeros(4, dtype=torch.float16)}, "lse must be torch.float32"),
        ({"length": torch.zeros(1, dtype=torch.int64)}, "length must be torch.int32"),
        ({"chunk_size": 0}, "chunk_size must lie between 1 and 256, got 0"),
        ({"chunk_size": 257}, "got 257"),
        ({"heads": "median"}, "heads must be mean, max or None"),
        ({"scale": -1.0}, "scale must be positive"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_chunk_scores_refuses(change, message):
    key, query, lse, length = scored(10, 20, 4, 2, 32)
    good = {"key": key, "query": query, "lse": lse, "length": length, "scale": 1.0, "chunk_size": 32}
    moved = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in change.items()}
    with pytest.raises(ValueError, match=message):
        chunk_scores(**(good | moved))


@kernel_test
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": torch.zeros(1, 2, 8, 32)}, "keys and values must be"),
        ({"values": torch.zeros(1, 1, 2, 9, 32)}, "agree but for D"),
        ({"values": torch.zeros(1, 1, 2, 8, 32).half()}, "one dtype"),
        ({"rows": torch.zeros(257, dtype=torch.int32)}, "R at most 256"),
        ({"rows": torch.zeros(2, dtype=torch.int64)}, "rows must be torch.int32"),
        ({"length": torch.zeros(2, dtype=torch.int32)}, "length must be"),
        ({"values": torch.zeros(1, 1, 2, 32, 8)}, "last strides must be 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_commit_refuses(change, message):
    block = torch.zeros(1, 1, 2, 8, 32)
    number = torch.zeros(1, dtype=torch.int32)
    arguments = {"keys": block, "values": block, "rows": number, "length": number} | change
    moved = {name: value.to(DEVICE) for name, value in arguments.items()}
    if "strides" in message:
        moved["values"] = moved["values"].mT
    with pytest.raises(ValueError, match=message):
        commit_rows(**moved)


def test_cpu_tensors_are_refused_outside_the_interpreter():
    if INTERPRETED:
        pytest.skip("the interpreter takes CPU tensors")
    cache, words = torch.zeros(1, 1, 8, 32), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="need tensors on a CUDA device, got cpu"):
        tree_attention(cache[:, :, :1], cache, cache, torch.zeros(1, dtype=torch.int32), words, 1, scale=1.0)
