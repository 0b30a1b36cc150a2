"""`specx bench`: parse, call `specx.eval.bench` and `specx.eval.bench_step`, print."""

import json
import sys
from dataclasses import fields
from typing import Any

import click

from specx import output
from specx.adapters.names import locate
from specx.cli_options import model_options
from specx.config import LoadConfig

SHORTEST, LONGEST, LONGEST_ON_CPU = 1024, 128 * 1024, 16 * 1024
as_json = click.option("--json", "as_json", is_flag=True, help="Print rows as JSON instead of tables.")


@click.group()
def bench() -> None:
    """Time the parts: attention alone, or the parts of one step.

    Tables go to stdout, everything else to stderr.
    """


@bench.command()
@click.option("--max-length", metavar="N", help="Longest context, as 16K. Default: 128K; 16K on a CPU.")
@click.option("--nodes", default="1,8,32,128", show_default=True, help="Sizes of the tree.")
@click.option("--heads", default=32, show_default=True, type=click.IntRange(1), help="Query heads.")
@click.option("--groups", default=8, show_default=True, type=click.IntRange(1), help="Key heads.")
@click.option("--dim", default=128, show_default=True, type=click.IntRange(8), help="Dims of a head.")
@click.option("--dtype", default="bfloat16", show_default=True, type=click.Choice(["bfloat16", "float16", "float32"]))
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... Default: cuda where there is one.")
@click.option(
    "--repeats", default=7, show_default=True, type=click.IntRange(1), help="Measurements a median is taken of."
)
@as_json
def attention(**given: Any) -> None:
    """Attention over a long prefix and a tree, by every way there is here, beside a copy of the same bytes."""
    nodes = _numbers("--nodes", given["nodes"], 256)
    if given["heads"] % given["groups"]:
        raise ValueError(f"--heads must be a multiple of --groups; got {given['heads']} and {given['groups']}")
    with output.quitting_at_ctrl_c():
        import torch

        from specx.data.documents import length_name, parse_length
        from specx.eval import bench as measuring

        device = torch.device(given["device"] or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"--device {device}: there is no CUDA device here")
        default = LONGEST_ON_CPU if device.type == "cpu" else LONGEST
        longest = parse_length(given["max_length"]) if given["max_length"] else default
        # doubling, and the longest itself
        lengths = [1 << power for power in range(10, 18) if SHORTEST <= 1 << power < longest] + [longest]
        bandwidth = measuring.copy_bandwidth(device, measuring.copy_bytes(device))
        ways, rows = measuring.contenders(device), []
        for length in lengths:
            for count in nodes:
                for name, way in ways.items():
                    problem = measuring.Problem(
                        length, count, given["heads"], given["groups"], given["dim"], getattr(torch, given["dtype"])
                    )
                    click.echo(f"{name} after {length_name(length)}, {count} nodes", err=True)
                    found = measuring.attention_row(problem, way, device, bandwidth, given["repeats"])
                    rows.append({"method": name, "bandwidth": bandwidth, **found})
    from specx.eval.gpu_tables import kernel

    _print(rows, kernel(rows), given["as_json"])


@bench.command()
@model_options
@click.option("--lengths", default="512,2K,8K", show_default=True, help="Contexts in the target's tokens.")
@click.option("--nodes", default="1,8,16,32,64", show_default=True, help="Sizes of the verified tree.")
@click.option(
    "--repeats", default=9, show_default=True, type=click.IntRange(1), help="Measurements a median is taken of."
)
@as_json
def step(**given: Any) -> None:
    """The target's forward over trees of several sizes, and one level and tree of the draft, at a few contexts."""
    nodes = _numbers("--nodes", given["nodes"], 64)
    from specx.data.documents import parse_lengths

    lengths = parse_lengths(given["lengths"])
    for role in ("target", "draft"):
        if given[role] is not None:
            locate(given[role], role)
    with output.quitting_at_ctrl_c():
        from specx.api import load
        from specx.eval import bench as measuring
        from specx.eval.bench_step import StepBench, context_of

        options = {each.name: given[each.name] for each in fields(LoadConfig) if given[each.name] is not None}
        model = load(given["target"], given["draft"], specextend=given["specextend"], **options)
        ids = context_of(model, lengths[-1])
        device, rows = model.engine.device, []
        bandwidth = measuring.copy_bandwidth(device, measuring.copy_bytes(device))
        click.echo(f"attention {model.engine.backend}: {model.engine.backend_reason}", err=True)
        bed = StepBench(model, ids, given["repeats"])
        for length in reversed(lengths):
            click.echo(f"after {length} tokens", err=True)
            rows += [{"part": "verify", "length": length, **bed.verify(length, count, bandwidth)} for count in nodes]
            if model.draft is not None:
                rows.append({"part": "draft", "length": length, **bed.drafting(length)})
    _print(
        [{"bandwidth": bandwidth, "backend": model.engine.backend, **row} for row in rows],
        _step_tables(rows),
        given["as_json"],
    )


def _numbers(option: str, text: str, most: int) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and 1 <= int(part) <= most for part in parts):
        raise ValueError(f"{option} takes numbers from 1 to {most}, joined by commas; got {text!r}")
    return sorted({int(part) for part in parts})


def _step_tables(rows: list[dict[str, Any]]) -> list[Any]:
    from specx.data.documents import length_name
    from specx.eval.tables import Table

    verifies = [row for row in rows if row["part"] == "verify"]
    drafts = [row for row in rows if row["part"] == "draft"]
    counts, lengths = sorted({row["nodes"] for row in verifies}), sorted({row["length"] for row in verifies})
    cell = {(row["length"], row["nodes"]): f"{row['ms']:.3g} ({row['ratio']:.2f})" for row in verifies}
    lines = [[length_name(length), *(cell[length, count] for count in counts)] for length in lengths]
    note = "Milliseconds by nodes (times what copying as many bytes as weights and prefix have takes)."
    made = [Table("Verify", note, ["context", *map(str, counts)], lines)]
    if drafts:
        keys = ("ms_level", "ms_tree", "ms_scores", "ms_select", "ms_refresh")
        lines = [[length_name(row["length"]), *(f"{row[key]:.3g}" for key in keys), str(row["draft_kv_tokens"])]
                 for row in reversed(drafts)]  # fmt: skip
        first = drafts[0]
        note = f"Milliseconds of a level of {first['level_nodes']} nodes, a tree of {first['tree_nodes']}, a retrieval."
        header = ["context", "level", "tree", "scores", "select", "refill", "draft cache"]
        made.append(Table("Draft and retrieval", note, header, lines))
    return made


def _print(rows: list[dict[str, Any]], tables: list[Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 200)
    for table in tables:
        console.print(table.shown())
