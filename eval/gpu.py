"""`python -m specx.eval.gpu`: what can only be measured on a GPU, within a budget of time, a row on disk for each.

The models are the bundled pair, also grown to large shapes: nothing is downloaded. Measuring is another process's work
(`gpu_worker`), so that a fault on the device, which no process survives, costs one row.
"""

import json
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import click

from specx.eval.gpu_rows import SHARES, Job, append_row, failed_row, read_rows

GRACE = 60.0  # seconds beyond the budget after which a task that does not end is ended
MOST_STARTS = 8
WORKER = (sys.executable, "-m", "specx.eval.gpu_worker")


@click.command()
@click.option("--budget", default=420.0, show_default=True, type=click.FloatRange(1), help="Seconds of wall time.")
@click.option("--section", default=",".join(SHARES), show_default=True, help="Which of them, in their order.")
@click.option("--out", metavar="DIR", help="Default: eval/results of this checkout; with --dry-run a temporary folder.")
@click.option(
    "--dry-run", is_flag=True, help="Everything once with small shapes on the CPU: does the suite itself work?"
)
def main(budget: float, section: str, out: str | None, dry_run: bool) -> None:
    """Measure on a GPU: numbers, step, kernel and end-to-end.

    The table goes to stdout and beside the rows, progress to stderr.
    """
    began = time.time()
    wanted = {part.strip() for part in section.split(",") if part.strip()}
    if not wanted or wanted - set(SHARES):
        raise click.UsageError(f"--section takes {', '.join(SHARES)}, joined by commas; got {section!r}")
    import torch

    if not dry_run and not torch.cuda.is_available():
        raise click.UsageError("no CUDA device here; --dry-run tries the suite on a CPU")
    results = Path(__file__).parent / "results"  # of a checkout
    kept = results if results.exists() else Path("specx-gpu")
    folder = Path(out or (tempfile.mkdtemp(prefix="specx-gpu-") if dry_run else kept))
    folder.mkdir(parents=True, exist_ok=True)
    device = "dry run" if dry_run else torch.cuda.get_device_name()
    rows = unused(folder, device)
    command = shlex.join(["python", "-m", "specx.eval.gpu", *sys.argv[1:]])
    sections = deadlines([name for name in SHARES if name in wanted], began, budget)
    try:
        supervise(rows, sections, dry_run, command, WORKER)
    finally:
        from specx.eval.gpu_tables import markdown

        text = markdown(read_rows(rows))
        rows.with_suffix(".md").write_text(text, encoding="utf-8")
        click.echo(text)
        click.echo(f"written: {rows}, {rows.with_suffix('.md').name}", err=True)


def unused(folder: Path, device: str) -> Path:
    """Return a file for the rows that does not exist yet."""
    stem = "-".join(["gpu", *device.lower().split(), date.today().isoformat()])
    files = [folder / f"{stem}{number}.jsonl" for number in ("", *(f"-{again}" for again in range(2, 100)))]
    found = next((file for file in files if not file.exists()), None)
    if found is None:
        raise click.UsageError(f"{folder} has {len(files)} results of today already; give another --out")
    return found


def deadlines(sections: list[str], began: float, budget: float) -> list[tuple[str, float]]:
    """Return the time of day at which each section must be over."""
    total, spent, found = sum(SHARES[name] for name in sections), 0.0, []
    for name in sections:
        spent += SHARES[name]
        found.append((name, began + budget * spent / total))
    return found


def supervise(rows: Path, sections: list[tuple[str, float]], dry: bool, command: str, worker: tuple[str, ...]) -> None:
    """Start a process for the job, and another one behind what it had done whenever it dies, until the time is up."""
    last = sections[-1][1]
    with tempfile.TemporaryDirectory() as scratch:
        marker = Path(scratch) / "marker"
        job = Job(sections, str(rows), str(marker), dry, command)
        for _ in range(MOST_STARTS):
            marker.unlink(missing_ok=True)
            began = time.time()
            process = subprocess.Popen(worker, stdin=subprocess.PIPE, text=True)
            try:
                process.communicate(job.text(), timeout=max(1.0, last + GRACE - time.time()))
            except subprocess.TimeoutExpired:
                pass
            finally:  # also at Ctrl-C
                late = process.poll() is None
                process.kill()
                process.wait()
            if process.returncode == 0:
                return
            blame(rows, marker, "it did not end in time" if late else died(process.returncode), time.time() - began)
            if late or not marker.exists() or time.time() > last:
                return


def died(status: int) -> str:
    """Say how a process ended."""
    return f"the process was killed by signal {-status}" if status < 0 else f"the process ended with status {status}"


def blame(rows: Path, marker: Path, message: str, seconds: float) -> None:
    """Write the row of the task under which a process died, unless the process itself has."""
    section, name = json.loads(marker.read_text(encoding="utf-8")) if marker.exists() else ("suite", "its start")
    if (section, name) not in {(row.get("section"), row.get("name")) for row in read_rows(rows)}:
        append_row(rows, failed_row(section, name, message, seconds))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the table is written, and no worker is left over
    main()
