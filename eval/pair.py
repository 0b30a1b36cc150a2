"""Decode speed of a pair against Hugging Face's own: `python -m specx.eval.pair --out eval/results/pair`.

One process, methods alternating, medians over prompts. Figures are defined in `Generation.stats`: decode tokens a
second without prefill, tau with the bonus token; efficiency = speed-up / tau. The baseline is HF's plain decoding with
the faster of its dynamic and static caches, and with GQA that copies no keys. "varied" is the share of distinct 4-grams
in the output: a small model left alone repeats itself, and loops are easy to draft.
"""

import os

os.environ.setdefault("TRANSFORMERS_SDPA_FORCE_GQA", "1")  # HF's best setting on a CPU; read when transformers loads

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

import specx
from specx.api import SpeculativeModel, load
from specx.data import stdlib

Row = dict[str, Any]


class Stopwatch(BaseStreamer):
    """Notes when the first new tokens came, and how many tokens came after them."""

    def __init__(self) -> None:
        self.first = self.last = 0.0
        self.after = self.puts = 0

    def put(self, value: Tensor) -> None:
        """Take the prompt, then the tokens of each step."""
        self.last = time.perf_counter()
        if self.puts == 1:
            self.first = self.last
        elif self.puts > 1:
            self.after += value.numel()
        self.puts += 1

    def end(self) -> None:
        """Nothing to flush."""


def hf_method(model: SpeculativeModel, heat: float, draft: Any = None, **options: Any) -> Callable[[Tensor, int], Row]:
    """Return a method that runs `model.generate` of transformers at temperature `heat` and times its decode phase."""
    sampling = {"do_sample": True, "temperature": heat, "top_k": 0} if heat else {"do_sample": False}

    def run(ids: Tensor, new: int) -> Row:
        watch = Stopwatch()
        kwargs = {"assistant_model": draft} if draft is not None else {}
        torch.manual_seed(0)
        tokens = model.target.generate(
            ids[None], max_new_tokens=new, streamer=watch, attention_mask=torch.ones_like(ids)[None],
            **sampling, **kwargs, **options,
        )  # fmt: skip
        return {"tokens": tokens[0, len(ids) :].tolist(), "rate": watch.after / (watch.last - watch.first), "tau": None}

    return run


def specx_method(model: SpeculativeModel, **options: Any) -> Callable[[Tensor, int], Row]:
    """Return a method that runs specx with these options."""

    def run(ids: Tensor, new: int) -> Row:
        out = model.generate(ids, max_new_tokens=new, **options)
        stats = out.stats
        parts = {name: stats[name] / out.steps for name in ("ms_draft", "ms_verify", "ms_retrieval", "ms_other")}
        return {"tokens": out.tokens, "rate": stats["decode_tokens_per_second"], "tau": stats["tau"], **parts}

    return run


def prompts(tokenizer: Any, length: int, count: int) -> list[Tensor]:
    """Return the first `length` tokens of held-out modules, one each."""
    found = []
    for _, path in stdlib.held_out_files():
        ids = tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"]
        if len(ids) > length:
            found.append(torch.tensor(ids[:length]))
    return found[:count]


def measure(methods: dict[str, Callable[[Tensor, int], Row]], texts: list[Tensor], new: int) -> list[Row]:
    """Run every method on every prompt, alternating; the first prompt is run once before to warm up."""
    rows = []
    for method in methods.values():
        method(texts[0], 8)
    for number, ids in enumerate(texts):
        reference: list[int] | None = None
        for name, method in methods.items():
            row = method(ids, new)
            tokens = row.pop("tokens")
            reference = reference or tokens
            same, grams = tokens == reference, [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
            row["varied"] = len(set(grams)) / max(1, len(grams))
            load_average = os.getloadavg()[0]
            rows.append(
                {"method": name, "length": len(ids), "prompt": number, "same": same, "load": load_average, **row}
            )
    return rows


def summarise(rows: list[Row], lengths: list[int]) -> list[Row]:
    """Return medians per length and method, with the ratio to HF's better cache, prompt by prompt."""
    table = []
    for length in lengths:
        mine = [row for row in rows if row["length"] == length]
        base: dict[int, float] = {}
        for row in mine:
            if row["method"].startswith("hf-plain"):
                base[row["prompt"]] = max(base.get(row["prompt"], 0.0), row["rate"])
        for method in dict.fromkeys(row["method"] for row in mine):
            own = [row for row in mine if row["method"] == method]
            ratio = statistics.median(row["rate"] / base[row["prompt"]] for row in own)
            tau = statistics.mean(row["tau"] for row in own) if own[0]["tau"] is not None else None
            table.append(
                {
                    "length": length,
                    "method": method,
                    "prompts": len(own),
                    "rate": statistics.median(row["rate"] for row in own),
                    "ratio": ratio,
                    "tau": tau,
                    "efficiency": ratio / tau if tau else None,
                    "same": sum(row["same"] for row in own),
                    "varied": statistics.mean(row["varied"] for row in own),
                    **{k: statistics.median(row[k] for row in own) for k in own[0] if k.startswith("ms_")},
                }
            )
    return table


def markdown(table: list[Row], facts: Row) -> str:
    """Return the table with what is needed to judge it."""
    lines = [f"- {key}: {value}" for key, value in facts.items()]
    lines += [
        "",
        "| context | method | tokens/s | ratio to HF | tau | efficiency | ms a step: draft, verify | varied | same |",
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for row in table:
        tau = f"{row['tau']:.2f}" if row["tau"] else "-"
        efficiency = f"{row['efficiency']:.2f}" if row["efficiency"] else "-"
        parts = f"{row['ms_draft']:.1f}, {row['ms_verify']:.1f}" if "ms_draft" in row else "-"
        lines.append(
            f"| {row['length']} | {row['method']} | {row['rate']:.1f} | {row['ratio']:.2f} | {tau} | {efficiency} "
            f"| {parts} | {row['varied']:.2f} | {row['same']}/{row['prompts']} |"
        )
    return "\n".join(lines) + "\n"


def facts_of(model: SpeculativeModel, new: int, temperature: float, command: str) -> Row:
    """Return what the numbers depend on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "command": command,
        "commit": commit.stdout.strip() or "unknown",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "dtype": str(model.engine.dtype).removeprefix("torch."),
        "new tokens": f"{new}, temperature {temperature}",
        "load average before": f"{os.getloadavg()[0]:.2f}",
        "same": "prompts whose tokens equal those of HF with its dynamic cache (greedy only; in bf16 ties may flip)",
    }


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Prefix of the .jsonl and .md written.")
@click.option("--target", help="As in specx run.")
@click.option("--draft", help="As in specx run.")
@click.option("--lengths", default="512,2048,8192", show_default=True)
@click.option("--samples", default=4, show_default=True, help="Prompts a length.")
@click.option("--max-new-tokens", "new", default=128, show_default=True)
@click.option("--temperature", default=0.0, show_default=True)
@click.option("--dtype", default="auto", show_default=True)
def main(
    out: Path,
    target: str | None,
    draft: str | None,
    lengths: str,
    samples: int,
    new: int,
    temperature: float,
    dtype: str,
) -> None:
    model = load(target, draft, dtype=dtype, temperature=temperature)
    flags = f"--lengths {lengths} --samples {samples} --max-new-tokens {new}"
    flags += f" --temperature {temperature} --dtype {dtype}"
    facts = facts_of(model, new, temperature, f"python -m specx.eval.pair --out {out} {flags}")
    small = model.draft.model.model  # type: ignore[union-attr]
    methods = {
        "hf-plain dynamic": hf_method(model, temperature),
        "hf-plain static": hf_method(model, temperature, cache_implementation="static"),
        "hf-assisted": hf_method(model, temperature, draft=small),
        "hf-lookup": hf_method(model, temperature, prompt_lookup_num_tokens=8),
        "specx plain": specx_method(model, plain=True),
        "specx full": specx_method(model, policy="full"),
        "specx window": specx_method(model, policy="window"),
        "specx auto": specx_method(model, policy="auto"),
    }
    wanted = [
        int(float(each.upper().rstrip("K")) * (1024 if each.upper().endswith("K") else 1))
        for each in lengths.split(",")
    ]
    rows: list[Row] = []
    out.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{out}.jsonl").open("w") as log:
        for length in wanted:
            new_rows = measure(methods, prompts(model.tokenizer, length, samples), new)
            rows += new_rows
            log.writelines(json.dumps(row) + "\n" for row in new_rows)
            log.flush()
    table = summarise(rows, wanted)
    Path(f"{out}.md").write_text(markdown(table, facts | {"specx": specx.__version__}))
    shown = Table("context", "method", "tokens/s", "ratio", "tau")
    for row in table:
        shown.add_row(
            *(str(row["length"]), row["method"], f"{row['rate']:.1f}", f"{row['ratio']:.2f}", str(row["tau"])[:4])
        )
    Console().print(shown)


if __name__ == "__main__":
    main()
