"""`specx eval`: parse, call `specx.eval.runner`, print."""

import contextlib
import shlex
import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from specx import output
from specx.adapters.names import locate
from specx.cli_options import GENERATION, model_options, options_of
from specx.config import LoadConfig, nearest
from specx.progress import shown

if TYPE_CHECKING:
    from specx.eval.planning import Job

MEASURES = ("tau", "speed", "memory", "trace")
_NO_LIMIT = 1 << 20  # tokens of a prompt, for a target without a known number of positions
METHODS = "ar,hf-assisted,hf-lookup,full,window,retrieval,auto,specx"


@click.command("eval")
@model_options
@click.option("--data", required=True, metavar="NAME|FILE|DIR", help="See below.")
@click.option(
    "--lengths",
    metavar="LIST",
    help="Prompt lengths in the target's tokens, or whole: each document as it is. Default: by the data; else "
    "512,2K,8K,16K.",
)
@click.option("--samples", default=4, show_default=True, type=click.IntRange(1), help="Prompts a length, for speed.")
@click.option("--runs", default=1, show_default=True, type=click.IntRange(1), help="Timings a prompt.")
@click.option("--methods", default=METHODS, show_default=True, help="Also plain, all, and NAME:option=value:...")
@click.option("--measure", default="tau,speed,memory,trace", show_default=True, help="Which of them.")
@click.option("--spans", default=20, show_default=True, type=click.IntRange(1), help="Spans of each kind, for tau.")
@click.option("--span-tokens", default=128, show_default=True, type=click.IntRange(16), help="Tokens of a span.")
@click.option("--out", default="specx-eval", show_default=True, metavar="DIR", help="Rows (JSONL) and summaries.")
@click.option("--resume", is_flag=True, help="Go on where a run with the same options ended.")
@click.option("--report", is_flag=True, help="Also write a report there, as specx report does.")
@click.option("--workers", type=click.IntRange(1), help="Processes that measure at the same time. Default: 1.")
@click.option("--ray", metavar="ADDRESS", help="Measure by actors of a Ray cluster: auto, local, ray://HOST:PORT.")
@click.option("--chat/--no-chat", default=None, help="Chat template. Default: for requests, where there is one.")
@click.option(
    "--max-new-tokens", type=click.IntRange(1), help="For all but tau. Default: 128, or as the data asks for."
)
@options_of(*GENERATION, without=("max_new_tokens", "stop", "policy", "lookup", "controller"))  # methods say those
def evaluate(**given: Any) -> None:
    """Measure tau, speed and memory of methods against context length.

    \b
    tau     nested prompts: the same place and continuation, ever more context before it
    speed   all methods in turn on each prompt; every output is compared with plain greedy decoding
    memory  one process a cell
    trace   one generation a length and method, to look at in a report
    data    stdlib (held-out library source), needle (generated: find a code among many); from the hub
            govreport, qmsum, multi_news, lcc, repobench-p (LongBench), pg19, booksum, aime24;
            a JSONL file with "text" keys, or a folder of them

    Tables go to stdout, everything else to stderr. Ctrl-C and SIGTERM keep what was
    measured; --resume goes on.
    """
    measures = tuple(dict.fromkeys(part.strip() for part in given["measure"].split(",") if part.strip()))
    unknown = [each for each in measures if each not in MEASURES]
    if unknown or not measures:
        close = nearest(unknown[0], list(MEASURES)) if unknown else "."
        raise ValueError(f"--measure takes {', '.join(MEASURES)}, joined by commas; got {given['measure']!r}{close}")
    for role in ("target", "draft"):
        if given[role] is not None:
            locate(given[role], role)
    out = _usable(given["out"], given["resume"])
    if given["ray"] is not None and find_spec("ray") is None:
        raise RuntimeError("--ray needs Ray: pip install 'specx[ray]'")
    if given["report"]:
        _check_report()
    with output.quitting_at_ctrl_c():
        job, model, documents = _prepared(given, measures, out)
        from specx.eval.runner import run
        from specx.eval.tables import tables

    rows: list[dict[str, Any]] = []
    try:
        with output.ending_at_sigterm(), shown() as (say, tick):
            run(job, model, documents, say, rows, tick)
    finally:
        if rows:
            _print(tables(rows))
            click.echo(f"written: {out / 'rows.jsonl'}, {out / 'summary.md'}, {out / 'summary.json'}", err=True)
            if given["report"]:
                _report(out)


def _usable(name: str, resume: bool) -> Path:
    """Return the folder for results after trying to write there, which leaves no trace."""
    out = Path(name).expanduser()
    made: list[Path] = []
    try:
        made = [each for each in (out, *out.parents) if not each.exists()]
        rows = out / "rows.jsonl"
        if rows.exists() and rows.stat().st_size and not resume:
            raise ValueError(f"--out {name} already holds results: give another one, or remove {rows}, or --resume")
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
    from specx.data.documents import WHOLE, parse_lengths
    from specx.data.source import check_source, defaults_of, read_data
    from specx.eval.methods import ALL, check_draft, fitting, parse_methods  # first: it sets HF's best setting

    specs = parse_methods(given["methods"])
    if given["methods"].strip() != ALL:
        check_draft(specs, given["draft"] is not None or given["target"] is None)
    whole = given["lengths"] == WHOLE
    contexts = parse_lengths(given["lengths"]) if given["lengths"] is not None and not whole else []
    check_source(given["data"])
    lengths, new = defaults_of(given["data"])
    new = given["max_new_tokens"] or new
    from transformers.utils import logging

    from specx.api import load
    from specx.eval.planning import Job
    from specx.hf_config import positions_of

    loading = _loading(given)
    asked = [given[role] for role in ("target", "draft") if given[role] is not None]
    click.echo(f"loading {' and '.join(asked) or 'the bundled pair'}", err=True)
    logging.set_verbosity_error()  # of transformers: it warns of how its own generate calls itself
    model = load(**loading)
    if model.tokenizer is None:
        raise ValueError(f"target {given['target']} has no tokenizer files; save its tokenizer in that directory")
    click.echo(f"reading {given['data']}", err=True)
    room = (positions_of(model.engine.config) or _NO_LIMIT) - new
    if not whole:
        contexts = contexts or _fitted(parse_lengths(lengths), model, max(new, given["span_tokens"]))
    lengths, seed = ",".join(map(str, contexts or [max(room, 1)])), given["seed"] or 0
    data = read_data(given["data"], model.tokenizer, lengths, given["samples"], given["chat"], seed)
    if given["methods"].strip() in (ALL, METHODS):
        specs = fitting(specs, model)
    job = Job(
        data=given["data"], contexts=contexts, specs=specs, measures=measures, samples=given["samples"],
        spans=given["spans"], span_tokens=given["span_tokens"], new=new, loading=loading, out=out,
        command=shlex.join(["specx", *sys.argv[1:]]), runs=given["runs"], resume=given["resume"],
        workers=given["workers"], ray=given["ray"], about=data.about, continues=data.continues, room=room,
    )  # fmt: skip
    return job, model, data.documents


def _fitted(contexts: list[int], model: Any, new: int) -> list[int]:
    """Return default lengths, the longest lowered to what the target has positions for."""
    from specx.data.documents import length_name
    from specx.hf_config import positions_of

    most = positions_of(model.engine.config)
    room = (most - new) // 512 * 512 if most is not None else contexts[-1]
    if contexts[-1] <= room or room < 1:
        return contexts
    click.echo(
        f"note: the target has {most} positions: prompts of {length_name(room)} instead of longer ones", err=True
    )
    return sorted({min(context, room) for context in contexts})


def _loading(given: dict[str, Any]) -> dict[str, Any]:
    names = [each.name for config in (LoadConfig, *GENERATION) for each in fields(config)]
    options = {name: given[name] for name in names if given.get(name) not in (None, ()) and name != "max_new_tokens"}
    target, draft = given["target"], given["draft"]
    return {"target": target, "draft": draft, "specextend": given["specextend"], **options}


def _check_report() -> None:
    from specx.eval.charts import missing

    if missing():
        click.echo(f"note: {missing()}", err=True)


def _report(out: Path) -> None:
    from specx.eval.report import write

    for file in write([out], out / "report"):
        click.echo(f"written: {file}", err=True)


def _print(made: list[Any]) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 200)
    for table in made:
        console.print(table.shown())
