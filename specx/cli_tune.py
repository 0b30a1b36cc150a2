"""`specx tune`: parse, call `specx.eval.bench_costs`, store, print."""

import json
import sys
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import click

from specx import output
from specx.adapters.names import locate
from specx.cli_options import model_options
from specx.config import LoadConfig

if TYPE_CHECKING:
    from specx.costs import Costs

Row = dict[str, Any]


@click.command()
@model_options
@click.option("--contexts", default="1K,4K,16K", show_default=True, help="Contexts in the target's tokens.")
@click.option(
    "--repeats", default=9, show_default=True, type=click.IntRange(1), help="Measurements a median is taken of."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def tune(**given: Any) -> None:
    """Measure what verifications and draft levels cost here, and keep that for `run` and `eval`.

    From then on they choose nodes, depth and beam for this target, draft and device by expected tokens a millisecond,
    where none of the three is given; --no-profile leaves the defaults. Profiles are small files in SPECX_CACHE, else
    in ~/.cache/specx. Tables go to stdout, everything else to stderr. Ctrl-C leaves no profile behind.
    """
    from specx.data.documents import parse_lengths

    contexts = parse_lengths(given["contexts"])
    for role in ("target", "draft"):
        if given[role] is not None:
            locate(given[role], role)
    with output.quitting_at_ctrl_c():
        from specx.api import load
        from specx.eval.bench_costs import CostBench, busy, fitting

        options = {each.name: given[each.name] for each in fields(LoadConfig) if given[each.name] is not None}
        model = load(given["target"], given["draft"], specextend=given["specextend"], **options | {"profile": False})
        contexts, notes = fitting(model, contexts)
        for note in [*notes, *filter(None, [busy()])]:
            click.echo(f"note: {note}", err=True)
        click.echo(f"measuring after {', '.join(map(str, contexts))} tokens", err=True)
        bed = CostBench(model, contexts, given["repeats"])
        costs = _measured(bed)
    from specx.profiles import key_of, save_profile

    assert model.draft is not None
    key = key_of(model.engine, model.draft)
    _print(costs, key, given["as_json"])
    click.echo(f"written: {save_profile(costs, key)}", err=True)


def _measured(bed: Any) -> "Costs":
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("measuring", total=bed.pieces)
        return bed.measure(lambda: progress.advance(bar))


def _choices(costs: "Costs") -> list[Row]:
    """Return what would be chosen at each measured context, and what is expected of it."""
    from specx.costs import expected_tokens

    rows = []
    for context in costs.contexts:
        tree = costs.best_tree(context)
        tokens = expected_tokens(tree, costs.acceptance)
        shape = {"nodes": tree.nodes, "depth": tree.depth, "beam": tree.beam}
        rows.append({"context": context, **shape, "tokens": tokens, "ms": costs.round_ms(tree, context)})
    return rows


def _print(costs: "Costs", key: dict[str, str], as_json: bool) -> None:
    chosen = _choices(costs)
    if as_json:
        click.echo(json.dumps({"key": key, "costs": asdict(costs), "chosen": chosen}, indent=1))
        return
    from rich.console import Console

    from specx.data.documents import length_name
    from specx.eval.tables import Table

    names = [length_name(context) for context in costs.contexts]
    lines = [
        [name, *(f"{ms:.3g}" for ms in verify), f"{level:.3g}"]
        for name, verify, level in zip(names, costs.verify, costs.level, strict=True)
    ]
    note = (
        f"Milliseconds of verifying so many nodes, and of a level of the draft's tree; a round takes {costs.rest:.2g} "
        "more."
    )
    made = [Table("Costs", note, ["context", *map(str, costs.nodes), "level"], lines)]
    lines = [
        [name, *(str(row[each]) for each in ("nodes", "depth", "beam")), f"{row['tokens']:.2f}", f"{row['ms']:.3g}"]
        for name, row in zip(names, chosen, strict=True)
    ]
    source = f"tau was {costs.tau:.2f} with the default tree" if costs.tau else "a guess, for tau was not measured"
    note = f"What `run` and `eval` choose. The target takes {costs.acceptance:.0%} of first choices ({source})."
    made.append(Table("Chosen", note, ["context", "nodes", "depth", "beam", "expected tokens", "ms"], lines))
    console = Console(width=None if sys.stdout.isatty() else 200)
    for table in made:
        console.print(table.shown())
