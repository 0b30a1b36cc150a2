"""A report as one HTML page: nothing is fetched, it follows the light or dark setting and the window's width."""

from collections.abc import Sequence
from html import escape
from importlib.resources import files

from specx.data.documents import short_length
from specx.eval.charts import Chart, Palette, inline_svg
from specx.eval.report_parts import TITLE, absent_notes, compared, unsettled
from specx.eval.results_folder import Results, Row
from specx.eval.tables import Table, tables

_STYLE = files("specx.eval").joinpath("report.css").read_text(encoding="utf-8")


def page(folders: Sequence[Results], drawn: Sequence[Chart], palette: Palette, absent: str | None) -> str:
    """Return the page.

    Args:
        drawn: Charts that can be drawn.
        absent: Why none can.
    """
    body = [f"<h1>{TITLE}</h1>", *(_warning(note, bool(absent)) for note in absent_notes(folders, drawn, absent))]
    body += ['<div class="side">', *(_facts(folder, len(folders) > 1) for folder in folders), "</div>"]
    for chart in drawn:
        pictures = "".join(inline_svg(chart, folders, palette, narrow) for narrow in (False, True))
        body.append(
            f'<section><h2>{chart.title}</h2><p class="note">{escape(chart.note(folders))}</p>{pictures}</section>'
        )
    body += _readings(folders)
    both = compared(folders)
    body += [_table(both, "h2")] if both else []
    for folder in folders:
        title = f"Tables: {escape(folder.name)}" if len(folders) > 1 else "Tables"
        shown = [_table(table, "h3") for table in tables(folder.rows)]
        body += [f"<h2>{title}</h2>", *shown] if shown else []
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{TITLE}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _warning(note: str, loud: bool = True) -> str:
    return f'<p class="{"warn" if loud else "note"}">{escape(note)}</p>'


def _facts(folder: Results, named: bool) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in folder.facts.items())
    title = f"<h3>{escape(folder.name)}</h3>" if named else ""
    return f'<div class="card">{title}{"".join(map(_warning, unsettled(folder)))}<dl>{rows}</dl></div>'


def _table(table: Table, heading: str) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    return (
        f'<{heading}>{escape(table.title)}</{heading}><p class="note">{escape(table.note)}</p>'
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'
    )


def _readings(folders: Sequence[Results]) -> list[str]:
    """Show generations with the tokens of the draft and of the target told apart; one is open a folder."""
    if not any(folder.of("trace") for folder in folders):
        return []
    legend = '<span class="d">proposed by the draft and accepted</span>, <span class="t">chosen by the target</span>'
    parts = [
        f"<h2>Generations</h2><p class='note'>Text after the prompt's grey end: {legend}.</p>",
        '<div class="side">',
    ]
    for folder in folders:
        traced = sorted(folder.of("trace"), key=lambda row: (row["context"], row["method"] == "auto"), reverse=True)
        title = f"<h3>{escape(folder.name)}</h3>" if len(folders) > 1 else ""
        parts.append(f"<div>{title}{''.join(_reading(row, number == 0) for number, row in enumerate(traced))}</div>")
    return [*parts, "</div>"]


def _reading(row: Row, opened: bool) -> str:
    steps = len(row["emitted"])
    tau = f"{sum(row['emitted']) / steps:.2f} tokens a step" if steps else "one token"
    hit = f", {row['hit_rate']:.0%} of the attention retrieved" if row["hit_rate"] is not None else ""
    title = f"{row['method']} after {short_length(row['context'])}, {row['prompt']}: {tau}{hit}"
    runs: list[tuple[bool, str]] = []
    for text, drafted in (piece for step in row["pieces"] for piece in step):
        if runs and runs[-1][0] == drafted:
            runs[-1] = drafted, runs[-1][1] + text
        elif text:
            runs.append((drafted, text))
    shown = "".join(f'<span class="{"d" if drafted else "t"}">{escape(text)}</span>' for drafted, text in runs)
    before = f'<span class="before">…{escape(row["prompt_end"])}</span>'
    return (
        f"<details{' open' if opened else ''}><summary>{escape(title)}</summary>"
        f'<div class="reading">{before}{shown}</div></details>'
    )
