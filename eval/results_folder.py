"""What `specx eval` left in a folder, read for a report."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specx.eval.ledger import in_order, read_ledger
from specx.eval.summary import FILE, read_summary, results

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Results:
    """The rows of one folder.

    Attributes:
        name: What a reader sees.
        facts: What the numbers depend on, in words.
        rows: By unit.
        figures: As in `summary.json`, made anew from the rows.
    """

    name: str
    facts: dict[str, str]
    rows: list[Row]
    figures: list[Row]

    def of(self, measure: str) -> list[Row]:
        """Return the rows of one measurement."""
        return [row for row in self.rows if row["measure"] == measure]

    @property
    def methods(self) -> list[str]:
        """Methods in the order in which they were asked for."""
        return list(dict.fromkeys(row["method"] for row in self.rows))


def read_results(folders: Sequence[Path]) -> list[Results]:
    """Read folders; each is called by its name, or its path where two have one name.

    Raises:
        ValueError: If one holds no results, or broken ones.
    """
    short = [folder.resolve().name for folder in folders]
    names = short if len(set(short)) == len(short) else [str(folder) for folder in folders]
    if len(set(names)) < len(names):
        raise ValueError(f"a folder is given twice: {', '.join(names)}")
    return [_read(folder, name) for folder, name in zip(folders, names, strict=True)]


def _read(folder: Path, name: str) -> Results:
    file = folder / "rows.jsonl"
    if not file.is_file():
        what = "holds no rows.jsonl" if folder.is_dir() else "is no folder"
        raise ValueError(f"{folder} {what}; give a folder that specx eval wrote")
    rows = in_order(read_ledger(file))
    if not rows:
        raise ValueError(f"{file} is empty: nothing was measured yet")
    try:
        return Results(name, _facts(folder), rows, results(rows))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} holds rows that specx eval does not write (no {error})") from error


def _facts(folder: Path) -> dict[str, str]:
    summary = read_summary(folder)
    if summary is not None:
        versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
        state = summary["status"] + (f" ({summary['ended_by']})" if summary.get("ended_by") else "")
        parts = f"{state}, {summary['units']['done']} of {summary['units']['of']} parts, {summary['workers']} at a time"
        notes = (
            {"notes": "; ".join(note.removeprefix("note: ") for note in summary["notes"])} if summary["notes"] else {}
        )
        return {
            "command": summary["command"], "data": summary["data"], "models": summary["models"],
            "machine": f"{summary['hardware']['name']}, threads: {summary['hardware']['threads']}",
            "attention": summary["attention"], "versions": f"{versions}; commit {summary['commit']}", "run": parts,
            "load average": f"{summary['load']['before']:.2f} before, {_number(summary['load']['after'])} after",
        } | notes  # fmt: skip
    file = folder / "summary.md"  # of results from before there was a JSON summary
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    told = [line[2:].partition(": ") for line in lines if line.startswith("- ")]
    return {name: value for name, _, value in told if value} or {"facts": f"{FILE} is missing"}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
