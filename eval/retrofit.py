"""`eagle-llm` before and after `specx.retrofit`, on ever longer prompts: `python -m specx.eval.retrofit --out DIR`.

The bundled target and EAGLE-1 head, written the way that package reads them. It ignores a target's rope_theta, so it is
measured twice: as it is, and with the base put right. Every run is a process of its own.
"""

import json
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from specx.adapters.checkpoints import load_tokenizer
from specx.adapters.eagle_llm import INSTALL, installed
from specx.adapters.names import locate
from specx.config import DRAFT_ALONE
from specx.data.documents import length_name, parse_lengths
from specx.data.prompts import held_out_prompt
from specx.eval.facts import machine_of, version_of
from specx.eval.tables import Table
from specx.retrofit_check import Way, run_one

Row = dict[str, Any]
WAYS: dict[str, dict[str, Any]] = {
    "eagle-llm": {"retrofitted": False, "fix_rope": False},
    "eagle-llm, base put right": {"retrofitted": False, "fix_rope": True},
    "retrofitted, full": {"retrofitted": True, "specextend": False, "options": {"policy": "full"}},
    "retrofitted, auto": {"retrofitted": True, "specextend": True, "options": DRAFT_ALONE},
    "retrofitted, as it comes": {"retrofitted": True, "specextend": True, "options": {}},
}


def published_layout(head: str, target: str, folder: Path) -> Path:
    """Write an EAGLE-1 head as its authors publish it: pytorch_model.bin, with the target's embeddings in it."""
    tensors = load_file(Path(head) / "model.safetensors")
    with safe_open(Path(target) / "model.safetensors", framework="pt") as content:
        tensors["embed_tokens.weight"] = content.get_tensor("model.embed_tokens.weight")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "config.json").write_text((Path(head) / "config.json").read_text())
    return folder


def measured(job: Row, lengths: list[int], prompts: int, tokenizer: Any) -> Iterator[Row]:
    """Run all ways in turn on each prompt; yield a row for each run.

    Args:
        job: What `retrofit_check.run_one` takes, without ids and what `WAYS` says.
    """
    for length in lengths:
        for number in range(prompts):
            ids, plain = held_out_prompt(tokenizer, length, number), None
            found: dict[str, Way] = {}
            for name in reversed(WAYS):  # ours first: it brings what transformers itself gives
                way: Row = {"fix_rope": False, "specextend": True, "options": {}} | WAYS[name]
                found[name] = run_one(job | way | {"ids": ids}, way["retrofitted"])
                plain = found[name].plain or plain
            for name in WAYS:
                yield _row(found[name], plain) | {"way": name, "context": length, "prompt": number}


def _row(way: Way, plain: list[int] | None) -> Row:
    return {
        "failed": way.failed,
        "tau": way.tau,
        "tokens_per_second": way.tokens_per_second,
        "decode_tokens_per_second": way.decode_tokens_per_second,
        "memory_mib": round(way.memory_bytes / 2**20),
        "equal": None if plain is None else way.tokens == plain,
    }


def table(rows: list[Row]) -> Table:
    """Return medians over prompts, a line for each context and way."""
    lines = []
    for length in dict.fromkeys(row["context"] for row in rows):
        for name in WAYS:
            cell = [row for row in rows if (row["context"], row["way"]) == (length, name)]
            right = f"{sum(bool(row['equal']) for row in cell)} of {len(cell)}"
            keys = (
                ("tau", "{:.2f}"),
                ("decode_tokens_per_second", "{:.1f}"),
                ("tokens_per_second", "{:.1f}"),
                ("memory_mib", "{:.0f}"),
            )
            fine = [row for row in cell if not row["failed"]]
            figures = [
                form.format(statistics.median(row[key] for row in fine)) if fine else "failed" for key, form in keys
            ]
            lines.append([length_name(length), name, *figures, right])
    header = ["context", "", "tau", "decode tokens/s", "tokens/s with prefill", "memory, MiB", "equal to transformers"]
    note = "Medians over prompts; memory is the peak beyond the loaded models. Equal: the same tokens as `generate`."
    return Table("eagle-llm, before and after", note, header, lines)


@click.command(help=__doc__)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder for the results.")
@click.option("--lengths", default="512,2K,8K", show_default=True, help="Tokens of the prompts.")
@click.option("--prompts", default=3, show_default=True, type=click.IntRange(1), help="Prompts a length.")
@click.option("--max-new-tokens", "new", default=64, show_default=True, type=click.IntRange(1))
@click.option("--dtype", default="float32", show_default=True, type=click.Choice(["float32", "bfloat16"]))
def main(out: Path, lengths: str, prompts: int, new: int, dtype: str) -> None:
    if not installed():
        raise click.ClickException(f"eagle-llm is not installed: {INSTALL}")
    if (out / "rows.jsonl").exists():
        raise click.UsageError(f"{out} already holds results; give another folder")
    try:
        contexts = parse_lengths(lengths)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    target, head = locate("demo", "target"), locate("demo-eagle1", "draft")
    facts = {
        "command": shlex.join(["python", "-m", "specx.eval.retrofit", *sys.argv[1:]]),
        "specx": version_of(),
        "machine": machine_of(torch.device("cpu")),
        "models": f"demo-target and demo-eagle1, {dtype}",
        "load average before": f"{os.getloadavg()[0]:.2f} on {os.cpu_count()} cores",
    }
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch, (out / "rows.jsonl").open("w") as log:
        folder = str(published_layout(head, target, Path(scratch)))
        job = {"target": target, "head": folder, "device": "cpu", "dtype": dtype, "new": new}
        try:
            for row in measured(job, contexts, prompts, load_tokenizer(target)):
                rows.append(row)
                log.write(json.dumps(row) + "\n")
                log.flush()
                click.echo(json.dumps(row), err=True)
        finally:
            (out / "summary.md").write_text(markdown(facts, rows))
    click.echo(table(rows).markdown())


def markdown(facts: dict[str, str], rows: list[Row]) -> str:
    """Return the summary: facts, the table, and what failed."""
    head = "".join(f"- {key}: {value}\n" for key, value in facts.items())
    failures = sorted({f"\n- {row['way']}: {row['failed']}" for row in rows if row["failed"]})
    return f"# specx.eval.retrofit\n\n{head}\n{table(rows).markdown()}{''.join(failures)}".rstrip() + "\n"


if __name__ == "__main__":
    main()
