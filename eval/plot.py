"""A line drawing as SVG, written by hand: no library of plots is needed for one."""

from typing import Any
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 760, 320, 60, 30, 150, 70
_LINES = {"plain": "#888888", "fixed": "#d08770", "controller": "#2e7d32"}
_COLOURS = ("#3b82d6", "#e0701a", "#1f9d63", "#c9447f", "#8b5fd0", "#888888")
_MODES = {"plain": "#bdbdbd", "lookup": "#f2c14e", "chain": "#8fb8de", "tree": "#3b6fa5", "probe": "#b03a8c"}


def along_the_text(series: dict[str, list[dict[str, Any]]], marks: list[int], title: str) -> str:
    """Return an SVG of tokens/s against position, a line for each method, and a strip of the controller's modes.

    Args:
        series: {method: rows with position, rate, mode}, positions ascending.
        marks: Positions at which the text changes.
    """
    points = [row for rows in series.values() for row in rows]
    most, top = max(row["position"] for row in points) or 1, max(row["rate"] for row in points)
    wide, high = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def at(position: float, rate: float) -> tuple[float, float]:
        return round(_LEFT + wide * position / most, 1), round(_TOP + high * (1 - rate / top), 1)

    parts = _head(title)
    for share in (0, 0.5, 1):
        x, y = at(0, share * top)
        parts += [_line((x, y), (_LEFT + wide, y), "#e0e0e0"), _text(8, y + 4, f"{share * top:.0f}")]
    parts += [_line(at(mark, 0), at(mark, top), "#999999", ' stroke-dasharray="4 3"') for mark in marks]
    for number, (method, rows) in enumerate(series.items()):
        colour = _LINES.get(method, "black")
        path = " ".join("{},{}".format(*at(row["position"], row["rate"])) for row in rows)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(_text(_WIDTH - _RIGHT + 12, _TOP + 16 * number + 10, method, colour))
    parts += _strip(series.get("controller", []), at, wide / most)
    parts.append(_text(_LEFT, _HEIGHT - 8, "tokens generated; above: tokens/s; strip: the controller's mode"))
    return "\n".join([*parts, "</svg>", ""])


def curves(series: dict[str, list[tuple[float, float]]], title: str, foot: str) -> str:
    """Return an SVG of lines [(x, y), ...] by name, x from 0, y as far as they reach; `foot` says what x and y are."""
    points = [point for line in series.values() for point in line]
    most, (low, top) = max(x for x, _ in points), (f(y for _, y in points) for f in (min, max))
    wide, high = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        return round(_LEFT + wide * x / most, 1), round(_TOP + high * (top - y) / ((top - low) or 1), 1)

    parts = _head(title)
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, y = at(share * most, low + share * (top - low))
        parts += [_line((_LEFT, y), (_LEFT + wide, y), "#e0e0e0"), _text(8, y + 4, f"{low + share * (top - low):.2f}")]
        parts.append(_text(x - 10, _TOP + high + 16, f"{share * most:.0f}"))
    for number, (name, line) in enumerate(series.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        path = " ".join("{},{}".format(*at(x, y)) for x, y in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        parts.append(_text(_WIDTH - _RIGHT + 12, _TOP + 16 * number + 10, name, colour))
    return "\n".join([*parts, _text(_LEFT, _HEIGHT - 8, foot), "</svg>", ""])


def _head(title: str) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>',
        _text(_LEFT, 18, title),
    ]


def _strip(rows: list[dict[str, Any]], at: Any, scale: float) -> list[str]:
    y, parts = _HEIGHT - _BOTTOM + 10, []
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        x = at(row["position"], 0)[0]
        width = scale * ((after["position"] - row["position"]) if after else 0)
        parts.append(f'<rect x="{x}" y="{y}" width="{width:.1f}" height="14" fill="{_MODES[row["mode"]]}"/>')
    for number, (mode, colour) in enumerate(_MODES.items()):
        parts.append(_text(_WIDTH - _RIGHT + 12, _TOP + 80 + 16 * number, mode, colour))
    return parts


def _line(start: tuple[float, float], end: tuple[float, float], colour: str, more: str = "") -> str:
    return f'<line x1="{start[0]}" y1="{start[1]}" x2="{end[0]}" y2="{end[1]}" stroke="{colour}"{more}/>'


def _text(x: float, y: float, text: str, colour: str = "#222222") -> str:
    return f'<text x="{x}" y="{y}" fill="{colour}">{escape(text)}</text>'
