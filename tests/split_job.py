"""What torchrun runs in test_split.py: the command, generations of split targets, and then one process that fails."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from specx import cli, cli_ranks
from specx.api import SpeculativeModel, load
from specx.ranks import Ranks


def generated(model: SpeculativeModel, options: dict[str, Any]) -> dict[str, Any]:
    """One generation, as JSON; with `beside`, another one takes turns with it."""
    prompt = torch.randint(1, 64, (300,), generator=torch.Generator().manual_seed(5))
    options = dict(options)
    beside = options.pop("beside", False)
    out, run = model.start(prompt, trace=True, **options)
    other = model.start(prompt.flip(0), **options)[1] if beside else iter(())
    for _ in run:
        next(other, None)
    kept = [record["kept_chunks"] for record in out.trace or []]
    return {"tokens": out.tokens, "accepted": out.stats["accepted_histogram"], "kept": kept}


def run(cases: list[dict[str, Any]], ranks: Ranks | None) -> list[dict[str, Any]]:
    """All cases; followers return nothing."""
    found = []
    for case in cases:
        model = load(case["target"], case["draft"], ranks=ranks)
        if ranks and ranks.rank:
            cli_ranks.follow(model)
            continue
        found += [generated(model, options) for options in case["runs"]]
        if ranks:
            ranks.tell(None)
    return found


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    command, cases = json.loads((folder / "job.json").read_text())
    cli.main(command, standalone_mode=False)
    with cli_ranks.joined() as ranks:
        assert ranks is not None
        found = run(cases, ranks)
        if ranks.rank == 0:
            (folder / "found.json").write_text(json.dumps(found))
        model: Any = load(cases[0]["target"], ranks=ranks)
        if ranks.rank:
            model.engine.chunk_scores = model.engine.forward = _full
            cli_ranks.follow(model)
        else:
            model.generate([1, 2, 3], max_new_tokens=4)


def _full(*args: Any, **options: Any) -> None:
    raise RuntimeError("the second device is full")


if __name__ == "__main__":
    main()
