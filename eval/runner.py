"""`specx eval`: which prompts, which measurements, and a row on disk for everything that was measured."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from specx.api import SpeculativeModel
from specx.data.documents import Document, length_name
from specx.eval import acceptance, memory, speed
from specx.eval.facts import facts_of
from specx.eval.methods import Spec, build, options_of
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


def run(
    job: Job, model: SpeculativeModel, documents: list[Document], say: Callable[[str], None], rows: list[Row]
) -> None:
    """Measure everything, appending each row to `out/rows.jsonl`; `out/summary.md` is written whatever happens.

    Args:
        say: Told what goes on.
        rows: Gets every row, so that who is interrupted has those measured by then.

    Raises:
        ValueError: At once, if the data is too short, a method does not fit, or `out` already holds results.
    """
    file = job.out / "rows.jsonl"
    check_unused(job.out)
    methods = build(job.specs, model)
    spans = chosen_spans(job, model, documents, say)
    prompts = chosen_prompts(job, documents)
    check_fits(job, model, spans, prompts)
    job.out.mkdir(parents=True, exist_ok=True)
    facts: Row = facts_of(job.command, data_of(job), job.loading.get("target"), model)
    busy = os.getloadavg()[0] / (os.cpu_count() or 1)
    if busy > BUSY and "speed" in job.measures:
        say(f"warning: load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores: timings will be off")
    try:
        with file.open("w", encoding="utf-8") as log:
            for row in measured(job, model, methods, spans, prompts):
                log.write(json.dumps(row) + "\n")
                log.flush()
                rows.append(row)
                say(progress(row))
    except BaseException as error:
        facts = {"INCOMPLETE": f"ended by {type(error).__name__} {error}".strip()} | facts
        raise
    finally:
        facts["load average after"] = f"{os.getloadavg()[0]:.2f}"
        (job.out / "summary.md").write_text(markdown(facts, rows), encoding="utf-8")


def check_unused(out: Path) -> None:
    """Raise ValueError if there are results in `out`."""
    file = out / "rows.jsonl"
    if file.exists() and file.stat().st_size:
        raise ValueError(f"{file} already holds results: give another --out, or remove it")


def check_fits(job: Job, model: SpeculativeModel, spans: list[Span], prompts: list[Prompt]) -> None:
    """Start every prompt, and every method of ours on the longest one, without running them.

    Raises:
        ValueError: If one cannot be served, saying which option to change.
    """
    wanted = [(prompt.ids, job.new, "--max-new-tokens") for prompt in prompts]
    wanted += [(span.prompt(context), job.span_tokens, "--span-tokens") for span in spans for context in job.contexts]
    for ids, new, option in wanted:
        try:
            model.start(ids, plain=True, max_new_tokens=new)
        except ValueError as error:
            raise ValueError(f"{error}; lower --lengths or {option}, which is {new}") from error
    longest, new, _ = max(wanted, key=lambda each: len(each[0]))
    for spec in job.specs:
        if spec.drafts:
            try:
                model.start(longest, max_new_tokens=new, **options_of(spec))
            except ValueError as error:
                raise ValueError(f"method {spec.text}: {error}") from error
            levels = model.settings.override(**spec.options).tree.depth + 2
            if spans and job.span_tokens <= levels:
                raise ValueError(
                    f"method {spec.text}: --span-tokens {job.span_tokens} leaves no round for a tree that may emit "
                    f"{levels} tokens after the first one; give at least {levels + 1}"
                )


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


def chosen_spans(
    job: Job, model: SpeculativeModel, documents: list[Document], say: Callable[[str], None]
) -> list[Span]:
    """Return the spans of both kinds; a kind that the data does not have is left out."""
    if "tau" not in job.measures:
        return []
    if not any(spec.drafts for spec in job.specs):
        missing = "tau needs a method with a draft of ours: full, window, retrieval or auto"
        if job.measures == ("tau",):
            raise ValueError(missing)
        say(f"note: {missing}; it is left out")
        return []
    assert model.draft is not None  # `build` has checked that
    window = model.settings.cache.draft_context or model.draft.draft_context
    spans: list[Span] = []
    for kind in get_args(Kind):
        try:
            found = choose_spans(documents, job.spans, job.contexts[-1], job.span_tokens, window, kind)
        except ValueError as error:
            raise ValueError(f"for tau, {error}, or leave tau out of --measure") from error
        if len(found) < job.spans:
            say(f"note: the data has {len(found)} of the {job.spans} {kind} spans that were asked for")
        spans += found
    return spans


def chosen_prompts(job: Job, documents: list[Document]) -> list[Prompt]:
    """Return the prompts for speed and memory, by length: as they are where files are labelled, else nested.

    A labelled file (govreport_2K.jsonl) gives its rows for its own length; rows with more tokens are cut inside, so
    that the instruction at their beginning and their end stay.
    """
    if not {"speed", "memory"} & set(job.measures):
        return []
    labelled = any(document.label is not None for document in documents)
    nested = [] if labelled else choose_spans(documents, job.samples, job.contexts[-1], job.new, 1, "ordinary")
    prompts = []
    for context in job.contexts:
        if labelled:
            own = [each for each in documents if each.label == context][: job.samples]
            if not own:
                labels = ",".join(length_name(n) for n in sorted({each.label for each in documents if each.label}))
                raise ValueError(
                    f"{job.data} has no file for length {length_name(context)}; its files have --lengths {labels}"
                )
            prompts += [Prompt(each.name, context, cut_inside(each.ids, context)) for each in own]
        else:
            prompts += [Prompt(f"{span.document}@{span.position}", context, span.prompt(context)) for span in nested]
    return prompts


def cut_inside(ids: torch.Tensor, length: int, end: int = 16) -> torch.Tensor:
    """Return at most `length` tokens of ids [L]: the beginning, and the last `end` ones (half of them at most)."""
    end = min(end, length // 2)
    return ids if len(ids) <= length else torch.cat([ids[: length - end], ids[len(ids) - end :]])


def data_of(job: Job) -> str:
    """Say what was read, and how much of it."""
    parts = [job.data]
    if {"speed", "memory"} & set(job.measures):
        parts.append(f"{job.samples} prompts a length for speed, one for memory, {job.new} new tokens")
    if "tau" in job.measures:
        parts.append(f"at most {job.spans} spans of {job.span_tokens} tokens of each kind for tau")
    return "; ".join(parts)


def progress(row: Row) -> str:
    """Return one line about a row."""
    place = f"{row['measure']:<6} {row['context']:>6} {row['method']:<24}"
    if row["measure"] == "tau":
        return (
            f"{place} {row['kind']:<10} {row['document']}@{row['position']} {row['emitted'] / max(1, row['steps']):.2f}"
        )
    if row["measure"] == "memory":
        return f"{place} {(row['peak_bytes'] - row['before_bytes']) / 2**20:.0f} MiB above the loaded process"
    rate = row["decode_tokens_per_second"]
    return f"{place} {row['prompt']} {f'{rate:.1f} tokens/s' if rate else '-'}"
