"""Every fixed setting, and the controller, along the same texts: what leaving the choice to the controller costs.

Free generations compare settings badly: in bfloat16 they part at a near tie, and the one that falls into a loop looks
fast. Here the text is given, a document's own continuation, so that every setting writes the same tokens, and what
differs is how many of them the draft and the context foresee, and what that takes.
"""

import copy
import math
import os
import random
import statistics
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from specx.adapters.lookup import LookupModel
from specx.api import SpeculativeModel
from specx.data.documents import Document, length_name
from specx.decoding import decode
from specx.eval.controller import GivenText
from specx.eval.methods import POLICIES, Spec, options_of, parse_methods
from specx.eval.spans import Kind, Span, choose_spans
from specx.experience import Experience
from specx.generation import Generation
from specx.target import Target

Row = dict[str, Any]
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
    """Yield a row for every kind of place, place, length, repetition and setting.

    The first place of all, at the shortest length, is run once more beforehand and not counted.

    Args:
        samples: Places a kind.
        new: Tokens written after each.
        fixed: See `fixed_settings`.
        repeats: How often the settings take turns at a place; their medians count.

    Raises:
        ValueError: If no document is long enough, or `fixed` is wrong.
    """
    assert model.draft is not None
    specs, window = [*fixed_settings(fixed), *parse_methods(",".join(OURS))], model.draft.draft_context
    experience = {spec.text: Experience() for spec in specs}
    warm = False
    for kind in KINDS:
        for number, span in enumerate(choose_spans(documents, samples, max(contexts), new, window, kind)):
            shuffled = random.Random(number)  # in a fixed order each would always follow the same other one
            turns = [shuffled.sample(specs, len(specs)) for _ in range(repeats)]
            for context in contexts:
                if not warm:
                    list(_place(model, span, min(contexts), turns[:1], experience))
                    warm = True
                for row in _place(model, span, context, turns, experience):
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
    model: SpeculativeModel, span: Span, context: int, turns: list[list[Spec]], experience: dict[str, Experience]
) -> Iterator[Row]:
    """Run all settings at one place, turn by turn, after one prefill and in the same memory.

    Two caches of the same size may differ by 3 % in what reading them takes. What a draft reads of the target is
    taken from it only while there is one.
    """
    ids = span.prompt(context).to(model.engine.device)
    text = torch.cat([ids, span.continuation.to(ids.device)])
    rows, taps = len(text) + 256, model.draft.taps if model.draft else ()
    reads = model.engine.score_layer(), tuple(taps)
    target = Target(model.engine, rows, *reads, record=True)
    target.prefill(ids)
    for spec in chain(*turns):
        target.score_layer, target.taps = (None, ()) if spec.name in ("plain", "lookup") else reads
        if ids.is_cuda:  # captures for the caches' sizes, which another setting's run may have thrown away
            _run(model, spec, ids, text, target, copy.deepcopy(experience[spec.text]))
        stats = _run(model, spec, ids, text, target, experience[spec.text]).stats
        yield {
            "document": span.document, "position": span.position, "context": context, "method": spec.text,
            "decode_tokens_per_second": stats["decode_tokens_per_second"], "tau": stats["tau"],
            "rounds_by_mode": stats["rounds_by_mode"], "load": round(os.getloadavg()[0], 2),
        }  # fmt: skip


def _run(
    model: SpeculativeModel, spec: Spec, ids: Tensor, text: Tensor, target: Target, experience: Experience
) -> Generation:
    options = options_of(spec)
    draft = None if options.pop("plain", False) else model.draft
    settings = model.settings.override(max_new_tokens=len(text) - len(ids), temperature=0.0, **options)
    out = Generation(len(ids))
    steps = decode(
        model.engine, LookupModel() if spec.name == "lookup" else draft, ids, settings, out, lambda _: False,
        target=target, chooser=GivenText(text), experience=experience,
    )  # fmt: skip
    for _ in steps:
        pass
    return out


def cells(rows: list[Row]) -> list[Row]:
    """Return for every kind and length the geometric mean of each setting's tokens/s, and ours over the best fixed.

    A place counts once, with the median of its repetitions. `apart` is the fastest of these over the slowest, the
    median of all places and settings: where the machine changed its pace as much, a few percent say nothing.
    """
    found: dict[tuple[str, int], dict[str, list[float]]] = {}
    apart: dict[tuple[str, int], list[float]] = {}
    for (kind, context, method, *_), rates_of in _by_place(rows).items():
        found.setdefault((kind, context), {}).setdefault(method, []).append(statistics.median(rates_of))
        apart.setdefault((kind, context), []).append(max(rates_of) / min(rates_of))
    table = []
    for (kind, context), methods in found.items():
        rates = {name: math.exp(sum(map(math.log, each)) / len(each)) for name, each in methods.items()}
        cell: Row = {"kind": kind, "context": context, "n": len(next(iter(methods.values()))), "rates": rates}
        cell["apart"] = statistics.median(apart[kind, context])
        for name, left_out in OURS.items():
            others = {other: rate for other, rate in rates.items() if other not in (*OURS, left_out)}
            if name in rates and others:
                best = max(others, key=others.__getitem__)
                cell[name] = {"best": best, "ratio": rates[name] / others[best]}
        table.append(cell)
    return table


def _by_place(rows: list[Row]) -> dict[tuple[Any, ...], list[float]]:
    keys, found = ("kind", "context", "method", "document", "position"), dict[tuple[Any, ...], list[float]]()
    for row in rows:
        if row["measure"] == "grid" and row["decode_tokens_per_second"] is not None:
            found.setdefault(tuple(row[key] for key in keys), []).append(row["decode_tokens_per_second"])
    return found


def markdown(rows: list[Row]) -> list[str]:
    """Return the table of `cells`."""
    table = cells(rows)
    if not table:
        return []
    names = list(dict.fromkeys(name for cell in table for name in cell["rates"]))
    head = ["places", "context", "n", *names, "specx over best", "without the context", "turns apart"]
    lines = [
        "## The controller and every fixed setting", "",
        "Decode tokens/s along given texts, the documents' own continuations: every setting writes the same tokens. "
        f"Geometric means over places of the medians of their turns. Wanted: specx at least {LEAST} of the cell's best "
        "fixed setting; without the context, of the best but lookup. Turns apart: the fastest of a place and setting "
        "over the slowest, medians; where the machine's pace changed as much, a few percent say nothing.", "",
        "| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1),
    ]  # fmt: skip
    for cell in table:
        rates = [f"{cell['rates'][name]:.1f}" if name in cell["rates"] else "-" for name in names]
        ours = [f"{cell[name]['ratio']:.3f} ({cell[name]['best']})" if name in cell else "-" for name in OURS]
        first = [cell["kind"], length_name(cell["context"]), str(cell["n"])]
        lines.append("| " + " | ".join([*first, *rates, *ours, f"{cell['apart']:.2f}"]) + " |")
    return [*lines, ""]
