"""`specx eval`: parse, call `specx.eval.runner`, print."""

import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from specx import output
from specx.cli_options import GENERATION, model_options, options_of
from specx.config import LoadConfig

MEASURES = ("tau", "speed", "memory")
METHODS = "ar,hf-assisted,hf-lookup,full,window,retrieval,auto"


@click.command("eval")
@model_options
@click.option("--data", required=True, metavar="stdlib|FILE|DIR", help='Held-out library source, or JSONL with "text".')
@click.option("--lengths", default="512,2K,8K,16K", show_default=True, help="Prompt lengths in the target's tokens.")
@click.option("--samples", default=4, show_default=True, type=click.IntRange(1), help="Prompts a length, for speed.")
@click.option("--methods", default=METHODS, show_default=True, help="Also plain, and NAME:option=value:...")
@click.option("--measure", default="tau,speed,memory", show_default=True, help="Which of them.")
@click.option("--spans", default=20, show_default=True, type=click.IntRange(1), help="Spans of each kind, for tau.")
@click.option("--span-tokens", default=128, show_default=True, type=click.IntRange(16), help="Tokens of a span.")
@click.option("--out", default="specx-eval", show_default=True, metavar="DIR", help="Rows (JSONL) and a summary.")
@options_of(*GENERATION)
def evaluate(**given: Any) -> None:
    """Measure tau, speed and memory of methods against context length.

    \b
    tau     nested prompts: the same place and continuation, ever more context before it
    speed   all methods in turn on each prompt; every output is compared with plain greedy decoding
    memory  one process a cell
    """
    from specx.data.documents import parse_lengths, read_documents
    from specx.eval.methods import parse_methods

    contexts, specs = parse_lengths(given["lengths"]), parse_methods(given["methods"])
    measures = tuple(dict.fromkeys(part.strip() for part in given["measure"].split(",") if part.strip()))
    if not measures or set(measures) - set(MEASURES):
        raise ValueError(f"--measure takes {', '.join(MEASURES)}, separated by commas; got {given['measure']!r}")
    if given["policy"] is not None:
        raise ValueError("specx eval compares policies: name them in --methods (full,window,retrieval,auto)")
    if (Path(given["out"]) / "rows.jsonl").exists():
        raise ValueError(f"{given['out']} already holds results: give another --out, or remove it")
    with output.quitting_at_ctrl_c():
        from specx.api import load
        from specx.eval.runner import Job, run

        loading = _loading(given)
        model = load(**loading)
        if model.tokenizer is None:
            raise ValueError("the target has no tokenizer files; save its tokenizer in that directory")
        documents = read_documents(given["data"], model.tokenizer)
    job = Job(
        data=given["data"], contexts=contexts, specs=specs, measures=measures, samples=given["samples"],
        spans=given["spans"], span_tokens=given["span_tokens"], new=given["max_new_tokens"] or 128, loading=loading,
        out=Path(given["out"]), command=shlex.join(["specx", *sys.argv[1:]]),
    )  # fmt: skip
    from specx.eval.tables import tables

    rows = run(job, model, documents, lambda line: click.echo(line, err=True))
    _print(tables(rows))
    click.echo(f"written: {job.out / 'rows.jsonl'}, {job.out / 'summary.md'}", err=True)


def _loading(given: dict[str, Any]) -> dict[str, Any]:
    names = [each.name for config in (LoadConfig, *GENERATION) for each in fields(config)]
    options = {name: given[name] for name in names if given.get(name) not in (None, ()) and name != "max_new_tokens"}
    target, draft = given["target"], given["draft"]
    return {"target": target, "draft": draft, "specextend": given["specextend"], **options}


def _print(made: list[Any]) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    for table in made:
        console.print(table.shown())
