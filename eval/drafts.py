"""Drafts of one target side by side: `python -m specx.eval.drafts --out DIR demo,full demo-eagle3,full ...`.

An entry is [LABEL=]DRAFT,METHOD: a known name or a directory, and a method as `specx eval` takes it, such as `full` or
`retrieval:draft_context=2048`. tau is that of `specx.eval.acceptance`, with one prefill of the target for all entries;
speed that of `specx.eval.speed`: all of them, and plain decoding, in turn on each prompt. cpu is the time that one
thread worked on drafting, which other work on the machine does not stretch; it wants OMP_NUM_THREADS=1.
"""

import shlex
import statistics
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click

from specx.eval.drafting import entries_of, parse_entry, speeds, taus, worked  # first: it sets HF's best setting

# isort: split
import torch

from specx.adapters.names import locate
from specx.api import load
from specx.data.documents import length_name, parse_lengths
from specx.data.source import read_data
from specx.eval.chosen import choose_prompts
from specx.eval.facts import facts_of
from specx.eval.ledger import Ledger
from specx.eval.spans import choose_spans
from specx.eval.summary import plain_rates, speed_ups
from specx.eval.tables import Table, tables

Row = dict[str, Any]
MEASURES = ("tau", "speed", "cpu")


def side_by_side(rows: list[Row], measure: str) -> list[Table]:
    """Return what the entries cost, by context, of the rows of "speed" or "cpu"."""
    timed = [row for row in rows if row["measure"] == measure]
    ours = list(dict.fromkeys(row["method"] for row in timed if "ms_forward" in row))
    contexts, base = sorted({row["context"] for row in timed}), plain_rates(timed)
    if not ours:
        return []

    def cell(method: str, context: int, kind: str) -> str:
        own = [row for row in timed if (row["method"], row["context"]) == (method, context)]
        found = speed_ups(own, base) if kind == "ratio" else [row[kind] for row in own]
        if not found:
            return "-"
        middle = statistics.median(found)
        return f"{middle / 1024:.0f}" if kind == "draft_kv_bytes" else f"{middle:.2f}"

    time = "Milliseconds" if measure == "speed" else "Milliseconds of one thread's work"
    shown = [
        ("draft_kv_bytes", "The draft's own keys and values", "KiB in the end, medians over prompts."),
        (
            "ms_forward",
            "A forward of the draft",
            f"{time} in a round's drafting, over its forwards; medians.",
        ),
    ]
    if measure == "speed":
        about = "To Hugging Face's plain decoding with the faster of its caches; medians."
        shown.append(("ratio", "Decode ratio", about))
    else:
        shown.append(("ms_verify", "A verification", f"{time}; medians."))
    header = ["draft", *map(length_name, contexts)]
    return [
        Table(title, note, header, [[method, *(cell(method, c, kind) for c in contexts)] for method in ours])
        for kind, title, note in shown
    ]


def markdown(facts: Row, rows: list[Row]) -> str:
    """Return the whole summary."""
    made = [*tables(rows), *(table for each in MEASURES[1:] for table in side_by_side(rows, each))]
    head = [f"- {name}: {value}" for name, value in facts.items() if name != "profile"]
    return "\n".join(["# Drafts side by side", "", *head, "", *(table.markdown() for table in made)])


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
        if not measures or set(measures) - set(MEASURES):
            raise ValueError(f"--measure takes {', '.join(MEASURES)}; got {given['measure']!r}")
        if (out / "rows.jsonl").exists():
            raise ValueError(f"{out / 'rows.jsonl'} already holds results: give another --out, or remove it")
        parse_lengths(given["lengths"])
        for text in entries:
            locate(parse_entry(text)[1], "draft")
        facts, parts = _prepared(entries, measures, given)
    except (ValueError, RuntimeError) as error:
        raise click.UsageError(str(error)) from error
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    try:
        with Ledger(out / "rows.jsonl") as ledger, torch.no_grad():
            for row in (row for part in parts for row in part):
                ledger.append(row)
                rows.append(row)
                click.echo(f"{row['measure']} {row['context']} {row['method']}", err=True)
    except BaseException as error:
        facts = {"INCOMPLETE": f"ended by {type(error).__name__} {error}".strip()} | facts
        raise
    finally:
        (out / "summary.md").write_text(markdown(facts, rows), encoding="utf-8")


def _prepared(entries: tuple[str, ...], measures: list[str], given: Row) -> tuple[Row, list[Iterator[Row]]]:
    """Load everything; return what the numbers depend on, and the measurements."""
    contexts, new = parse_lengths(given["lengths"]), given["max_new_tokens"]
    target = load(given["target"], profile=False)
    if "cpu" in measures and (target.engine.device.type != "cpu" or torch.get_num_threads() > 1):
        raise ValueError("cpu counts the work of one thread on a CPU: set OMP_NUM_THREADS=1, or leave it out")
    own = entries_of(entries, target)
    documents = read_data(given["data"], target.tokenizer, given["lengths"], given["samples"]).documents
    facts = facts_of(f"python -m specx.eval.drafts {shlex.join(sys.argv[1:])}", given["data"], given["target"], target)
    parts: list[Iterator[Row]] = []
    if "tau" in measures:
        window = min(each.model.draft.draft_context for each in own if each.model.draft)
        parts.append(
            taus(own, choose_spans(documents, given["spans"], contexts[-1], 128, window, "ordinary"), contexts)
        )
    if {"speed", "cpu"} & set(measures):
        prompts = choose_prompts(
            given["data"], documents, contexts, given["samples"], new, partial(click.echo, err=True)
        )
        parts += [each(own, prompts, new) for name, each in (("speed", speeds), ("cpu", worked)) if name in measures]
    return facts, parts


if __name__ == "__main__":
    main()
