"""`specx eval`: plan the units, have them measured, and keep a row on disk for everything that was."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from specx.api import SpeculativeModel
from specx.data.documents import Document
from specx.eval import summary as summaries
from specx.eval.facts import described, facts_of
from specx.eval.ledger import Ledger, claimed, in_order, take_up
from specx.eval.planning import Job, Say, configuration, data_of, planned
from specx.eval.pool import Pool
from specx.eval.progress import Remaining
from specx.eval.ray_pool import RayPool
from specx.eval.tables import markdown
from specx.eval.units import Unit
from specx.eval.workbench import Task, Workbench

Row = dict[str, Any]
_BEFORE = "note: rows before"
BUSY = 0.5  # load average a core above which timings are not to be trusted


def run(
    job: Job,
    model: SpeculativeModel,
    documents: list[Document],
    say: Say,
    rows: list[Row],
    tick: Callable[[Remaining], None] = lambda _: None,
) -> None:
    """Measure everything, appending each row to `out/rows.jsonl`; the summaries are written whatever happens.

    Args:
        say: Told what goes on.
        rows: Gets every row, so that who is interrupted has those measured by then.
        tick: Told after each unit what is left.

    Raises:
        ValueError: At once, if the data is too short, a method does not fit, `out` already holds results and `resume`
            does not say to go on, or it does and the configuration changed, or another process measures into it.
    """
    if not job.resume:
        check_unused(job.out)
    units, notes = planned(job, model, documents, say)
    facts: Row = facts_of(job.command, data_of(job), job.loading.get("target"), model)
    summary = described(job.command, facts, model) | {"configuration": configuration(job, units, facts), "notes": notes}
    job.out.mkdir(parents=True, exist_ok=True)
    with claimed(job.out):
        rows += taken_up(job, units, summary)
        _go_on(job, model, units, facts, summary, say, rows, tick)


def _go_on(
    job: Job,
    model: SpeculativeModel,
    units: Sequence[Unit],
    facts: Row,
    summary: Row,
    say: Say,
    rows: list[Row],
    tick: Callable[[Remaining], None],
) -> None:
    """Measure the units of which there are no rows yet."""
    warn_if_busy(job, say)
    done = {row["unit"] for row in rows}
    left = [unit for unit in units if unit.number not in done]
    if done:
        say(f"going on after {len(done)} of {len(units)} parts")
    ended, began = None, os.getloadavg()[0]
    summary |= {"workers": job.workers or 1, "load": {"before": began, "after": None, "cores": os.cpu_count() or 1}}
    save(job.out, summary, "running", len(done), len(units), [])
    try:
        with Ledger(job.out / "rows.jsonl") as ledger:
            for unit, found in measured(job, model, left, say, tick):
                for row in found:
                    ledger.append(row)
                    rows.append(row)
                    say(progress(row))
                done.add(unit.number)
    except BaseException as error:
        ended = error
        facts = {"INCOMPLETE": f"ended by {type(error).__name__} {error}".strip()} | facts
        raise
    finally:
        rows[:] = in_order(rows)
        facts["load average after"] = f"{os.getloadavg()[0]:.2f}"
        summary["load"]["after"] = os.getloadavg()[0]
        save(job.out, summary, _status(ended), len(done), len(units), rows, ended)
        (job.out / "summary.md").write_text(markdown(facts, rows), encoding="utf-8")


def check_unused(out: Path) -> None:
    """Raise ValueError if there are results in `out`."""
    file = out / "rows.jsonl"
    if file.exists() and file.stat().st_size:
        raise ValueError(f"{file} already holds results: give another --out, or remove it, or --resume")


def _words(fact: Any) -> str:
    return ", ".join(f"{name} {value}" for name, value in fact.items()) if isinstance(fact, dict) else str(fact)


def taken_up(job: Job, units: Sequence[Unit], summary: Row) -> list[Row]:
    """Return the rows of finished units where a run goes on.

    Raises:
        ValueError: If what is there is of another configuration.
    """
    before, file = summaries.read_summary(job.out) if job.resume else None, job.out / "rows.jsonl"
    if before is None:
        if job.resume and file.exists() and file.stat().st_size:
            raise ValueError(f"--resume: {job.out} has rows but no summary.json to compare with; give another --out")
        return []
    changed = summaries.changes(before["configuration"], summary["configuration"])
    if changed:
        raise ValueError(
            f"--resume: {job.out} holds results of another configuration: {'; '.join(changed)}; give the same "
            "options as before, or another --out"
        )
    summary["notes"] += [note for note in before["notes"] if note.startswith(_BEFORE)]
    for name in ("versions", "commit", "hardware"):
        if before[name] != summary[name]:
            summary["notes"].append(f"{_BEFORE} were measured with {name} {_words(before[name])}")
    summary["notes"] = list(dict.fromkeys(summary["notes"]))
    return take_up(file, units)


def measured(
    job: Job, model: SpeculativeModel, units: Sequence[Unit], say: Say, tick: Callable[[Remaining], None]
) -> Iterator[tuple[Unit, Iterator[Row] | list[Row]]]:
    """Yield every unit with its rows: one by one as they come here, together from workers."""
    task = Task(job.loading, tuple(spec.text for spec in job.specs), job.new)
    if not units:
        return
    if job.ray is None and (job.workers or 1) == 1:
        left, bench = Remaining(units), Workbench(task, model)
        for unit in units:
            yield unit, bench.rows(unit)
            left.done(unit)
            tick(left)
        return
    pool = _pool(job, task)
    say(f"note: {pool.count} workers measure at the same time: their timings are not those of a quiet machine")
    left = Remaining(units)
    for unit, found in pool.run(units):
        yield unit, found
        left.done(unit)
        tick(left)
    if pool.lost:
        say(f"note: {pool.lost} workers were lost; what they had in hand was measured again")


def _pool(job: Job, task: Task) -> Pool | RayPool:
    if job.ray is not None:
        return RayPool(task, job.ray, job.workers)
    return Pool(task, job.workers or 1)


def warn_if_busy(job: Job, say: Say) -> None:
    """Say so if the machine has other work, which timings suffer from."""
    busy = os.getloadavg()[0] / (os.cpu_count() or 1)
    if busy > BUSY and "speed" in job.measures:
        say(f"warning: load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores: timings will be off")


def save(
    out: Path, summary: Row, status: str, done: int, of: int, rows: list[Row], error: BaseException | None = None
) -> None:
    """Write the JSON summary."""
    ended = None if error is None else f"{type(error).__name__} {error}".strip()
    state = {"version": summaries.VERSION, "status": status, "ended_by": ended}
    figures = {"units": {"done": done, "of": of}, "results": summaries.results(rows)}
    summaries.write_summary(out, state | summary | figures)


def _status(error: BaseException | None) -> str:
    if error is None:
        return "complete"
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"


def progress(row: Row) -> str:
    """Return one line about a row."""
    place = f"{row['measure']:<6} {row['context']:>6} {row['method']:<24}"
    if row["measure"] == "tau":
        return (
            f"{place} {row['kind']:<10} {row['document']}@{row['position']} {row['emitted'] / max(1, row['steps']):.2f}"
        )
    if row["measure"] == "memory":
        return f"{place} {(row['peak_bytes'] - row['before_bytes']) / 2**20:.0f} MiB above the loaded process"
    if row["measure"] == "trace":
        rate = row["hit_rate"]
        return (
            f"{place} {row['prompt']} {f'{rate:.0%} of the attention retrieved' if rate is not None else ''}".rstrip()
        )
    rate = row["decode_tokens_per_second"]
    return f"{place} {row['prompt']} {f'{rate:.1f} tokens/s' if rate else '-'}"
