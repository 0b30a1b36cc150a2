"""The pieces that an evaluation is made of: whatever is measured at once, and measured again if it was not finished."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from specx.eval.chosen import Prompt
from specx.eval.spans import Span

MEASURES = ("speed", "memory", "trace", "tau")  # in this order


@dataclass(frozen=True, slots=True)
class Unit:
    """One piece of work: all methods on one prompt or span (memory: one method), and the rows that it gives.

    Attributes:
        number: Its place among all units, from 0.
        rows: How many rows it gives.
        run: Which repetition, from 0.
        turn: For the order of methods, see `specx.eval.speed.one`.
    """

    number: int
    measure: str
    context: int
    rows: int
    prompt: Prompt | None = None
    span: Span | None = None
    method: str | None = None
    run: int = 0
    turn: int = 0


@dataclass(frozen=True, slots=True)
class Counts:
    """Names of methods by what measures them."""

    timed: Sequence[str]
    written: Sequence[str]
    drafting: Sequence[str]


def plan(
    measures: Sequence[str],
    counts: Counts,
    contexts: Sequence[int],
    prompts: list[Prompt],
    spans: list[Span],
    runs: int,
) -> list[Unit]:
    """Return the units of an evaluation; the same arguments give the same ones."""
    firsts = [next(prompt for prompt in prompts if prompt.context == c) for c in contexts] if prompts else []
    units: list[Unit] = []

    def add(measure: str, context: int, rows: int, **more: Any) -> None:
        units.append(Unit(len(units), measure, context, rows, **more))

    if "speed" in measures:
        for turn, (run, prompt) in enumerate((run, prompt) for run in range(runs) for prompt in prompts):
            add("speed", prompt.context, len(counts.timed), prompt=prompt, run=run, turn=turn)
    if "memory" in measures:
        for prompt in firsts:
            for method in counts.written:
                add("memory", prompt.context, 1, prompt=prompt, method=method)
    if "trace" in measures and counts.drafting:
        for prompt in firsts:
            add("trace", prompt.context, len(counts.drafting), prompt=prompt)
    for span in spans:
        for context in contexts:
            add("tau", context, len(counts.drafting), span=span)
    return units


def pack(unit: Unit) -> dict[str, Any]:
    """Return a unit as JSON, to send it to another process."""
    packed = {name: getattr(unit, name) for name in ("number", "measure", "context", "rows", "method", "run", "turn")}
    if unit.prompt is not None:
        packed["prompt"] = asdict(replace(unit.prompt, ids=torch.empty(0))) | {"ids": unit.prompt.ids.tolist()}
    if unit.span is not None:
        span = unit.span
        part = span.ids[span.position - unit.context : span.position + span.length]
        names = ("document", "position", "length", "recurrence", "kind")
        packed["span"] = {name: getattr(span, name) for name in names} | {"ids": part.tolist()}
    return packed


def unpack(packed: dict[str, Any]) -> Unit:
    """Return what was packed; of a span's document only prompt and continuation are left, at their place."""
    fields = dict(packed)
    if "prompt" in fields:
        prompt = fields["prompt"]
        fields["prompt"] = Prompt(**prompt | {"ids": _ids(prompt["ids"]), "answers": tuple(prompt["answers"])})
    if "span" in fields:
        span = fields["span"]
        before = torch.zeros(span["position"] - fields["context"], dtype=torch.int64)
        fields["span"] = Span(**span | {"ids": torch.cat([before, _ids(span["ids"])])})
    return Unit(**fields)


def _ids(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)
