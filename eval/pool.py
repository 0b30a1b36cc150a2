"""Several processes of this machine measure at the same time; what a lost one had in hand is done again."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from specx.eval.units import Unit, pack
from specx.eval.workbench import Task

COMMAND = [sys.executable, "-m", "specx.eval.worker"]
ATTEMPTS = 3  # how often one unit may cost a worker its life
Finished = tuple[Unit, list[dict[str, Any]]]


class Pool:
    """Workers, each a process of its own that loads the models.

    Args:
        task: What they measure.
        count: How many.

    Attributes:
        count: As given.
        lost: Workers that ended by themselves.
    """

    def __init__(self, task: Task, count: int) -> None:
        self._task, self.count = _sharing(task, count), count
        self._todo: queue.Queue[tuple[Unit, int] | None] = queue.Queue()
        self._found: queue.Queue[Finished | Exception] = queue.Queue()
        self._processes: set[subprocess.Popen[str]] = set()
        self._lock, self._closed, self.lost = threading.Lock(), False, 0
        self._threads: list[threading.Thread] = []

    def run(self, units: Sequence[Unit]) -> Iterator[Finished]:
        """Yield every unit with its rows, in the order in which they are finished.

        Raises:
            RuntimeError: If a worker reports an error, or a unit has ended `ATTEMPTS` workers.
        """
        for unit in units:
            self._todo.put((unit, 1))
        for index in range(min(self.count, len(units))):
            self._threads.append(threading.Thread(target=self._attend, args=(index,), daemon=True))
            self._threads[-1].start()
        try:
            for _ in units:
                found = self._found.get()
                if isinstance(found, Exception):
                    raise found
                yield found
        finally:
            self.close()

    def close(self) -> None:
        """End all workers."""
        with self._lock:
            self._closed = True
            for process in self._processes:
                process.kill()
        for _ in self._threads:
            self._todo.put(None)
        for thread in self._threads:
            thread.join()
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # what was still to be written to one that is gone
                    pipe.close() if pipe else None

    def _attend(self, index: int) -> None:
        """Feed one worker after the other until there is nothing left."""
        process = None
        try:
            while (item := self._todo.get()) is not None and not self._closed:
                unit, attempt = item
                process = process or self._start(index)
                reply = _asked(process, unit) if process else None
                if self._closed:
                    return
                if reply is None:  # the worker is gone
                    self._again(process.wait() if process else None, unit, attempt)
                    process = None
                elif "error" in reply:
                    raise RuntimeError(reply["error"])
                else:
                    self._found.put((unit, reply["rows"]))
        except Exception as error:
            self._found.put(error)

    def _again(self, status: int | None, unit: Unit, attempt: int) -> None:
        self.lost += 1
        if attempt >= ATTEMPTS:
            raise RuntimeError(
                f"{unit.measure} after {unit.context} tokens ended {ATTEMPTS} workers (the last with status {status}; "
                "-9: perhaps out of memory): give fewer --workers"
            )
        self._todo.put((unit, attempt + 1))

    def _start(self, index: int) -> "subprocess.Popen[str] | None":
        with self._lock:
            if self._closed:
                return None
            # a session of its own, so that Ctrl-C reaches only the process that writes the summary
            process = subprocess.Popen(
                COMMAND, env=os.environ | _device(index),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
            )  # fmt: skip
            self._processes.add(process)
        _send(process, asdict(self._task))
        return process


def _sharing(task: Task, count: int) -> Task:
    """Return the task for processes that share this machine's cores; each sees one accelerator at most."""
    loading = dict(task.loading)
    if str(loading.get("device")).startswith("cuda"):
        loading["device"] = "cuda"
    return replace(task, loading=loading, shared=count, threads=max(1, (os.cpu_count() or 1) // count))


def _device(index: int) -> dict[str, str]:
    """Return the environment that gives a worker one accelerator of several."""
    import torch

    count = torch.cuda.device_count()
    if count < 2:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[index % count]}


def _asked(process: "subprocess.Popen[str]", unit: Unit) -> dict[str, Any] | None:
    """Return a worker's answer; None if it is gone."""
    _send(process, pack(unit))
    assert process.stdout is not None
    line = process.stdout.readline()
    return json.loads(line) if line.endswith("\n") else None


def _send(process: "subprocess.Popen[str]", message: dict[str, Any]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(OSError):  # it is gone; reading will tell
        process.stdin.write(json.dumps(message) + "\n")
        process.stdin.flush()
