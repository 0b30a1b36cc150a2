"""One worker: reads a task and then units from standard input, answers each with its rows; JSON lines both ways."""

import json
import os
import sys
from typing import Any, TextIO

from specx.eval.units import Unit, unpack
from specx.eval.workbench import Task, Workbench


def start(task: Task) -> Workbench:
    """Load what a task names."""
    import torch
    from transformers.utils import logging

    from specx.api import load

    logging.set_verbosity_error()
    if task.threads is not None:
        torch.set_num_threads(task.threads)
    return Workbench(task, load(**task.loading))


def answer(bench: Workbench, unit: Unit) -> dict[str, Any]:
    """Return {"rows": ...} or, on one line, {"error": ...}."""
    try:
        return {"rows": list(bench.rows(unit))}
    except Exception as error:
        return {"error": f"{unit.measure} after {unit.context} tokens: {type(error).__name__}: {_line(error)}"}


def main() -> None:
    """Answer until standard input ends."""
    replies = _only_for_replies()
    task = json.loads(sys.stdin.readline())
    try:
        bench = start(Task(**task | {"methods": tuple(task["methods"])}))
    except Exception as error:
        _write(replies, {"error": f"a worker cannot load the models: {_line(error)}"})
        return
    for line in sys.stdin:
        _write(replies, answer(bench, unpack(json.loads(line))))


def _only_for_replies() -> TextIO:
    """Return standard output, and turn what anything else prints there to standard error."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return replies


def _write(replies: TextIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    main()
