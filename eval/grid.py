"""Every fixed setting, and the controller, along the same texts: what leaving the choice to the controller costs.

The texts are documents' own continuations. What differs is how many of their tokens the draft and the context foresee,
and what that takes.
"""

import copy
import os
import random
from collections import deque
from collections.abc import Iterator
from statistics import geometric_mean, median
from typing import Any

import torch

from specx.adapters.lookup import LookupModel
from specx.api import SpeculativeModel
from specx.data.documents import Document, length_name
from specx.eval.beside import STRETCH, Place, Writer, side_by_side
from specx.eval.methods import POLICIES, Spec, options_of, parse_methods
from specx.eval.spans import Kind, Span, choose_spans
from specx.experience import Experience

Row = dict[str, Any]
At = tuple[str, int]  # document and position
OURS = {"specx": "", "specx:lookup=0": "lookup"}  # the controller, and the fixed setting that it is not compared with
LEAST = 0.97  # of the best fixed setting of a cell
KINDS: tuple[Kind, ...] = ("ordinary", "recurrence")


def measure(
    model: SpeculativeModel,
    documents: list[Document],
    contexts: list[int],
    samples: int,
    new: int,
    fixed: str,
    repeats: int = 1,
) -> Iterator[Row]:
    """Yield a row for every kind of place, place, length, turn and setting.

    The first place of all, at the shortest length, is run once more beforehand and not counted.

    Args:
        samples: Places a kind.
        new: Tokens written after each.
        fixed: See `fixed_settings`.
        repeats: Turns: how often the settings write a place's text.

    Raises:
        ValueError: If no document is long enough, or `fixed` is wrong.
    """
    assert model.draft is not None
    specs, window = [*fixed_settings(fixed), *parse_methods(",".join(OURS))], model.draft.draft_context
    experience = {spec.text: Experience() for spec in specs}
    order, warm = random.Random(0), False
    for kind in KINDS:
        for span in choose_spans(documents, samples, max(contexts), new, window, kind):
            for context in contexts:
                if not warm:
                    list(_place(model, span, min(contexts), 1, specs, experience, order))
                    warm = True
                for row in _place(model, span, context, repeats, specs, experience, order):
                    yield {"measure": "grid", "kind": kind} | row


def fixed_settings(text: str) -> list[Spec]:
    """Return the settings that the controller is compared with: plain, lookup, and policies with their options.

    Raises:
        ValueError: If one is another method of `eval.methods`, or none.
    """
    specs, known = parse_methods(text), ("plain", "lookup", *POLICIES)
    for spec in specs:
        if spec.name not in known:
            raise ValueError(f"--fixed takes {', '.join(known)}, joined by commas; got {spec.text!r}")
    return specs


def _place(
    model: SpeculativeModel,
    span: Span,
    context: int,
    turns: int,
    specs: list[Spec],
    experience: dict[str, Experience],
    order: random.Random,
) -> Iterator[Row]:
    """Let all settings write the text behind one prefill, turn by turn."""
    place = Place.after(model, torch.cat([span.prompt(context), span.continuation]), context)
    if place.ids.is_cuda:  # captures for the caches' sizes, which another place's may have thrown away
        writers = [_writer(model, spec, place, copy.deepcopy(experience[spec.text])) for spec in specs]
        deque(side_by_side(writers, order), maxlen=0)
    for turn in range(turns):
        writers = [_writer(model, spec, place, experience[spec.text]) for spec in specs]
        deque(side_by_side(writers, order), maxlen=0)
        for writer in writers:
            stats = writer.out.stats
            yield {
                "document": span.document, "position": span.position, "context": context, "turn": turn,
                "method": writer.name, "decode_tokens_per_second": stats["decode_tokens_per_second"],
                "tau": stats["tau"], "rounds_by_mode": stats["rounds_by_mode"], "load": round(os.getloadavg()[0], 2),
            }  # fmt: skip


def _writer(model: SpeculativeModel, spec: Spec, place: Place, experience: Experience) -> Writer:
    options = options_of(spec)
    draft = None if options.pop("plain", False) else LookupModel() if spec.name == "lookup" else model.draft
    return Writer(spec.text, model, draft, model.settings.override(**options), place, experience)


def cells(rows: list[Row]) -> list[Row]:
    """Return for every kind and length the geometric mean of each setting's tokens/s, and ours over the best fixed.

    A place counts once, in the rates with the median of its turns, in the ratio with the median of its turns' ratios:
    in a turn all settings have met the same pace. `turns` are the lowest and the highest ratio of a turn.
    """
    found: dict[tuple[str, int], dict[str, dict[At, list[float]]]] = {}
    for row in rows:
        if row["measure"] == "grid" and row["decode_tokens_per_second"] is not None:
            places = found.setdefault((row["kind"], row["context"]), {}).setdefault(row["method"], {})
            places.setdefault((row["document"], row["position"]), []).append(row["decode_tokens_per_second"])
    table = []
    for (kind, context), methods in found.items():
        rates = {name: geometric_mean(map(median, each.values())) for name, each in methods.items()}
        cell: Row = {"kind": kind, "context": context, "n": len(next(iter(methods.values()))), "rates": rates}
        for name, left_out in OURS.items():
            others = [other for other in methods if other not in (*OURS, left_out)]
            if name in methods and others:
                cell[name] = min((_compared(methods, name, other) for other in others), key=lambda each: each["ratio"])
        table.append(cell)
    return table


def _compared(methods: dict[str, dict[At, list[float]]], name: str, other: str) -> Row:
    """Return how fast one setting was over another one, turn by turn at the places that both have."""
    places = [
        [mine / theirs for mine, theirs in zip(methods[name][place], methods[other][place], strict=False)]
        for place in methods[name].keys() & methods[other].keys()
    ]
    turns = [geometric_mean(turn) for turn in zip(*places, strict=False)]
    return {"best": other, "ratio": geometric_mean(map(median, places)), "turns": [min(turns), max(turns)]}


def markdown(rows: list[Row]) -> list[str]:
    """Return the table of `cells`."""
    table = cells(rows)
    if not table:
        return []
    names = list(dict.fromkeys(name for cell in table for name in cell["rates"]))
    head = ["places", "context", "n", *names, "specx over best", "without the context"]
    lines = [
        "## The controller and every fixed setting", "",
        "Decode tokens/s along given texts, the documents' own continuations: every setting writes the same tokens, "
        f"{STRETCH} in turn. Geometric means over places of the medians of turns. Wanted: specx at least {LEAST} "
        "of the cell's best fixed setting; without the context, of the best but lookup. Ratios are those of a place's "
        "median turn, geometric means over places; in brackets the best setting, and the lowest and highest turn, each "
        "over all places.", "",
        "| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1),
    ]  # fmt: skip
    for cell in table:
        rates = [f"{cell['rates'][name]:.1f}" if name in cell["rates"] else "-" for name in names]
        ours = [_said(cell[name]) if name in cell else "-" for name in OURS]
        first = [cell["kind"], length_name(cell["context"]), str(cell["n"])]
        lines.append("| " + " | ".join([*first, *rates, *ours]) + " |")
    return [*lines, ""]


def _said(found: Row) -> str:
    lowest, highest = found["turns"]
    return f"{found['ratio']:.3f} ({found['best']}; {lowest:.3f} to {highest:.3f})"
