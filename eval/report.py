"""`specx report`: one self-contained page, the same as Markdown, and its charts as files."""

import os
from collections.abc import Sequence
from pathlib import Path

from specx.eval import charts, report_html, report_markdown
from specx.eval.results_folder import read_results

FORMATS = ("html", "md", "png", "svg")


def write(folders: Sequence[Path], out: Path, formats: Sequence[str] = FORMATS, demand: bool = False) -> list[Path]:
    """Write a report about one or more folders of results, side by side; return the files.

    Args:
        demand: Charts as files were asked for by name, so that it is an error if they cannot be made.

    Raises:
        ValueError: If a folder holds no results, or `out` cannot be written.
        RuntimeError: If `demand` and what charts need is not installed.
    """
    results = read_results(folders)
    absent = charts.missing()
    if absent and demand and {"png", "svg"} & set(formats):
        raise RuntimeError(f"{absent}; or ask for --format html,md")
    palette = charts.Palette(results)
    drawn = [] if absent else [c for c in charts.CHARTS if any(c.has(folder) for folder in results)]
    files: dict[str, bytes] = {}
    if "html" in formats:
        files["report.html"] = report_html.page(results, drawn, palette, absent).encode()
    pictures = [kind for kind in ("png", "svg") if kind in formats and not absent]
    if "md" in formats:
        files["report.md"] = report_markdown.text(results, drawn, absent, pictures[:1]).encode()
    for kind in pictures:
        files |= {f"{chart.name}.{kind}": charts.file_bytes(chart, results, palette, kind) for chart in drawn}
    return _written(out, files)


def _written(out: Path, files: dict[str, bytes]) -> list[Path]:
    """Write all files, each whole or not at all."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            draft = out / f".{name}.{os.getpid()}"
            draft.write_bytes(content)
            draft.replace(out / name)
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written: {error.strerror or error}") from error
    return [out / name for name in files]
