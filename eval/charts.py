"""The charts of a report, by matplotlib: as inline SVG that follows the page's colours, and as PNG and SVG files."""

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from specx.eval.plots import (
    BASE,
    COLOURS,
    PART_COLOURS,
    Palette,
    draw_accepted,
    draw_map,
    draw_memory,
    draw_parts,
    draw_speed,
    draw_tau,
    drawn_methods,
    figures_with,
    mapped,
    short,
    timed,
)
from specx.eval.results_folder import Results
from specx.eval.summary import PARTS

_INK, _GRID = "#010203", "#040506"  # replaced by the page's own
WIDE, NARROW = 11.0, 4.4  # inches


@dataclass(frozen=True, slots=True)
class Chart:
    """One picture.

    Attributes:
        name: Of its files.
        title: What it shows.
        note: How to read it, of the folders that have it.
        draw: Draws one folder into an axes.
        has: Whether a folder has what it shows.
        height: Of a folder's panel, in inches.
        legend: Labels and colours, by what stands in the figure's legend: "methods", "parts" or "kept".
    """

    name: str
    title: str
    note: Callable[[Sequence[Results]], str]
    draw: Callable[[Any, Results, Palette], None]
    has: Callable[[Results], bool]
    height: Callable[[Results], float]
    legend: str = "methods"


def missing() -> str | None:
    """Say what is not installed that charts need, None if all is there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "charts need matplotlib, which is not installed: pip install 'specx[report]'"
    return None


def figure(chart: Chart, folders: Sequence[Results], palette: Palette, narrow: bool = False) -> Any:
    """Draw a chart for all folders that have it: side by side, or, narrow, below each other."""
    from matplotlib.figure import Figure

    shown = [folder for folder in folders if chart.has(folder)]
    columns = 1 if narrow else min(len(shown), 2)
    lines = math.ceil(len(shown) / columns)
    heights = [max(chart.height(f) for f in shown[line * columns :][:columns]) for line in range(lines)]
    used = _legend(chart, shown, palette)
    legend_lines = math.ceil(sum(len(label) + 6 for label, _ in used) / (42 if narrow else 120)) if used else 0
    drawing = Figure(
        figsize=(NARROW if narrow else WIDE, sum(heights) + 0.26 * legend_lines + 0.1), layout="constrained"
    )
    grid = drawing.subplots(lines, columns, squeeze=False, sharey="row" if chart.legend == "methods" else False,
                            height_ratios=heights)  # fmt: skip
    for place, axes in enumerate(grid.flat):
        if place >= len(shown):
            axes.set_visible(False)
            continue
        chart.draw(axes, shown[place], palette)
        if len(folders) > 1:
            axes.set_title(short(shown[place].name), fontsize=10, loc="left")
        axes.tick_params(labelleft=True)
    if used:
        _place_legend(drawing, used, legend_lines)
    return drawing


def _place_legend(drawing: Any, used: list[tuple[str, dict[str, Any]]], lines: int) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=label, **{"linewidth": 2, **style}) for label, style in used]
    columns = math.ceil(len(handles) / lines)
    drawing.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False, fontsize=9,
                   columnspacing=1.4, handlelength=1.8, borderaxespad=0.2)  # fmt: skip


def _legend(chart: Chart, shown: Sequence[Results], palette: Palette) -> list[tuple[str, dict[str, Any]]]:
    if chart.legend == "parts":
        return [(part, {"color": PART_COLOURS[part], "linewidth": 6}) for part in PARTS]
    if chart.legend == "kept":
        return [("chosen by the target's attention", {"color": COLOURS[1], "linewidth": 6}),
                ("kept by rule: sinks and recent tokens", {"color": BASE, "linewidth": 6})]  # fmt: skip
    names = [method for method in palette.methods if any(method in drawn_methods(chart.name, f) for f in shown)]
    return [(name, palette.style(name)) for name in names]


def _fixed(text: str) -> Callable[[Sequence[Results]], str]:
    return lambda folders: text


def _tau_note(folders: Sequence[Results]) -> str:
    drawn = [each for folder in folders for each in figures_with(folder, "tau")]
    kinds = {each.get("kind") for each in drawn}
    parts = ["Tokens that one verification emits, with 95 % intervals over samples."]
    if "recurrence" in kinds:
        parts.append(
            "Solid: ordinary places; dashed: text of which much can be copied only from beyond the draft's window."
        )
    elif "ordinary" in kinds:
        parts.append("At ordinary places of the text.")
    if None in kinds:
        parts.append("Of generations" + (" where nothing was measured along the text." if len(kinds) > 1 else "."))
    return " ".join(parts)


def _flat(height: float) -> Callable[[Results], float]:
    return lambda folder: height


CHARTS = (
    Chart("tau", "tau against context", _tau_note,
          draw_tau, lambda f: bool(figures_with(f, "tau")), _flat(3.3)),
    Chart("speed", "Speed-up against context",
          _fixed("Decode tokens/s over Hugging Face's plain decoding, the faster of its caches, prompt by prompt; "
                 "medians with 95 % intervals over prompts. Dotted: no gain."),
          draw_speed, lambda f: bool(figures_with(f, "speed_up")), _flat(3.3)),
    Chart("parts", "Time of a step",
          _fixed("Milliseconds of one round by what they were spent on; medians over generations."),
          draw_parts, lambda f: bool(timed(f)), lambda f: 0.9 + 0.2 * len(timed(f)), "parts"),
    Chart("memory", "Memory against context", _fixed("Peak above what the loaded models need, one process a point."),
          draw_memory, lambda f: bool(figures_with(f, "peak_bytes_added")), _flat(3.0)),
    Chart("accepted", "Accepted tokens", _fixed("Drafted tokens that a step accepts, at the longest context."),
          draw_accepted, lambda f: bool(figures_with(f, "accepted_histogram")), _flat(3.0)),
    Chart("map", "What retrieval kept",
          _fixed("Each column is a verification step, each row a chunk of the context. Above the dotted line lies "
                 "what was generated. A chunk not coloured is not in the draft's cache."),
          draw_map, lambda f: mapped(f) is not None, _flat(3.6), "kept"),
)  # fmt: skip


def _settings() -> dict[str, Any]:
    return {
        "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": _INK,
        "axes.labelcolor": _INK, "text.color": _INK, "xtick.color": _INK, "ytick.color": _INK, "grid.color": _GRID,
        "axes.facecolor": "none", "figure.facecolor": "none", "savefig.facecolor": "none", "svg.fonttype": "path",
        "font.family": "DejaVu Sans", "axes.linewidth": 0.8,
    }  # fmt: skip


def inline_svg(chart: Chart, folders: Sequence[Results], palette: Palette, narrow: bool) -> str:
    """Return an `<svg>` element that takes text and grid colours from the page."""
    text = _saved(chart, folders, palette, "svg", narrow).decode()
    text = text[text.index("<svg") :].replace(_INK, "currentColor").replace(_GRID, "var(--grid)")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="(figure|axes|patch|matplotlib|xtick|ytick|line2d|text|legend|QuadMesh|LineCollection|PathColl'
                  r'ection|FillBetween\w*)[_.\d]*"', "", text)  # fmt: skip
    head = text[: text.index(">")]
    fitted = re.sub(r' (width|height)="[\d.]+pt"', "", head)
    kind = "narrow" if narrow else "wide"
    return f'{fitted} class="{kind}" role="img" aria-label="{chart.title}"{text[len(head) :]}'


def file_bytes(chart: Chart, folders: Sequence[Results], palette: Palette, kind: str) -> bytes:
    """Return a picture file, "png" or "svg", dark on white."""
    return _saved(chart, folders, palette, kind, False, ink="#1c2128", grid="#d9dde3", face="white")


def _saved(
    chart: Chart, folders: Sequence[Results], palette: Palette, kind: str, narrow: bool, *,
    ink: str = _INK, grid: str = _GRID, face: str = "none",
) -> bytes:  # fmt: skip
    import matplotlib

    colours = {key: {_INK: ink, _GRID: grid}.get(value, value) for key, value in _settings().items()}
    salt = {"svg.hashsalt": f"{chart.name}{narrow}", "savefig.facecolor": face}
    with matplotlib.rc_context(colours | salt):
        drawing = figure(chart, folders, palette, narrow)
        target = io.BytesIO()
        extra: dict[str, Any] = {"dpi": 150} if kind == "png" else {"metadata": {"Date": None}}
        drawing.savefig(target, format=kind, facecolor=face, **extra)
    return target.getvalue()
