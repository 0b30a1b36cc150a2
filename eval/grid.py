"""Every fixed setting, and the controller, along the same texts: what leaving the choice to the controller costs.

Free generations compare settings badly: in bfloat16 they part at a near tie, and the one that falls into a loop looks
fast. Here the text is given, a document's own continuation, so that every setting writes the same tokens, and what
differs is how many of them the draft and the context foresee, and what that takes.
"""

import copy
import os
import random
from collections.abc import Iterator
from statistics import geometric_mean, median
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
Place = tuple[str, int]
OURS = {"specx": "", "specx:lookup=0": "lookup"}  # the controller, and the fixed setting that it is not compared with
LEAST = 0.97  # of the best fixed setting of a cell
KINDS: tuple[Kind, ...] = ("ordinary", "recurrence")
_STRETCH = 16  # tokens that a setting writes before the next one has its turn


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
    ids = span.prompt(context).to(model.engine.device)
    text = torch.cat([ids, span.continuation.to(ids.device)])
    taps = model.draft.taps if model.draft else ()
    target = Target(model.engine, len(text) + 256, model.engine.score_layer(), tuple(taps), record=True)
    target.prefill(ids)
    if ids.is_cuda:  # captures for the caches' sizes, which another place's may have thrown away
        _turn([_Run(model, spec, ids, text, target, copy.deepcopy(experience[spec.text])) for spec in specs], order)
    for turn in range(turns):
        runs = [_Run(model, spec, ids, text, target, experience[spec.text]) for spec in specs]
        _turn(runs, order)
        for run in runs:
            stats = run.out.stats
            yield {
                "document": span.document, "position": span.position, "context": context, "turn": turn,
                "method": run.method, "decode_tokens_per_second": stats["decode_tokens_per_second"],
                "tau": stats["tau"], "rounds_by_mode": stats["rounds_by_mode"], "load": round(os.getloadavg()[0], 2),
            }  # fmt: skip


def _turn(runs: list["_Run"], order: random.Random) -> None:
    """Let every setting write a stretch of the text, then the next one, so that the machine's pace falls on all alike.

    Within a stretch their order is by chance: else each would always follow the same other one.
    """
    while pending := [run for run in runs if not run.done]:
        end = min(run.written for run in pending) + _STRETCH
        for run in order.sample(pending, len(pending)):
            run.write(end)


class _Run:
    """One setting that writes a text along with others, all in one target's cache.

    What they write is the same, so that the cache of one is that of all; and two caches of the same size may differ by
    3 % in what reading them takes. What a draft reads of the target is taken from it only while there is one.
    """

    def __init__(
        self, model: SpeculativeModel, spec: Spec, ids: Tensor, text: Tensor, target: Target, experience: Experience
    ) -> None:
        self.method, self.text, self.out, self.done = spec.text, text, Generation(len(ids)), False
        self.target = copy.copy(target)
        if spec.name in ("plain", "lookup"):
            self.target.score_layer, self.target.taps = None, ()
        options = options_of(spec)
        draft = None if options.pop("plain", False) else model.draft
        settings = model.settings.override(max_new_tokens=len(text) - len(ids), temperature=0.0, **options)
        self._steps = decode(
            model.engine, LookupModel() if spec.name == "lookup" else draft, ids, settings, self.out, lambda _: False,
            target=self.target, chooser=GivenText(text), experience=experience,
        )  # fmt: skip
        next(self._steps)  # the prefill's token

    @property
    def written(self) -> int:
        """Tokens so far, the prompt's included."""
        return self.out.prompt_tokens + len(self.out.tokens)

    def write(self, end: int) -> None:
        """Go on until there are `end` tokens, or the text has ended."""
        if self.written >= end:
            return
        self._resume()
        while self.written < end and not self.done:
            self.done = next(self._steps, None) is None

    def _resume(self) -> None:
        """Bring the cache to where this setting stopped: others have gone on from there, or are not as far."""
        cache, length = self.target.cache, self.written - 1  # the newest token is the next root
        cache.truncate(min(cache.committed, length))
        missing = range(cache.committed, length)
        if missing:
            rows = torch.arange(missing.start, missing.stop, device=self.text.device)
            self.target.model.forward(self.text[rows], rows, cache)
            cache.commit(range(len(rows)))


def cells(rows: list[Row]) -> list[Row]:
    """Return for every kind and length the geometric mean of each setting's tokens/s, and ours over the best fixed.

    A place counts once, in the rates with the median of its turns, in the ratio with the median of its turns' ratios:
    in a turn all settings have met the same pace. `turns` are the lowest and the highest ratio of a turn.
    """
    found: dict[tuple[str, int], dict[str, dict[Place, list[float]]]] = {}
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


def _compared(methods: dict[str, dict[Place, list[float]]], name: str, other: str) -> Row:
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
        f"{_STRETCH} in turn. Geometric means over places of the medians of turns. Wanted: specx at least {LEAST} "
        "of the cell's best fixed setting; without the context, of the best but lookup. Ratios are medians of those "
        "within a turn, with the lowest and highest turn.", "",
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
