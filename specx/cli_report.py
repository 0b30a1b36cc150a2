"""`specx report`: parse, call `specx.eval.report`, say what was written."""

from pathlib import Path
from typing import Any

import click

from specx import output
from specx.cli_options import debug_option
from specx.config import nearest

FORMATS = ("html", "md", "png", "svg")


@click.command()
@click.argument("folders", nargs=-1, required=True, metavar="DIR...")
@click.option("--out", metavar="DIR", help="Where to. Default: report in the folder; specx-report for several.")
@click.option("--format", "formats", metavar="LIST", help=f"Of {', '.join(FORMATS)}. Default: all that can be made.")
@debug_option
def report(**given: Any) -> None:
    """Write a report about folders that specx eval wrote; several stand side by side.

    One HTML page that fetches nothing, the same as Markdown, and every chart as PNG and SVG. Charts need matplotlib.
    """
    asked = [part.strip() for part in (given["formats"] or ",".join(FORMATS)).split(",") if part.strip()]
    unknown = [each for each in asked if each not in FORMATS]
    if unknown or not asked:
        close = nearest(unknown[0], list(FORMATS)) if unknown else "."
        raise ValueError(f"--format takes {', '.join(FORMATS)}, joined by commas; got {given['formats']!r}{close}")
    folders = [Path(each).expanduser() for each in given["folders"]]
    out = Path(given["out"]).expanduser() if given["out"] else _default(folders)
    with output.quitting_at_ctrl_c():
        from specx.eval import charts
        from specx.eval.report import write

        for file in write(folders, out, asked, demand=given["formats"] is not None):
            click.echo(file)
        if absent := charts.missing():
            click.echo(f"note: {absent}", err=True)


def _default(folders: list[Path]) -> Path:
    return folders[0] / "report" if len(folders) == 1 else Path("specx-report")
