"""Peak memory of one method at one context length, in a process of its own, so that no cell counts for the next.

On CUDA it is the most memory allocated; elsewhere the most resident memory, whose mark Linux resets between the loading
and the run (other systems do not, so that there a run that needs less than the loading shows nothing).
"""

import contextlib
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from specx.eval.chosen import Prompt

_STATUS = Path("/proc/self/status")


def measure(loading: dict[str, Any], prompts: list[Prompt], methods: list[str], new: int) -> Iterator[dict[str, Any]]:
    """Yield a row for every prompt and method.

    Args:
        loading: Arguments of `specx.load` (names or directories, plain values).

    Raises:
        RuntimeError: If a process fails; its last line says why.
    """
    for prompt in prompts:
        for method in methods:
            job = {"loading": loading, "ids": prompt.ids.tolist(), "method": method, "new": new}
            done = subprocess.run(
                [sys.executable, "-m", "specx.eval.memory"], input=json.dumps(job), capture_output=True, text=True
            )
            if done.returncode:
                last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
                if done.returncode < 0:  # what was written before tells nothing
                    last = f"killed by signal {-done.returncode} (9: perhaps out of memory)"
                raise RuntimeError(f"measuring the memory of {method} after {prompt.context} tokens failed: {last}")
            found = json.loads(done.stdout.strip().splitlines()[-1])
            yield {"measure": "memory", "prompt": prompt.name, "context": prompt.context, "method": method, **found}


def peak_bytes(cuda: bool) -> int:
    """Return the most memory in use since `reset`, in bytes; `cuda`: on all such devices together."""
    if cuda:
        return sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
    if _STATUS.exists():
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset(cuda: bool) -> int:
    """Forget the peak so far; return the bytes in use now, or the peak where it cannot be forgotten."""
    if cuda:
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)
        return peak_bytes(cuda)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark of resident memory
        return _status("VmRSS")
    return peak_bytes(cuda)


def _status(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Read a job from standard input, run it, write what it took to standard output, or why it failed on one line."""
    try:
        figures = _figures()
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")
    sys.stdout.write(json.dumps(figures) + "\n")


def _figures() -> dict[str, Any]:
    from specx.api import load
    from specx.eval.methods import build, parse_methods

    job = json.load(sys.stdin)
    model = load(**job["loading"])
    methods = build(parse_methods(job["method"]), model)
    method = methods[next(iter(methods))]
    ids = torch.tensor(job["ids"], device=model.engine.device)
    method(ids[-64:], 4)  # what kernels and libraries allocate once
    model.release()  # or the memory of that would count as there before, and as given back
    cuda = ids.is_cuda
    before = reset(cuda)
    run = method(ids, job["new"])
    kept = run.figures.get("draft_kv_tokens")
    return {"before_bytes": before, "peak_bytes": peak_bytes(cuda), "new": len(run.tokens), "draft_kv_tokens": kept}


if __name__ == "__main__":
    main()
