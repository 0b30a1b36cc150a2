"""The process that measures for `specx.eval.gpu`: tasks in turn while there is time, a row on disk for each.

It may die: a fault on a GPU ends everything in its process. The rows stay, and who started it starts another one, which
goes on behind them.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import torch

from specx.cuda import synchronize
from specx.eval import gpu_end_to_end, gpu_kernel, gpu_numbers, gpu_step
from specx.eval.facts import machine_of, version_of
from specx.eval.gpu_rows import Job, Row, append_row, failed_row, read_rows
from specx.eval.gpu_setup import Setup, Task, free, setup_of

SECTIONS: dict[str, Callable[[Setup], Iterator[Task]]] = {
    "numbers": gpu_numbers.tasks,
    "step": gpu_step.tasks,
    "kernel": gpu_kernel.tasks,
    "end-to-end": gpu_end_to_end.tasks,
}
BROKEN = 3  # exit status: the device answers no more, and another process may


class Clock:
    """Guesses how long a task takes, by the last ones of its kind."""

    def __init__(self) -> None:
        self._last: dict[str, list[float]] = {}

    def expect(self, task: Task) -> float:
        """Return the seconds to expect: the most that a unit of cost took among the last three."""
        last = self._last.get(task.kind)
        return task.extra + (max(last) * task.cost if last else task.about)

    def note(self, task: Task, seconds: float) -> None:
        """Take over what a task took."""
        own = max(0.0, seconds - task.extra) / task.cost
        self._last[task.kind] = [*self._last.get(task.kind, []), own][-3:]


def work(job: Job, setup: Setup, say: Callable[[str], None]) -> bool:
    """Run the job's tasks; return whether the device is still well."""
    file, marker = Path(job.rows), Path(job.marker)
    rows = read_rows(file)
    done = {(row["section"], row["name"]) for row in rows if "name" in row}
    if not rows:
        append_row(file, {"section": "facts", **facts(job, setup)})
    for section, deadline in job.sections:
        clock, tasks = Clock(), SECTIONS[section](setup)
        while (task := prepared(section, tasks, file)) is not None:
            if (section, task.name) in done:
                continue
            marker.write_text(json.dumps([section, task.name]), encoding="utf-8")
            row = run_task(section, task, clock, deadline)
            append_row(file, row)
            say(f"{section}: {task.name}: {row['status']} {row.get('message', '')} ({row.get('seconds', 0):.1f} s)")
            uncaptured = row.get("no_graphs") or row.get("draft_no_graphs") or row.get("graph") is False
            if row["status"] == "failed" or (uncaptured and setup.device.type == "cuda"):
                if not healthy(setup.device):
                    return False
                free(setup.device)  # it may have run out of memory
    return True


def facts(job: Job, setup: Setup) -> Row:
    """Return what the numbers depend on."""
    pairs = [f"{pair.name} is {pair.target} with draft {pair.draft}" for pair in setup.pairs]
    return {
        "command": job.command, "specx": version_of(), "machine": machine_of(setup.device),
        "models": "the bundled pair; grown: " + "; ".join(pairs), "dtype": str(setup.dtype).removeprefix("torch."),
        "load average before": f"{os.getloadavg()[0]:.2f} on {os.cpu_count()} cores",
    }  # fmt: skip


def prepared(section: str, tasks: Iterator[Task], file: Path) -> Task | None:
    """Return the section's next task; None at its end, or if its preparation fails, which is a row too."""
    try:
        return next(tasks, None)
    except Exception as error:
        append_row(file, failed_row(section, "its preparation", message_of(error)))
        return None


def run_task(section: str, task: Task, clock: Clock, deadline: float) -> Row:
    """Run one task if there is time for it; whatever it raises becomes a row."""
    expected, began = clock.expect(task), time.time()
    if began + expected > deadline:
        message = f"takes about {expected:.1f} s, and {max(0.0, deadline - began):.1f} s of its budget are left"
        return {"section": section, "name": task.name, "status": "skipped", "message": message}
    try:
        figures = task.run()
    except Exception as error:
        return failed_row(section, task.name, message_of(error), time.time() - began)
    seconds = time.time() - began
    clock.note(task, seconds)
    status = "wrong" if figures.get("ok") is False else "ok"
    return {"section": section, "name": task.name, "status": status, **figures, "seconds": round(seconds, 2)}


def message_of(error: Exception) -> str:
    """Return an error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def healthy(device: torch.device) -> bool:
    """Tell whether the device still computes; after a fault, or a capture that failed, it may not in this process."""
    try:
        synchronize(device)
        torch.rand(1, device=device)  # raises where its generator takes a capture for still under way
        if device.type == "cuda" and torch.cuda.current_stream() != torch.cuda.default_stream():
            return False
        return torch.ones(2, device=device).sum().item() == 2.0
    except RuntimeError:
        return False


def main() -> None:
    """Read a job from standard input and do it."""
    given = json.load(sys.stdin)
    job = Job(**given | {"sections": [(name, deadline) for name, deadline in given["sections"]]})
    well = work(job, setup_of(job.dry), lambda line: click.echo(line, err=True))
    sys.exit(0 if well else BROKEN)


if __name__ == "__main__":
    main()
