"""Compile every kernel for real GPUs, on a machine without one, and read what the compiler made of it.

The launchers run on meta tensors with their kernels replaced by recorders, so what is compiled is exactly what would be
launched. For sm_90 that is every kernel x dtype x head dim; for sm_80 and sm_100 a selection, to stay within a minute.
`python tests/test_kernel_compile.py` prints the table.
"""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
HALF = {torch.bfloat16: "bf16", torch.float16: "fp16"}
NAMES = HALF | {torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
DIMS = (32, 64, 80, 96, 128, 256)
HEADER = "  arch kernel            dtype    D  rows options       registers  spilled  shared KiB"
meta = partial(torch.empty, device="meta")


@dataclass(frozen=True)
class Case:
    """One launch: `rows` tree nodes with four query heads a KV head, for tree attention."""

    arch: int
    kernel: str
    dtype: torch.dtype
    dim: int
    rows: int = 1
    extras: bool = False  # window, softcap and sinks: what costs most registers

    def label(self) -> str:
        options = "win,cap,sinks" if self.extras else ""
        name = self.kernel.removesuffix("_kernel")
        return f"sm_{self.arch:<3} {name:<17} {NAMES[self.dtype]:<5} {self.dim:>4} {self.rows:>5} {options:<13}"


def cases() -> Iterator[Case]:
    for dim in DIMS:
        for dtype in (*HALF, torch.float32):
            yield Case(90, "tree_attention_kernel", dtype, dim, 64, extras=True)
            for kernel in ("merge_splits_kernel", "chunk_scores_kernel", "commit_rows_kernel"):
                yield Case(90, kernel, dtype, dim)
        yield Case(90, "tree_attention_kernel", torch.bfloat16, dim, 1)
    for dim in (64, 128):
        for rows in (4, 16, 64):
            yield Case(90, "tree_attention_kernel", torch.bfloat16, dim, rows)
        yield Case(90, "tree_attention_kernel", torch.bfloat16, dim, 16, extras=True)
    for arch in (80, 100):
        for dim, rows in ((80, 64), (128, 1), (128, 64)):
            yield Case(arch, "tree_attention_kernel", torch.bfloat16, dim, rows, extras=True)
        for kernel in ("merge_splits_kernel", "chunk_scores_kernel", "commit_rows_kernel"):
            yield Case(arch, kernel, torch.bfloat16, 128)


def launch(case: Case) -> None:
    """Call the launcher that leads to the case's kernel."""
    from specx import kernel_launch

    length, capacity, groups, share = meta(1, dtype=torch.int32), 1 << 17, 8, 4
    softcap, window = (50.0, 4096) if case.extras else (None, None)
    cache = meta(1, groups, capacity, case.dim, dtype=case.dtype)
    if case.kernel == "chunk_scores_kernel":
        query, lse = meta(groups * share, case.dim, dtype=case.dtype), meta(groups * share)
        kernel_launch.chunk_scores(cache[0], query, lse, length, scale=0.1, softcap=softcap, chunk_size=32)
    elif case.kernel == "commit_rows_kernel":
        kernel_launch.commit_rows(cache[None], cache[None], meta(16, dtype=torch.int32), length)
    else:
        query = meta(1, case.rows, groups * share, case.dim, dtype=case.dtype).transpose(1, 2)
        words = meta(case.rows, -(-case.rows // 64), dtype=torch.int64)
        options = {
            "positions": meta(case.rows, dtype=torch.int32),
            "sinks": meta(groups * share, dtype=case.dtype) if case.extras else None,
        }
        kernel_launch.tree_attention(
            query, cache, cache, length, words, case.rows, scale=0.1, softcap=softcap, window=window, **options
        )


class Recorder:
    """Stands in for a kernel and keeps what it was launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.given = kernel, {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.record

    def record(self, *args: Any, **options: Any) -> None:
        self.given = dict(zip(self.kernel.arg_names, args, strict=False)) | options

    def compiled(self, arch: int) -> Any:
        """Compile as Triton's launcher would: 16-divisible arguments are marked, ones are constants."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature, constants, attributes = {}, {}, {}
        for number, parameter in enumerate(self.kernel.params):
            value, name = self.given.pop(parameter.name), parameter.name
            divisible = isinstance(value, torch.Tensor)
            if divisible:
                signature[name] = "*" + NAMES[value.dtype]
            elif parameter.is_constexpr or (value == 1 and not parameter.do_not_specialize):
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if abs(value) < 1 << 31 else "i64"
                divisible = value % 16 == 0 and not parameter.do_not_specialize
            if divisible:
                attributes[(number,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=self.given)


def measure(case: Case) -> tuple[int, int, int]:
    """Return the registers a thread uses, the bytes it spills and the bytes of shared memory of a program."""
    import triton

    from specx import kernel_attention, kernel_commit, kernel_scores

    launchers = {
        kernel_attention: ("tree_attention_kernel", "merge_splits_kernel"),
        kernel_scores: ("chunk_scores_kernel",),
        kernel_commit: ("commit_rows_kernel",),
    }
    recorders: dict[str, Recorder] = {}
    with pytest.MonkeyPatch.context() as patch:
        for module, names in launchers.items():
            for name in names:
                recorders[name] = Recorder(getattr(module, name))
                patch.setattr(module, name, recorders[name])
            if hasattr(module, "limits_of"):
                patch.setattr(module, "limits_of", lambda device: (132, SHARED_LIMIT[case.arch]))
        launch(case)
    compiled = recorders[case.kernel].compiled(case.arch)
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(cuobjdump), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return int(registers), int(stack), compiled.metadata.shared


def problem(case: Case, spilled: int, shared: int) -> str:
    """Say what is wrong with a compiled kernel; empty where nothing is."""
    if shared > SHARED_LIMIT[case.arch]:
        return "does not fit shared memory"
    return "spills" if spilled and case.dtype in HALF and case.dim <= 128 else ""


def main() -> int:
    """Print the table; return how many kernels are not as they must be."""
    failures = 0
    print(HEADER)  # noqa: T201
    for case in cases():
        registers, spilled, shared = measure(case)
        wrong = problem(case, spilled, shared)
        failures += bool(wrong)
        print(f"  {case.label()} {registers:>9} {spilled:>8} {shared / 1024:>11.1f}  {wrong}", flush=True)  # noqa: T201
    return failures


def test_kernels_compile_without_spills(tmp_path):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "error::UserWarning:triton.*", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(done.stdout)  # noqa: T201
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 1 + len(list(cases()))


def test_a_spill_and_too_much_shared_memory_are_seen():
    case = Case(90, "tree_attention_kernel", torch.bfloat16, 128)
    assert problem(case, 0, 227 << 10) == ""
    assert problem(case, 8, 0) == "spills"
    assert problem(case, 0, (227 << 10) + 1) == "does not fit shared memory"


if __name__ == "__main__":
    sys.exit(main())
