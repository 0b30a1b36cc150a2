"""Drafts of one target side by side: `python -m specx.eval.drafts --out DIR demo,full demo-eagle3,full ...`.

An entry is [LABEL=]DRAFT,METHOD: a known name or a directory, and a method as `specx eval` takes it, such as `full` or
`retrieval:draft_context=2048`. tau is that of `specx.eval.acceptance`, with one prefill of the target for all entries;
speed that of `specx.eval.speed`: all of them, and plain decoding, in turn on each prompt.
"""

import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from specx.eval.methods import Method, Spec, build, options_of, parse_methods  # first: it sets HF's best setting

# isort: split
import torch

from specx.adapters.classic import ClassicModel
from specx.adapters.eagle import EagleModel
from specx.adapters.hub import fetch
from specx.adapters.loader import load_draft
from specx.adapters.longspec import LongSpecModel
from specx.adapters.names import locate
from specx.api import SpeculativeModel, load
from specx.config import LoadConfig
from specx.data.documents import length_name, parse_lengths
from specx.data.source import read_data
from specx.draft import DraftModel
from specx.eval import acceptance, speed
from specx.eval.bench_step import cache_bytes
from specx.eval.chosen import choose_prompts
from specx.eval.facts import facts_of
from specx.eval.hits import WatchedTarget
from specx.eval.ledger import Ledger
from specx.eval.spans import Span, choose_spans
from specx.eval.summary import plain_rates, speed_ups
from specx.eval.tables import Table, tables

Row = dict[str, Any]
_SPARE = 256  # rows of the target's cache for trees


@dataclass(frozen=True, slots=True)
class Entry:
    """A draft with a method; `label` stands for both in rows and tables."""

    label: str
    model: SpeculativeModel
    spec: Spec

    @property
    def forwards(self) -> int:
        """Forwards of the draft for one tree: the root's, and one a level that is expanded."""
        tree = self.model.settings.override(**self.spec.options).tree
        return 1 + min(tree.depth, tree.nodes - 2)


def parse_entry(text: str) -> tuple[str, str, Spec]:
    """Read [LABEL=]DRAFT,METHOD as (label, draft, method).

    Raises:
        ValueError: If it is none, or the method no policy.
    """
    draft, comma, method = text.partition(",")
    label, equals, given = draft.partition("=")
    draft = given if equals else draft
    if not comma or not draft or not label:
        raise ValueError(f"an entry is [LABEL=]DRAFT,METHOD, such as demo-eagle3,full; got {text!r}")
    specs = parse_methods(method)
    if len(specs) > 1 or not specs[0].drafts:
        raise ValueError(f"entry {text!r} needs one method with a draft: full, window, retrieval or auto")
    return label if equals else f"{draft} {method}", draft, specs[0]


def entries_of(texts: Sequence[str], target: SpeculativeModel) -> list[Entry]:
    """Load the drafts, each once, for a target.

    Raises:
        ValueError: An entry that is none, a draft that is unknown or does not fit, a label twice.
    """
    parsed = [parse_entry(text) for text in texts]
    labels = [label for label, _, _ in parsed]
    if len(set(labels)) < len(labels):
        raise ValueError(f"a label is given twice: {', '.join(labels)}")
    config = LoadConfig(device=str(target.engine.device))
    drafts = {
        name: load_draft(name, fetch(locate(name, "draft"), "draft"), target.engine, None, config)
        for name in dict.fromkeys(draft for _, draft, _ in parsed)
    }
    return [
        Entry(label, SpeculativeModel(target.engine, drafts[draft], target.tokenizer, target.settings), spec)
        for label, draft, spec in parsed
    ]


def token_bytes(draft: DraftModel) -> int:
    """Return the bytes of keys and values that a draft's own cache holds for a token.

    Raises:
        ValueError: A draft that has no such cache.
    """
    if isinstance(draft, ClassicModel):
        return cache_bytes(draft.model.config, 1, draft.model.dtype)
    if isinstance(draft, EagleModel):
        head = draft.head.head
        return 2 * head.layers * head.kv_heads * head.head_dim * draft.head.fc.weight.dtype.itemsize
    if isinstance(draft, LongSpecModel):
        weight: Any = draft.block.self_attn["k_proj"].weight
        return 2 * int(weight.shape[0]) * weight.dtype.itemsize
    raise ValueError(f"draft {draft.name} has no keys and values of its own")


def taus(entries: Sequence[Entry], spans: list[Span], contexts: list[int]) -> Iterator[Row]:
    """Yield a row for every span, context and entry."""
    engine = entries[0].model.engine
    taps = tuple(dict.fromkeys(tap for each in entries for tap in (each.model.draft.taps if each.model.draft else ())))
    for span in spans:
        for context in contexts:
            ids = span.prompt(context).to(engine.device)
            target = WatchedTarget(engine, context + span.length + _SPARE, engine.score_layer(), taps, record=True)
            for each in entries:
                settings = each.model.settings.override(**options_of(each.spec))
                found = acceptance.along(each.model, target, ids, span, settings)
                yield acceptance.place(span, context, each.label) | found


def speeds(entries: Sequence[Entry], data: str, documents: Any, lengths: list[int], given: Row) -> Iterator[Row]:
    """Yield a row for every prompt and entry, and two for plain decoding, one a cache."""
    methods: dict[str, Method] = build(parse_methods("ar"), entries[0].model)
    methods |= {each.label: build([each.spec], each.model)[each.spec.text] for each in entries}
    note = lambda line: click.echo(line, err=True)  # noqa: E731
    prompts = choose_prompts(data, documents, lengths, given["samples"], given["max_new_tokens"], note)
    by_label = {each.label: each for each in entries}
    for row in speed.measure(entries[0].model, prompts, methods, given["max_new_tokens"]):
        each = by_label.get(row["method"])
        if each is None or not row["steps"]:
            yield row
            continue
        assert each.model.draft is not None
        yield row | {
            "draft_kv_bytes": row["draft_kv_tokens"] * token_bytes(each.model.draft),
            "ms_forward": row["ms_draft"] / row["steps"] / each.forwards,
        }


def side_by_side(rows: list[Row]) -> list[Table]:
    """Return what the entries cost, by context: bytes, milliseconds, decode ratio."""
    timed = [row for row in rows if row["measure"] == "speed"]
    ours = list(dict.fromkeys(row["method"] for row in timed if "ms_forward" in row))
    contexts, base = sorted({row["context"] for row in timed}), plain_rates(timed)
    if not ours:
        return []

    def cell(method: str, context: int, kind: str) -> str:
        own = [row for row in timed if (row["method"], row["context"]) == (method, context) and "ms_forward" in row]
        found = speed_ups(own, base) if kind == "ratio" else [row[kind] for row in own]
        if not found:
            return "-"
        middle = statistics.median(found)
        return f"{middle / 1024:.0f}" if kind == "draft_kv_bytes" else f"{middle:.2f}"

    header = ["draft", *map(length_name, contexts)]
    shown = (
        ("draft_kv_bytes", "The draft's own keys and values", "KiB in the end, medians over prompts."),
        ("ms_forward", "A forward of the draft", "Milliseconds of a round's drafting over its forwards, medians."),
        ("ratio", "Decode ratio", "To Hugging Face's plain decoding with the faster of its caches, medians."),
    )
    return [
        Table(title, note, header, [[method, *(cell(method, c, kind) for c in contexts)] for method in ours])
        for kind, title, note in shown
    ]


@click.command(help=__doc__)
@click.argument("entries", nargs=-1, required=True)
@click.option("--target", default="demo", show_default=True)
@click.option("--data", default="stdlib", show_default=True, help="As specx eval takes it.")
@click.option("--lengths", default="512,2K,8K,15.5K", show_default=True)
@click.option("--measure", default="tau,speed", show_default=True)
@click.option("--spans", default=20, show_default=True, type=click.IntRange(1), help="Ordinary spans, for tau.")
@click.option("--samples", default=2, show_default=True, type=click.IntRange(1), help="Prompts a length, for speed.")
@click.option("--max-new-tokens", default=96, show_default=True, type=click.IntRange(8), help="For speed.")
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path))
def main(entries: tuple[str, ...], **given: Any) -> None:
    out, measures = given["out"], [part.strip() for part in given["measure"].split(",")]
    try:
        if set(measures) - {"tau", "speed"}:
            raise ValueError(f"--measure takes tau and speed; got {given['measure']!r}")
        if (out / "rows.jsonl").exists():
            raise ValueError(f"{out / 'rows.jsonl'} already holds results: give another --out, or remove it")
        contexts = parse_lengths(given["lengths"])
        for text in entries:
            locate(parse_entry(text)[1], "draft")
        target = load(given["target"], profile=False)
        own = entries_of(entries, target)
        documents = read_data(given["data"], target.tokenizer, given["lengths"], given["samples"]).documents
        window = min(each.model.draft.draft_context for each in own if each.model.draft)
        spans = choose_spans(documents, given["spans"], contexts[-1], 128, window, "ordinary")
    except (ValueError, RuntimeError) as error:
        raise click.UsageError(str(error)) from error
    command = f"python -m specx.eval.drafts {shlex.join(sys.argv[1:])}"
    facts = facts_of(command, given["data"], given["target"], target)
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    with Ledger(out / "rows.jsonl") as ledger, torch.no_grad():
        found = [taus(own, spans, contexts)] if "tau" in measures else []
        found += [speeds(own, given["data"], documents, contexts, given)] if "speed" in measures else []
        for row in (row for part in found for row in part):
            ledger.append(row)
            rows.append(row)
            click.echo(f"{row['measure']} {row['context']} {row['method']}", err=True)
    made = [*tables(rows), *side_by_side(rows)]
    head = [f"- {name}: {value}" for name, value in facts.items() if name != "profile"]
    text = "\n".join(["# Drafts side by side", "", *head, "", *(table.markdown() for table in made)])
    (out / "summary.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
