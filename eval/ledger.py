"""The rows on disk: each written when it is known, and what a killed run left taken up again."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from specx.eval.units import Unit

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Row = dict[str, Any]


class Ledger:
    """`rows.jsonl` of a folder, open for appending; a context manager."""

    def __init__(self, file: Path) -> None:
        self._stream = file.open("a", encoding="utf-8")

    def append(self, row: Row) -> None:
        """Write a row so that it stays whatever happens to this process or machine."""
        self._stream.write(json.dumps(row) + "\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep a folder for this process: what two runs write would be torn. A killed process leaves no claim.

    Raises:
        ValueError: If another process has it.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process measures into {folder}: wait for it, or give another --out") from error
        yield
    finally:
        os.close(handle)


def read_ledger(file: Path) -> list[Row]:
    """Return the rows of a file; the last line, if torn by a kill, is left out.

    Raises:
        ValueError: If another line is broken, naming it.
    """
    lines = file.read_bytes().split(b"\n") if file.exists() else []
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # no newline behind it
                break
            raise ValueError(
                f"{file} line {number} is broken: {error}; remove that line, or give another --out"
            ) from error
        if not isinstance(row, dict) or "measure" not in row:
            raise ValueError(f"{file} line {number} is no row of `specx eval`: give another folder")
        rows.append(row)
    return rows


def take_up(file: Path, units: Sequence[Unit]) -> list[Row]:
    """Return the rows of all finished units; those of unfinished ones, to be measured again, leave the file.

    Raises:
        ValueError: If the file is broken.
    """
    rows = read_ledger(file)
    found, wanted = Counter(row.get("unit") for row in rows), {unit.number: unit.rows for unit in units}
    whole = [row for row in rows if found[row.get("unit")] == wanted.get(row.get("unit", -1))]
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    draft.write_text("".join(json.dumps(row) + "\n" for row in whole), encoding="utf-8")
    draft.replace(file)
    return whole


def in_order(rows: list[Row]) -> list[Row]:
    """Return rows by unit, whatever order workers finished them in; rows without one, of older files, as they are."""
    return sorted(rows, key=lambda row: row.get("unit", -1))
