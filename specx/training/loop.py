"""The training loop: one process or many, the same losses; killed at any moment, it goes on exactly where it was.

What is learnt is the task's business (`task(*inputs)` is the loss), what from, the course's.
"""

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from rich import progress as bars
from rich.console import Console
from torch import Tensor, nn

from specx.training.state import Progress, load_state, save_state


@dataclass(frozen=True, slots=True)
class Batch:
    """The windows of one step, of all processes together.

    Attributes:
        arrays: One row a window, [B, ...] each; what a process gets of them is a slice.
        shared: Further arguments of the task, the same for all rows.
        tokens: How many it counts for.
    """

    arrays: tuple[np.ndarray, ...]
    shared: tuple[Any, ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class Course:
    """One run over data: a pure function of the step and the tokens done, so that any of its steps can be had again.

    Attributes:
        total: Tokens after which it is over, about.
        batches: (step, tokens done) -> what is left.
        rate: Tokens done -> learning rate.
        seed: Of what the task draws itself.
    """

    total: int
    batches: Callable[[int, int], Iterator[Batch]]
    rate: Callable[[int], float]
    seed: int = 0


def warmup_cosine(rate: float, total: int, warmup: float) -> Callable[[int], float]:
    """Return a learning rate that rises over a share `warmup` of the tokens, then falls to 0 along a cosine."""

    def at(done: int) -> float:
        share = min(done / total, 1.0)
        if share < warmup:
            return rate * (share / warmup * 0.99 + 0.01)
        return rate * 0.5 * (1 + math.cos(math.pi * (share - warmup) / (1 - warmup)))

    return at


class Loop:
    """A task in training.

    Args:
        task: Its parameters are trained; it returns a loss that is a mean over the rows it is given.
        optimizers: Of these parameters.
        folder: Takes states and `log.jsonl`.
        accelerator: Says which process this is.
        rows: Windows a forward; None: all that a process has.
        bf16: Compute in it where autocast does; weights stay as they are.
        clip: Norm that gradients are cut to.
        save_seconds: Between two states.
    """

    def __init__(
        self,
        task: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        folder: Path,
        accelerator: Accelerator,
        rows: int | None = None,
        bf16: bool = False,
        clip: float = 1.0,
        save_seconds: float = 300.0,
    ) -> None:
        self.accelerator, self.folder, self.rows, self.bf16 = accelerator, folder, rows, bf16
        self.clip, self.save_seconds = clip, save_seconds
        folder.mkdir(parents=True, exist_ok=True)
        self.progress = load_state(folder / "states", task, optimizers, accelerator.device)
        self.task, self.optimizers = task, list(optimizers)
        self._prepared: Any = accelerator.prepare(task)
        self._steppers = [accelerator.prepare(each) for each in optimizers]

    def run(
        self,
        course: Course,
        number: int = 0,
        name: str = "",
        measure: Callable[[], dict[str, Any]] | None = None,
        every: int = 0,
    ) -> None:
        """Take the steps that are left of run `number`.

        Args:
            measure: Called by the first process every so many steps and at the end; what it returns goes to the log.
        """
        if number > self.progress.run:
            self.progress = Progress(run=number)
        done = self.progress
        with self._log() as log, self._bar(name, course) as show, _ends_between_steps() as asked:
            saved = time.monotonic()
            for batch in course.batches(done.step, done.tokens):
                row, ends = self._step(course, batch, bool(asked))
                log(row)
                show(row)
                last = done.tokens >= course.total
                if measure is not None and every and (last or done.step % every == 0):
                    log(self._measured(measure))
                if ends or time.monotonic() - saved >= self.save_seconds:
                    self.save()
                    saved = time.monotonic()
                if ends:
                    raise KeyboardInterrupt
        self.save()

    def _step(self, course: Course, batch: Batch, asked: bool) -> tuple[dict[str, Any], bool]:
        """Take one step; return what the log says of it, and whether any process was asked to end."""
        began, done = time.monotonic(), self.progress
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = course.rate(done.tokens)
        # The same draws in a resumed run, and in every process: what differs between these are the rows.
        torch.manual_seed(course.seed * 1_000_003 + done.step)
        loss = self._backward(batch)
        self.accelerator.clip_grad_norm_(self.task.parameters(), self.clip)
        for stepper in self._steppers:
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        done.step, done.tokens = done.step + 1, done.tokens + batch.tokens
        value, ends = self.accelerator.reduce(torch.stack([loss, torch.full_like(loss, asked)]), "mean").tolist()
        if not math.isfinite(value):
            raise RuntimeError(f"the loss became {value} at step {done.step}: lower the learning rate")
        counts = {"run": done.run, "step": done.step, "tokens": done.tokens}
        row = {"length": batch.tokens // len(batch.arrays[0]), "loss": value}
        return counts | row | {"seconds": round(time.monotonic() - began, 2)}, ends > 0

    def _backward(self, batch: Batch) -> Tensor:
        """Add up the gradients of this process's rows; return their mean loss."""
        many, mine = self.accelerator.num_processes, self.accelerator.process_index
        rows = len(batch.arrays[0])
        if rows % many:
            raise ValueError(f"{rows} windows a step cannot be shared evenly by {many} processes")
        count = rows // many
        parts = [torch.from_numpy(each[mine * count : (mine + 1) * count]) for each in batch.arrays]
        size = min(self.rows or count, count)
        total = torch.zeros((), device=self.accelerator.device)
        for first in range(0, count, size):
            some = [each[first : first + size].to(self.accelerator.device) for each in parts]
            waits = first + size < count  # gradients travel once a step
            with self.accelerator.no_sync(self._prepared) if waits else nullcontext():
                with torch.autocast(self.accelerator.device.type, torch.bfloat16, self.bf16):
                    loss = self._prepared(*some, *batch.shared) * (len(some[0]) / count)
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def _measured(self, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.accelerator.is_main_process:
            self.task.eval()
            found = measure()
            self.task.train()
        self.accelerator.wait_for_everyone()
        return {"run": self.progress.run, "step": self.progress.step, "tokens": self.progress.tokens} | found

    def save(self) -> None:
        """Write a state."""
        if self.accelerator.is_main_process:
            save_state(self.folder / "states", self.task, self.optimizers, self.progress)

    @contextmanager
    def _log(self) -> Iterator[Callable[[dict[str, Any]], None]]:
        """Append rows to the log, after cutting off what was logged behind the state that this run starts from."""
        if not self.accelerator.is_main_process:
            yield lambda row: None
            return
        file, at = self.folder / "log.jsonl", (self.progress.run, self.progress.step)
        rows = read_log(file)
        kept = [json.dumps(row) + "\n" for row in rows if (row["run"], row["step"]) <= at]
        file.write_text("".join(kept))
        with file.open("a") as stream:

            def write(row: dict[str, Any]) -> None:
                stream.write(json.dumps(row) + "\n")
                stream.flush()

            yield write

    @contextmanager
    def _bar(self, name: str, course: Course) -> Iterator[Callable[[dict[str, Any]], None]]:
        columns = (
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.TextColumn("{task.percentage:.1f}%"),
            bars.TimeRemainingColumn(),
        )
        with bars.Progress(
            *columns, console=Console(stderr=True), disable=not self.accelerator.is_main_process
        ) as shown:
            bar = shown.add_task(name, total=course.total, completed=self.progress.tokens)
            yield lambda row: shown.update(
                bar, completed=row["tokens"], description=f"{name} step {row['step']} loss {row['loss']:.3f}"
            )


def read_log(file: Path) -> list[dict[str, Any]]:
    """Return the whole rows of a log; a process killed while it wrote leaves part of one."""
    found = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


@contextmanager
def _ends_between_steps() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM, which end a run behind the step that they come in; a second one ends it at once."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # where no signal arrives
        yield asked
        return

    def note(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {each: signal.signal(each, note) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
