"""A report as Markdown, with its charts as picture files beside it."""

from collections.abc import Sequence

from specx.eval.charts import Chart
from specx.eval.report_parts import TITLE, absent_notes, compared, unsettled
from specx.eval.results_folder import Results
from specx.eval.tables import tables


def text(folders: Sequence[Results], drawn: Sequence[Chart], absent: str | None, pictures: Sequence[str]) -> str:
    """Return the report.

    Args:
        drawn: Charts that can be drawn.
        absent: Why none can.
        pictures: Endings of the chart files, the first is shown; empty: none are written.
    """
    lines = [f"# {TITLE}", ""]
    lines += [f"> {note}\n" for note in absent_notes(folders, drawn, absent)]
    for folder in folders:
        lines += [f"## {folder.name}", ""] if len(folders) > 1 else []
        lines += [f"- {name}: {value}" for name, value in folder.facts.items()]
        lines += ["", *(f"**{note}**\n" for note in unsettled(folder))]
    if pictures:
        for chart in drawn:
            lines += [
                f"## {chart.title}",
                "",
                f"![{chart.title}]({chart.name}.{pictures[0]})",
                "",
                chart.note(folders),
                "",
            ]
    both = compared(folders)
    lines += [both.markdown()] if both else []
    for folder in folders:
        shown = [table.markdown() for table in tables(folder.rows)]
        lines += [f"# {folder.name}: tables", ""] if len(folders) > 1 and shown else []
        lines += shown
    return "\n".join(lines)
