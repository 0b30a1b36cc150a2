"""Rows of the GPU suite on disk, and what its measuring process is told. No torch here."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# The part of the budget that each section may use; what one leaves goes to the next.
SHARES = {"numbers": 0.3, "step": 0.3, "kernel": 0.15, "end-to-end": 0.25}


@dataclass(frozen=True, slots=True)
class Job:
    """What a measuring process is asked for.

    Attributes:
        sections: Names, and the time of day in seconds at which each must be over.
        rows: File that gets the rows; those in it are done.
        marker: File that names the task under way.
        dry: Small shapes on the CPU.
        command: As the user gave it.
    """

    sections: list[tuple[str, float]]
    rows: str
    marker: str
    dry: bool
    command: str

    def text(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self))


def read_rows(file: Path) -> list[Row]:
    """Return the rows on disk; one that was cut off is dropped."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def append_row(file: Path, row: Row) -> None:
    """Write a row to disk at once."""
    with file.open("a", encoding="utf-8") as log:
        log.write(json.dumps(row) + "\n")


def failed_row(section: str, name: str, message: str, seconds: float = 0.0) -> Row:
    """Return the row of a task that failed."""
    return {"section": section, "name": name, "status": "failed", "message": message, "seconds": round(seconds, 2)}
