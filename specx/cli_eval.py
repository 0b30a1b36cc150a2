"""`specx eval`: parse, call `specx.eval.runner`, print."""

import contextlib
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from specx import output
from specx.adapters.names import locate
from specx.cli_options import GENERATION, model_options, options_of
from specx.config import LoadConfig, nearest

if TYPE_CHECKING:
    from specx.eval.runner import Job

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
@click.option("--max-new-tokens", default=128, show_default=True, type=click.IntRange(1), help="For speed and memory.")
@options_of(*GENERATION, without=("max_new_tokens", "stop", "policy"))
def evaluate(**given: Any) -> None:
    """Measure tau, speed and memory of methods against context length.

    \b
    tau     nested prompts: the same place and continuation, ever more context before it
    speed   all methods in turn on each prompt; every output is compared with plain greedy decoding
    memory  one process a cell

    Tables go to stdout, everything else to stderr. Ctrl-C keeps what was measured.
    """
    measures = tuple(dict.fromkeys(part.strip() for part in given["measure"].split(",") if part.strip()))
    unknown = [each for each in measures if each not in MEASURES]
    if unknown or not measures:
        close = nearest(unknown[0], list(MEASURES)) if unknown else "."
        raise ValueError(f"--measure takes {', '.join(MEASURES)}, joined by commas; got {given['measure']!r}{close}")
    for role in ("target", "draft"):
        if given[role] is not None:
            locate(given[role], role)
    out = _usable(given["out"])
    with output.quitting_at_ctrl_c():
        job, model, documents = _prepared(given, measures, out)
        from specx.eval.runner import run
        from specx.eval.tables import tables

    rows: list[dict[str, Any]] = []
    try:
        run(job, model, documents, lambda line: click.echo(line, err=True), rows)
    finally:
        if rows:
            _print(tables(rows))
            click.echo(f"written: {out / 'rows.jsonl'}, {out / 'summary.md'}", err=True)


def _usable(name: str) -> Path:
    """Return the folder for results after trying to write there, which leaves no trace."""
    out = Path(name).expanduser()
    made: list[Path] = []
    try:
        made = [each for each in (out, *out.parents) if not each.exists()]
        rows = out / "rows.jsonl"
        if rows.exists() and rows.stat().st_size:
            raise ValueError(f"--out {name} already holds results: give another one, or remove {rows}")
        out.mkdir(parents=True, exist_ok=True)
        fresh = not rows.exists()
        with rows.open("a"):
            pass
        if fresh:
            rows.unlink()
    except OSError as error:
        raise ValueError(f"--out {name} cannot be written: {error.strerror or error}") from error
    finally:
        for each in made:
            with contextlib.suppress(OSError):
                each.rmdir()
    return out


def _prepared(given: dict[str, Any], measures: tuple[str, ...], out: Path) -> tuple["Job", Any, Any]:
    """Find what mistakes can be found before the models are loaded; load, and read the data."""
    from specx.data.documents import parse_lengths, read_documents
    from specx.eval.methods import check_draft, parse_methods  # before transformers: it sets HF's best setting

    contexts, specs = parse_lengths(given["lengths"]), parse_methods(given["methods"])
    check_draft(specs, given["draft"] is not None or given["target"] is None)
    if given["data"] != "stdlib":
        read_documents(given["data"], lambda text, verbose: {"input_ids": []})
    from transformers.utils import logging

    from specx.api import load
    from specx.eval.runner import Job

    loading = _loading(given)
    asked = [given[role] for role in ("target", "draft") if given[role] is not None]
    click.echo(f"loading {' and '.join(asked) or 'the bundled pair'}", err=True)
    logging.set_verbosity_error()  # of transformers: it warns of how its own generate calls itself
    model = load(**loading)
    if model.tokenizer is None:
        raise ValueError(f"target {given['target']} has no tokenizer files; save its tokenizer in that directory")
    click.echo(f"reading {given['data']}", err=True)
    documents = read_documents(given["data"], model.tokenizer)
    job = Job(
        data=given["data"], contexts=contexts, specs=specs, measures=measures, samples=given["samples"],
        spans=given["spans"], span_tokens=given["span_tokens"], new=given["max_new_tokens"], loading=loading,
        out=out, command=shlex.join(["specx", *sys.argv[1:]]),
    )  # fmt: skip
    return job, model, documents


def _loading(given: dict[str, Any]) -> dict[str, Any]:
    names = [each.name for config in (LoadConfig, *GENERATION) for each in fields(config)]
    options = {name: given[name] for name in names if given.get(name) not in (None, ()) and name != "max_new_tokens"}
    target, draft = given["target"], given["draft"]
    return {"target": target, "draft": draft, "specextend": given["specextend"], **options}


def _print(made: list[Any]) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 200)
    for table in made:
        console.print(table.shown())
