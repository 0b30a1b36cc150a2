"""What `specx eval` was asked for, and the units that it is made of; mistakes are found here, before any work."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specx.api import SpeculativeModel
from specx.data.documents import WHOLE, Document, length_name
from specx.eval.chosen import Prompt, choose_kinds, choose_prompts, whole_prompts
from specx.eval.methods import Spec, build, options_of
from specx.eval.spans import Span
from specx.eval.summary import fingerprint
from specx.eval.units import Counts, Unit, plan

Row = dict[str, Any]
Say = Callable[[str], None]
MEASURES = ("tau", "speed", "memory", "trace")


@dataclass(frozen=True, slots=True)
class Job:
    """What `specx eval` was asked for.

    Attributes:
        data: As given.
        contexts: Prompt lengths in tokens, ascending; none: every document as long as it is, up to `room`.
        samples: Prompts a length for speed; memory and traces take the first.
        spans: Spans of each kind for tau.
        span_tokens: Tokens of each span.
        new: Tokens to generate, for speed, memory and traces.
        loading: Arguments of `specx.load`, for processes of their own.
        runs: How often each prompt is timed.
        resume: Go on where a run with the same configuration ended.
        workers: Processes that measure at the same time.
        ray: Address of a Ray cluster whose actors measure instead.
        about: What was read, in words.
        continues: Whether documents have a text of their own to walk along, as tau does.
        room: Tokens that a prompt may have.
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
    runs: int = 1
    resume: bool = False
    workers: int | None = None
    ray: str | None = None
    about: str = ""
    continues: bool = True
    room: int = 0


def planned(job: Job, model: SpeculativeModel, documents: list[Document], say: Say) -> tuple[list[Unit], list[str]]:
    """Return the units, and what was said about the data while they were chosen.

    Raises:
        ValueError: If the data is too short, or a method does not fit.
    """
    notes: list[str] = []

    def note(line: str) -> None:
        notes.append(line)
        say(line)

    counts = Counts(
        timed=list(build(job.specs, model)),
        written=[spec.text for spec in job.specs],
        drafting=[spec.text for spec in job.specs if spec.drafts],
    )
    spans = chosen_spans(job, model, documents, note)
    prompts = chosen_prompts(job, documents, note)
    check_fits(job, model, spans, prompts)
    contexts = job.contexts or [each.context for each in prompts[:1]]
    return plan(job.measures, counts, contexts, prompts, spans, job.runs), notes


def configuration(job: Job, units: Sequence[Unit], facts: Row) -> Row:
    """Return what must be equal for a run to go on with the rows of another."""
    loading = {name: value for name, value in sorted(job.loading.items()) if value is not None}
    return {
        "--data": job.data, "data hash": fingerprint(units),
        "--lengths": ",".join(map(length_name, job.contexts)) or WHOLE, "--samples": job.samples, "--runs": job.runs,
        "--methods": ",".join(spec.text for spec in job.specs), "--measure": ",".join(sorted(job.measures)),
        "--spans": job.spans, "--span-tokens": job.span_tokens, "--max-new-tokens": job.new,
        "models": facts["models"], "loading": {name: _plain(value) for name, value in loading.items()},
    }  # fmt: skip


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


def chosen_spans(job: Job, model: SpeculativeModel, documents: list[Document], say: Say) -> list[Span]:
    """Return the spans of both kinds; none where tau cannot be measured."""
    if "tau" not in job.measures:
        return []
    missing = None
    if not any(spec.drafts for spec in job.specs):
        missing = "tau needs a method with a draft of ours: full, window, retrieval or auto"
    elif not job.contexts:
        missing = f"tau compares lengths of one text, and --lengths {WHOLE} gives each its own"
    elif not job.continues:
        missing = f"tau walks along a text, and {job.data} has none to continue"
    if missing:
        if job.measures == ("tau",):
            raise ValueError(missing)
        say(f"note: {missing}; it is left out")
        return []
    assert model.draft is not None  # `build` has checked that
    window = model.settings.cache.draft_context or model.draft.draft_context
    return choose_kinds(documents, job.spans, job.contexts[-1], job.span_tokens, window, say)


def chosen_prompts(job: Job, documents: list[Document], say: Say) -> list[Prompt]:
    """Return the prompts for speed, memory and traces."""
    if not {"speed", "memory", "trace"} & set(job.measures):
        return []
    if not job.contexts:
        return whole_prompts(job.data, documents, job.samples, job.room, say)
    return choose_prompts(job.data, documents, job.contexts, job.samples, job.new, say)


def data_of(job: Job) -> str:
    """Say what was read, and how much of it."""
    parts = [job.data if job.about in ("", job.data) else f"{job.data} ({job.about})"]
    if {"speed", "memory"} & set(job.measures):
        times = f", {job.runs} times each" if job.runs > 1 else ""
        parts.append(f"{job.samples} prompts a length for speed{times}, one for memory, {job.new} new tokens")
    if "tau" in job.measures:
        parts.append(f"at most {job.spans} spans of {job.span_tokens} tokens of each kind for tau")
    return "; ".join(parts)


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool) else str(value)
