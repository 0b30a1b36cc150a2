"""What a long command says while it runs: a bar with the time left on a terminal, plain lines on a pipe."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import click

_SECONDS = 10.0  # between two lines about the time left


class Left(Protocol):
    """What remains; see `specx.eval.progress.Remaining`."""

    @property
    def left(self) -> int: ...

    @property
    def total(self) -> int: ...

    def words(self) -> str: ...


Tick = Callable[[Any], None]


@contextmanager
def shown() -> Iterator[tuple[Callable[[str], None], Tick]]:
    """Give two functions: one that says a line, one that is told what is left. Everything goes to stderr."""
    if sys.stderr.isatty():
        with _bar() as functions:
            yield functions
        return
    last = 0.0

    def tick(left: Left) -> None:
        nonlocal last
        now = time.monotonic()
        if left.left and now - last >= _SECONDS:
            click.echo(f"{left.total - left.left} of {left.total} parts done, {left.words()} left", err=True)
            last = now

    yield lambda line: click.echo(line, err=True), tick


@contextmanager
def _bar() -> Iterator[tuple[Callable[[str], None], Tick]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True, highlight=False)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[words]}")
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=None, words="")

        def tick(left: Left) -> None:
            progress.update(task, total=left.total, completed=left.total - left.left, words=f"{left.words()} left")

        yield lambda line: console.print(line, markup=False), tick
