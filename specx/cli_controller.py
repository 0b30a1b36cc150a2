"""`specx bench controller`."""

import json
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from specx.cli_options import model_options
from specx.config import LoadConfig

if TYPE_CHECKING:
    from specx.api import SpeculativeModel


_FIXED = "plain,lookup,full,window,retrieval"


@click.command("controller")
@model_options
@click.option("--data", default="stdlib", show_default=True, help="stdlib, a JSONL file or a folder of them.")
@click.option("--lengths", default="2K,8K", show_default=True, help="Prompt lengths.")
@click.option("--samples", default=2, show_default=True, type=click.IntRange(1), help="Prompts a kind and length.")
@click.option(
    "--repeats", default=3, show_default=True, type=click.IntRange(1), help="Turns that a median is taken of."
)
@click.option("--new", default=384, show_default=True, type=click.IntRange(16), help="Tokens generated after each.")
@click.option("--stretch", default=512, show_default=True, type=click.IntRange(64), help="A third of the given text.")
@click.option("--fixed", default=_FIXED, show_default=True, help="Settings that the grid compares with.")
@click.option(
    "--measure", default="adversarial,return", show_default=True, help="adversarial, return and grid, by commas."
)
@click.option("--out", metavar="DIR", required=True, help="Where rows.jsonl, summary.md and return.svg are written.")
def controller(**given: Any) -> None:
    """Measure the controller: on hopeless prompts, on a text where drafting stops paying and pays again, and beside
    every fixed setting along given texts.
    """
    wanted = [part.strip() for part in given["measure"].split(",")]
    if not wanted or set(wanted) - {"adversarial", "return", "grid"}:
        raise click.UsageError(f"--measure takes adversarial, return and grid; got {given['measure']!r}")
    out = Path(given["out"])
    if (out / "rows.jsonl").exists() and (out / "rows.jsonl").stat().st_size:
        raise click.UsageError(f"{out / 'rows.jsonl'} already holds results: give another --out, or remove it")
    from specx.api import load
    from specx.data.documents import parse_lengths
    from specx.eval.grid import fixed_settings

    given["lengths"] = parse_lengths(given["lengths"])
    fixed_settings(given["fixed"])
    options = {each.name: given[each.name] for each in fields(LoadConfig) if given[each.name] is not None}
    model = load(given["target"], given["draft"], specextend=given["specextend"], **options)
    if model.draft is None or model.tokenizer is None:
        raise click.UsageError("the controller is measured with a draft, and a target that has a tokenizer")
    _measure(model, given, wanted, out)


def _measure(model: "SpeculativeModel", given: dict[str, Any], wanted: list[str], out: Path) -> None:
    from specx.data.documents import read_documents
    from specx.eval import controller as measuring
    from specx.eval import grid
    from specx.eval.facts import facts_of

    documents, rows = read_documents(given["data"], model.tokenizer), list[dict[str, Any]]()
    lengths = given["lengths"]
    measured = []
    if "adversarial" in wanted:
        measured.append(
            measuring.adversarial(model, documents, lengths, given["samples"], given["new"], given["repeats"])
        )
    if "return" in wanted:
        measured.append(measuring.returning(model, documents, lengths[0], given["stretch"]))
    if "grid" in wanted:
        counts = given["samples"], given["new"], given["fixed"], given["repeats"]
        measured.append(grid.measure(model, documents, lengths, *counts))
    facts = facts_of(shlex.join(["specx", *sys.argv[1:]]), given["data"], given["target"], model)
    out.mkdir(parents=True, exist_ok=True)
    try:
        with (out / "rows.jsonl").open("w", encoding="utf-8") as log:
            for part in measured:
                for row in part:
                    rows.append(row)
                    log.write(json.dumps(row) + "\n")
                    log.flush()
                    if row["measure"] != "return":
                        rate, place = row["decode_tokens_per_second"], row.get("prompt") or row["document"]
                        said = "-" if rate is None else f"{rate:.1f}"
                        click.echo(f"{row['context']:>6} {place:<20} {row['method']:<14} {said}", err=True)
    finally:
        summary = "\n".join([measuring.markdown(facts, rows), *grid.markdown(rows)])
        (out / "summary.md").write_text(summary, encoding="utf-8")
        _draw(rows, out)
    click.echo(summary)


def _draw(rows: list[dict[str, Any]], out: Path) -> None:
    from specx.eval.controller import binned
    from specx.eval.plot import along_the_text

    mine = [row for row in rows if row["measure"] == "return"]
    if mine:
        stretch = mine[0]["stretch"]
        series = {method: binned(mine, method) for method in dict.fromkeys(row["method"] for row in mine)}
        title = f"code, {stretch} random tokens, code again, after {mine[0]['context']} tokens"
        (out / "return.svg").write_text(along_the_text(series, [stretch, 2 * stretch], title), encoding="utf-8")
