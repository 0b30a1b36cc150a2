"""What both forms of a report say: which figures stand beside each other, and what is not there."""

from collections.abc import Sequence

from specx.data.documents import short_length
from specx.eval.charts import CHARTS, Chart
from specx.eval.results_folder import Results, Row
from specx.eval.tables import Table

TITLE = "specx: measured"


def compared(folders: Sequence[Results]) -> Table | None:
    """Return tau and speed-up of several folders in columns; None for one folder, or where they share nothing."""
    cells: dict[tuple[str, int, str], dict[str, str]] = {}
    for folder in folders:
        for each in folder.figures:
            for key, label in (("tau", "tau"), ("speed_up", "speed-up")):
                if key in each:
                    kind = f"{label}, {each.get('kind', 'generations')}" if key == "tau" else label
                    place = kind, each["context"], each["method"]
                    cells.setdefault(place, {})[folder.name] = spread(each[key])
    shared = {place: found for place, found in cells.items() if len(found) > 1}
    if len(folders) < 2 or not shared:
        return None
    lines = [
        [what, short_length(context), method, *(found.get(folder.name, "-") for folder in folders)]
        for (what, context, method), found in sorted(shared.items(), key=lambda item: (item[0][0], item[0][1]))
    ]
    note = "With 95 % bootstrap intervals over samples. Speed-ups are compared within one folder: to its own baseline."
    return Table("Side by side", note, ["what", "context", "method", *(folder.name for folder in folders)], lines)


def spread(interval: Row) -> str:
    """Return an estimate with its interval."""
    return f"{interval['mean']:.2f} [{interval['low']:.2f}, {interval['high']:.2f}]"


def absent_notes(folders: Sequence[Results], drawn: Sequence[Chart], absent: str | None) -> list[str]:
    """Say which charts are not there and why."""
    if absent:
        titles = ", ".join(chart.title for chart in CHARTS if any(chart.has(folder) for folder in folders))
        return [f"The charts are missing ({titles}): {absent}"]
    missing = [chart.title for chart in CHARTS if chart not in drawn]
    return [f"Not measured here: {', '.join(missing)}."] if missing else []


def unsettled(folder: Results) -> list[str]:
    """Say what a reader must know before trusting a folder's numbers."""
    notes = []
    state = folder.facts.get("run", "")
    if "INCOMPLETE" in folder.facts or (state and not state.startswith("complete")):
        notes.append(f"This run did not finish: {folder.facts.get('INCOMPLETE', state)}.")
    most = max((row.get("shared", 1) for row in folder.rows), default=1)
    if most > 1:
        notes.append(f"{most} workers measured at the same time: the timings are not those of a quiet machine.")
    return notes
