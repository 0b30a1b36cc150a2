"""What the controller is for, measured: never slower where drafting is hopeless, and back where it pays again."""

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from specx.adapters.classic import ClassicModel
from specx.api import SpeculativeModel
from specx.data.documents import Document
from specx.eval import speed
from specx.eval.beside import Place, Writer, side_by_side
from specx.eval.methods import build, parse_methods
from specx.eval.speed import Prompt
from specx.experience import Experience
from specx.hf import HFModel

Row = dict[str, Any]
KINDS = ("random tokens", "shuffled text", "random draft", "temperature 1.5")
METHODS = "ar,plain,specx"
LEAST = 0.97  # of plain decoding: what the worst prompt must keep
_BIN = 32  # tokens over which the plot averages


def adversarial(
    model: SpeculativeModel, documents: list[Document], contexts: list[int], samples: int, new: int, repeats: int = 1
) -> Iterator[Row]:
    """Yield a row for every kind of hopeless prompt, length, sample, repetition and method; `kind` says which it is.

    Raises:
        ValueError: If the documents are too short.
    """
    for kind in KINDS:
        pair = _hopeless(model, kind)
        if pair is None:
            continue
        prompts = [
            Prompt(f"{kind} {number}", context, _prompt(model, documents, kind, context, number))
            for context in contexts
            for number in range(samples)
            for _ in range(repeats)
        ]
        for row in speed.measure(pair, prompts, build(parse_methods(METHODS), pair), new):
            yield row | {"measure": "adversarial", "kind": kind}


def _hopeless(model: SpeculativeModel, kind: str) -> SpeculativeModel | None:
    """Return the pair that a kind is measured with; None where there is none of this draft."""
    settings = model.settings.override(temperature=1.5) if kind == "temperature 1.5" else model.settings
    draft = model.draft
    if kind == "random draft":
        if not isinstance(draft, ClassicModel):
            return None
        torch.manual_seed(0)
        small = type(draft.model.model)(draft.model.config).eval().to(draft.model.device, draft.model.dtype)
        plug = HFModel(small, draft.model.backend, draft.model.hybrid, draft.model.flash_prefill)
        draft = ClassicModel("random weights", plug, model.engine.vocab_size, draft.draft_context, "the same")
    return SpeculativeModel(model.engine, draft, model.tokenizer, settings)


def _prompt(model: SpeculativeModel, documents: list[Document], kind: str, context: int, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * context + number)
    if kind == "random tokens":
        return torch.randint(model.engine.vocab_size, (context,), generator=generator)
    ids = _piece(documents, number, context)
    return ids[torch.randperm(context, generator=generator)] if kind == "shuffled text" else ids


def _piece(documents: list[Document], number: int, tokens: int) -> Tensor:
    """Return `tokens` tokens from the middle of the number-th of the documents that are long enough."""
    enough = [each.ids for each in documents if len(each.ids) >= tokens]
    if not enough:
        longest = max((len(each.ids) for each in documents), default=0)
        raise ValueError(f"the data's longest document has {longest} tokens; lower --lengths below {tokens}")
    ids = enough[number % len(enough)]
    first = (len(ids) - tokens) // 2
    return ids[first : first + tokens]


def returning(model: SpeculativeModel, documents: list[Document], context: int, stretch: int) -> Iterator[Row]:
    """Yield a row a round along a text whose middle third is random tokens: position, mode, tokens, milliseconds.

    The same text is read plainly, with the fixed tree and with the controller.

    Args:
        context: Tokens of the prompt.
        stretch: Tokens of each third.
    """
    text = _piece(documents, 0, context + 3 * stretch).clone()
    middle = slice(context + stretch, context + 2 * stretch)
    text[middle] = torch.randint(model.engine.vocab_size, (stretch,), generator=torch.Generator().manual_seed(0))
    methods: dict[str, dict[str, Any]] = {
        "plain": {},
        "fixed": {"controller": "off", "lookup": True},
        "controller": {"controller": "auto", "lookup": True},
    }
    place, experience = Place.after(model, text, context), Experience()
    for warm in (True, False):
        writers = [
            Writer(
                name,
                model,
                None if name == "plain" else model.draft,
                model.settings.override(**each),
                place,
                experience,
            )
            for name, each in methods.items()
        ]
        for row in _rounds(writers):
            if not warm:
                yield row | {"measure": "return", "stretch": stretch, "context": context}
            elif row["position"] >= 64:
                break


def _rounds(writers: Sequence[Writer]) -> Iterator[Row]:
    before = {writer.name: Counter[str]() for writer in writers}
    for writer, piece, ms in side_by_side(writers, random.Random(0)):
        (mode,) = writer.out.modes - before[writer.name]
        before[writer.name] = writer.out.modes.copy()
        yield {
            "method": writer.name, "position": len(writer.out.tokens), "mode": mode, "tokens": len(piece.tokens),
            "ms": round(ms, 3), "sources": list(piece.sources),
        }  # fmt: skip


def binned(rows: list[Row], method: str) -> list[Row]:
    """Return tokens/s and the commonest mode of a method along the text, a row for every `_BIN` tokens."""
    parts: dict[int, list[Row]] = {}
    for row in rows:
        if row["measure"] == "return" and row["method"] == method:
            parts.setdefault((row["position"] - row["tokens"]) // _BIN, []).append(row)
    found = []
    for place, each in sorted(parts.items()):
        modes = [row["mode"] for row in each]
        rate = 1000 * sum(row["tokens"] for row in each) / sum(row["ms"] for row in each)
        found.append({"position": place * _BIN, "rate": rate, "mode": max(set(modes), key=modes.count)})
    return found


def ratios(rows: list[Row]) -> list[Row]:
    """Return, for each kind and length, specx over plain decoding: of ours, and of the better of Hugging Face's.

    Prompts that a method has no rate for, because the run was broken off or its first token ended it, are left out.
    """
    cells: dict[tuple[str, int], dict[str, dict[str, list[float]]]] = {}
    for row in rows:
        if row["measure"] == "adversarial" and row["decode_tokens_per_second"] is not None:
            prompt = cells.setdefault((row["kind"], row["context"]), {}).setdefault(row["prompt"], {})
            prompt.setdefault(row["method"], []).append(row["decode_tokens_per_second"])
    found = []
    for (kind, context), prompts in cells.items():
        whole = [each for each in prompts.values() if {"ar", "ar-static", "plain", "specx"} <= each.keys()]
        if not whole:
            continue
        pairs = [_ratios_of(each) for each in whole]
        plain, own = zip(*pairs, strict=True)
        found.append(
            {
                "kind": kind, "context": context, "prompts": len(pairs),
                "over plain": _mean(plain), "over HF": _mean(own), "worst over plain": min(plain),
            }
        )  # fmt: skip
    return found


def _ratios_of(rates: dict[str, list[float]]) -> tuple[float, float]:
    """Return the medians of the turns' ratios: within a turn the machine changes its pace least."""
    turns = list(zip(*(rates[name] for name in ("specx", "plain", "ar", "ar-static")), strict=False))
    return median(own / plain for own, plain, *_ in turns), median(own / max(theirs) for own, _, *theirs in turns)


def _mean(values: tuple[float, ...]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def markdown(facts: dict[str, Any], rows: list[Row]) -> str:
    """Return the summary: facts, the table of hopeless prompts, the table of the text that leaves and returns."""
    lines = ["# The controller", "", *(f"- {key}: {value}" for key, value in facts.items()), ""]
    found = ratios(rows)
    if found:
        lines += [
            "## Hopeless prompts", "",
            "Decode tokens/s with the controller over plain decoding; geometric means over prompts of the medians of "
            f"their turns' ratios. Wanted: at least {LEAST}.", "",
            "| prompts | context | n | over plain of ours | over Hugging Face's best | worst over plain |",
            "|---|---:|---:|---:|---:|---:|",
        ]  # fmt: skip
        lines += [
            f"| {row['kind']} | {row['context']} | {row['prompts']} | {row['over plain']:.3f} | "
            f"{row['over HF']:.3f} | {row['worst over plain']:.3f} |"
            for row in found
        ]
        lines.append("")
    both = [row for row in rows if row["measure"] == "return"]
    if both:
        lines += [*_thirds(both), "", "`return.svg` shows mode and tokens/s against position.", ""]
    return "\n".join(lines)


def _thirds(rows: list[Row]) -> list[str]:
    stretch = rows[0]["stretch"]
    lines = [
        "## A text whose middle makes drafting useless", "",
        f"{stretch} tokens of code, as many random tokens, and {stretch} of code again.", "",
        "| method | part | tokens/s | rounds by mode |", "|---|---|---:|---|",
    ]  # fmt: skip
    for method in dict.fromkeys(row["method"] for row in rows):
        for number, part in enumerate(("code", "random", "code again")):
            mine = [
                row
                for row in rows
                if row["method"] == method and (row["position"] - row["tokens"]) // stretch == number
            ]
            modes = [row["mode"] for row in mine]
            counts = ", ".join(f"{mode} {modes.count(mode)}" for mode in dict.fromkeys(modes))
            rate = 1000 * sum(row["tokens"] for row in mine) / max(1e-9, sum(row["ms"] for row in mine))
            lines.append(f"| {method} | {part} | {rate:.1f} | {counts} |")
    return lines
