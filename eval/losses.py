"""Loss curves of trainings as one picture: `python -m specx.eval.losses --out FILE.svg NAME=OUT ...`.

OUT is the folder that `specx train` wrote, or its log. Each point is the mean over the newest steps.
"""

import json
from pathlib import Path

import click

from specx.eval.plot import curves


def read_losses(name: str) -> list[float]:
    """Return the loss of every step of a training: its folder, or its log.

    Raises:
        ValueError: If there are none.
    """
    path = Path(name).expanduser()
    file = path / "log.jsonl" if path.is_dir() else path
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    losses = [row["loss"] for row in rows if "loss" in row]  # the others say what was measured on the way
    if not losses:
        raise ValueError(f"{name} holds no losses; give a folder that specx train wrote, or its log.jsonl")
    return losses


def smooth(losses: list[float], over: int) -> list[tuple[float, float]]:
    """Return (step, mean of the last `over` losses), from the step that has so many on."""
    return [(end, sum(losses[end - over : end]) / over) for end in range(min(over, len(losses)), len(losses) + 1)]


@click.command(help=__doc__)
@click.argument("trainings", nargs=-1, required=True)
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--over", default=25, show_default=True, type=click.IntRange(1), help="Steps of a mean.")
@click.option("--title", default="Loss, nats a token", show_default=True)
def main(trainings: tuple[str, ...], out: Path, over: int, title: str) -> None:
    try:
        pairs = [(name, read_losses(given)) for name, _, given in (each.partition("=") for each in trainings)]
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    series = {name: smooth(losses, min(over, len(losses))) for name, losses in pairs}
    out.write_text(curves(series, title, f"steps; mean of the last {over}"), encoding="utf-8")


if __name__ == "__main__":
    main()
