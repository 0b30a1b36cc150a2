"""One JSON file about an evaluation: what was asked for, where it ran, and every figure with its interval.

Its layout is `summary.schema.json` beside this file.
"""

import hashlib
import json
import os
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specx.eval.metrics import (
    Interval,
    acceptance_rates,
    bootstrap,
    bootstrap_median,
    bootstrap_tau,
    efficiency,
    pooled_tau,
)
from specx.eval.units import Unit

VERSION = 1
FILE = "summary.json"
MOST_PLACES = 16  # in a step that tables and charts tell apart; only copied passages reach more
PARTS = ("draft", "verify", "retrieval", "other")
Row = dict[str, Any]


def fingerprint(units: Sequence[Unit]) -> str:
    """Return a hash of every token that is measured on."""
    found = hashlib.sha256()
    for unit in units:
        if unit.prompt is not None:
            found.update(unit.prompt.ids.numpy().tobytes())
        if unit.span is not None:
            part = unit.span.ids[unit.span.position - unit.context : unit.span.position + unit.span.length]
            found.update(part.numpy().tobytes())
    return found.hexdigest()[:16]


def changes(old: Row, new: Row) -> list[str]:
    """Say in words what differs between two configurations."""
    names = dict.fromkeys([*old, *new])
    return [f"{name} was {old.get(name)}, now {new.get(name)}" for name in names if old.get(name) != new.get(name)]


def read_summary(out: Path) -> Row | None:
    """Return the summary in a folder, None if there is none.

    Raises:
        ValueError: If it is broken.
    """
    file = out / FILE
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{file} is broken ({error}); give another --out") from error


def write_summary(out: Path, summary: Row) -> None:
    """Write it so that it appears whole or not at all."""
    draft = out / f".{FILE}.{os.getpid()}"
    draft.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    draft.replace(out / FILE)


def results(rows: list[Row]) -> list[Row]:
    """Return the figures of every measurement, context and method."""
    keys = dict.fromkeys((row["measure"], row.get("kind"), row["context"], row["method"]) for row in rows)
    base, found = plain_rates(rows), []
    for measure, kind, context, method in keys:
        own = [
            row
            for row in rows
            if (row["measure"], row.get("kind"), row["context"], row["method"]) == (measure, kind, context, method)
        ]
        place = {"measure": measure, "context": context, "method": method} | ({"kind": kind} if kind else {})
        figures = {"tau": _tau, "trace": _trace, "memory": _memory}.get(measure)
        found.append(place | {"rows": len(own)} | (figures(own) if figures else _speed(own, base)))
    return found


def plain_rates(rows: list[Row]) -> dict[tuple[Any, ...], float]:
    """Return plain decoding's tokens/s with the faster of its two caches, for every (context, prompt, run)."""
    base: dict[tuple[Any, ...], float] = {}
    for row in rows:
        if row["measure"] == "speed" and row["method"] in ("ar", "ar-static") and row["decode_tokens_per_second"]:
            key = place_of(row)
            base[key] = max(base.get(key, 0.0), row["decode_tokens_per_second"])
    return base


def place_of(row: Row) -> tuple[Any, ...]:
    """Return what a row shares with those of other methods at its side."""
    return row["context"], row["prompt"], row.get("run", 0)


def speed_ups(own: list[Row], base: dict[tuple[Any, ...], float]) -> list[float]:
    """Return one speed-up over plain decoding a prompt: the median over its runs."""
    by_prompt: dict[str, list[float]] = {}
    for row in own:
        if row["decode_tokens_per_second"] and place_of(row) in base:
            by_prompt.setdefault(row["prompt"], []).append(row["decode_tokens_per_second"] / base[place_of(row)])
    return [statistics.median(values) for values in by_prompt.values()]


def accepted(rows: list[Row]) -> Counter[int]:
    """Return {accepted drafted tokens: steps} over all rows that say it."""
    total = Counter[int]()
    for row in rows:
        total.update({int(n): count for n, count in (row.get("accepted_histogram") or {}).items()})
    return total


def _acceptance(own: list[Row]) -> Row:
    runs = [(row["emitted"], row["steps"]) for row in own if row.get("steps")]
    if not runs:
        return {}
    found: Row = {
        "tau": _interval(bootstrap_tau(runs)),
        "tau_macro": statistics.mean(emitted / steps for emitted, steps in runs),
        "accepted_per_step": pooled_tau(runs) - 1,
    }
    histogram = accepted(own)
    if histogram:
        positions, conditional = acceptance_rates(histogram)
        counts = {str(n): histogram[n] for n in sorted(histogram)}
        found |= {"accepted_histogram": counts, "per_position": positions, "conditional": conditional}
    return found


def _tau(own: list[Row]) -> Row:
    return _acceptance(own) | _mean(own, "hit_rate") | _policy(own)


def _trace(own: list[Row]) -> Row:
    return _mean(own, "hit_rate") | _policy(own)


def _memory(own: list[Row]) -> Row:
    return {"peak_bytes_added": max(row["peak_bytes"] - row["before_bytes"] for row in own)}


def _speed(own: list[Row], base: dict[tuple[Any, ...], float]) -> Row:
    found = _acceptance(own) | _policy(own)
    for key in ("decode_tokens_per_second", "ttft_seconds"):
        values = [row[key] for row in own if row.get(key) is not None]
        if values:
            found[key] = _interval(bootstrap_median(values))
    ends = [row["new"] / (row["ttft_seconds"] + row["decode_seconds"]) for row in own if row.get("decode_seconds")]
    if ends:
        found["e2e_tokens_per_second"] = statistics.median(ends)
    ratios = speed_ups(own, base)
    if ratios:
        found["speed_up"] = _interval(bootstrap_median(ratios))
        if "tau" in found:
            found["efficiency"] = efficiency(found["speed_up"]["mean"], found["tau"]["mean"])
    stepped = [row for row in own if row.get("steps")]
    if stepped:
        found["ms_per_step"] = {
            part: statistics.median(row[f"ms_{part}"] / row["steps"] for row in stepped) for part in PARTS
        }
    judged = [row for row in own if "same" in row]
    if judged:
        margins = [row["margin"] for row in judged if row["margin"] is not None]
        found["same"] = {"equal": sum(row["same"] for row in judged), "of": len(judged)}
        found["same"]["largest_margin"] = max(margins, default=None)
    return found | _mean(own, "rouge_l") | _mean(own, "found") | _mean(own, "draft_kv_tokens", interval=False)


def _mean(own: list[Row], key: str, interval: bool = True) -> Row:
    values = [row[key] for row in own if row.get(key) is not None]
    if not values:
        return {}
    return {key: _interval(bootstrap(values)) if interval else statistics.median(values)}


def _policy(own: list[Row]) -> Row:
    names = {row["policy"] for row in own if row.get("policy")}
    return {"policy": ", ".join(sorted(names))} if names else {}


def _interval(found: Interval) -> Row:
    return {"mean": found.mean, "low": found.low, "high": found.high}
