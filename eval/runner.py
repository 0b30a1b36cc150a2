"""`specx eval`: which prompts, which measurements, and a row on disk for everything that was measured."""

import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import transformers

import specx
from specx.api import SpeculativeModel
from specx.data.documents import Document
from specx.eval import acceptance, memory, speed
from specx.eval.methods import Spec, build
from specx.eval.spans import Kind, Span, choose_spans
from specx.eval.speed import Prompt
from specx.eval.tables import markdown

Row = dict[str, Any]
MEASURES = ("tau", "speed", "memory")
BUSY = 0.5  # load average a core above which timings are not to be trusted


@dataclass(frozen=True, slots=True)
class Job:
    """What `specx eval` was asked for.

    Attributes:
        data: As given.
        contexts: Prompt lengths in tokens, ascending.
        samples: Prompts a length for speed and memory.
        spans: Spans of each kind for tau.
        span_tokens: Tokens of each span.
        new: Tokens to generate, for speed and memory.
        loading: Arguments of `specx.load`, for processes of their own.
    """

    data: str
    contexts: list[int]
    specs: list[Spec]
    measures: tuple[str, ...]
    samples: int
    spans: int
    span_tokens: int
    new: int
    loading: dict[str, Any]
    out: Path
    command: str


def run(job: Job, model: SpeculativeModel, documents: list[Document], say: Callable[[str], None]) -> list[Row]:
    """Measure everything, appending each row to `out/rows.jsonl`; `out/summary.md` is written whatever happens.

    Raises:
        ValueError: At once, if the data is too short, a method does not fit, or `out` already holds results.
    """
    methods = build(job.specs, model)
    spans = chosen_spans(job, model, documents)
    prompts = chosen_prompts(job, documents)
    file = job.out / "rows.jsonl"
    if file.exists():
        raise ValueError(f"{file} already holds results: give another --out, or remove it")
    job.out.mkdir(parents=True, exist_ok=True)
    facts = facts_of(job, model)
    busy = os.getloadavg()[0] / (os.cpu_count() or 1)
    if busy > BUSY and "speed" in job.measures:
        say(f"warning: load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores: timings will be off")
    rows: list[Row] = []
    try:
        with file.open("w") as log:
            for row in measured(job, model, methods, spans, prompts):
                rows.append(row)
                log.write(json.dumps(row) + "\n")
                log.flush()
                say(progress(row))
    finally:
        (job.out / "summary.md").write_text(markdown(facts | {"load average after": f"{os.getloadavg()[0]:.2f}"}, rows))
    return rows


def measured(
    job: Job, model: SpeculativeModel, methods: dict[str, Any], spans: list[Span], prompts: list[Prompt]
) -> Iterator[Row]:
    """Yield the rows of all measurements that were asked for."""
    if "speed" in job.measures:
        yield from speed.measure(model, prompts, methods, job.new)
    if "memory" in job.measures:
        one_each = [next(p for p in prompts if p.context == context) for context in job.contexts]
        yield from memory.measure(job.loading, one_each, [spec.text for spec in job.specs], job.new)
    if "tau" in job.measures:
        yield from acceptance.measure(model, spans, job.contexts, job.specs)


def chosen_spans(job: Job, model: SpeculativeModel, documents: list[Document]) -> list[Span]:
    """Return the spans of both kinds; a kind that the data does not have is left out."""
    if "tau" not in job.measures or not any(spec.drafts for spec in job.specs):
        return []
    assert model.draft is not None  # `build` has checked that
    window = model.settings.cache.draft_context or model.draft.draft_context
    kinds = get_args(Kind)
    longest = job.contexts[-1]
    return [s for kind in kinds for s in choose_spans(documents, job.spans, longest, job.span_tokens, window, kind)]


def chosen_prompts(job: Job, documents: list[Document]) -> list[Prompt]:
    """Return the prompts for speed and memory, by length: as they are where files are labelled, else nested.

    A labelled file (govreport_2K.jsonl) gives its rows for its own length; rows with more tokens are cut inside, so
    that the instruction at their beginning and their end stay.
    """
    labelled = any(document.label is not None for document in documents)
    nested = [] if labelled else choose_spans(documents, job.samples, job.contexts[-1], 1, 1, "ordinary")
    prompts = []
    for context in job.contexts:
        if labelled:
            own = [each for each in documents if each.label == context][: job.samples]
            if not own:
                labels = sorted({each.label for each in documents if each.label})
                raise ValueError(f"{job.data} has no file for length {context}; its files have {labels}")
            prompts += [Prompt(each.name, context, cut_inside(each.ids, context)) for each in own]
        else:
            prompts += [Prompt(f"{span.document}@{span.position}", context, span.prompt(context)) for span in nested]
    return prompts


def cut_inside(ids: torch.Tensor, length: int, end: int = 16) -> torch.Tensor:
    """Return at most `length` tokens of ids [L]: the beginning, and the last `end` ones."""
    return ids if len(ids) <= length else torch.cat([ids[: length - end], ids[-end:]])


def facts_of(job: Job, model: SpeculativeModel) -> Row:
    """Return what the numbers depend on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    engine, draft = model.engine, model.draft
    drafting = f"draft {draft.name}, context {draft.draft_context} ({draft.context_source})" if draft else "no draft"
    device = torch.cuda.get_device_name() if engine.device.type == "cuda" else _processor()
    return {
        "command": job.command,
        "specx": f"{specx.__version__}, commit {commit.stdout.strip() or 'unknown'}",
        "machine": f"{device}, {torch.get_num_threads()} threads; Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}",
        "models": f"{type(model.target).__name__} {str(engine.dtype).removeprefix('torch.')} on {engine.device}; "
        + drafting,
        "data": f"{job.data}; {job.samples} prompts a length for speed, {job.new} new tokens; {job.spans} spans of "
        f"{job.span_tokens} tokens of each kind for tau",
        "attention": f"{engine.backend}: {engine.backend_reason}",
        "load average before": f"{os.getloadavg()[0]:.2f} on {os.cpu_count()} cores",
    }  # fmt: skip


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.machine()


def progress(row: Row) -> str:
    """Return one line about a row."""
    place = f"{row['measure']:<6} {row['context']:>6} {row['method']:<24}"
    if row["measure"] == "tau":
        return (
            f"{place} {row['kind']:<10} {row['document']}@{row['position']} {row['emitted'] / max(1, row['steps']):.2f}"
        )
    if row["measure"] == "memory":
        return f"{place} {row['peak_bytes'] / 2**20:.0f} MiB"
    rate = row["decode_tokens_per_second"]
    return f"{place} {row['prompt']} {f'{rate:.1f} tokens/s' if rate else '-'}"
