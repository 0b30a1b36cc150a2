"""`torchrun ... -m specx run`: several processes run one command, and one of them talks. No torch until they join."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from specx.api import SpeculativeModel
    from specx.ranks import Ranks

_OWN = ("run", "train")  # commands that several processes can share


def launched() -> bool:
    """Tell whether torchrun, or a program like it, started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1 and "RANK" in os.environ


def leads() -> bool:
    """Tell whether this process is the first of them, or the only one."""
    return not launched() or os.environ["RANK"] == "0"


def begin(command: str | None) -> None:
    """Let only the first of several processes speak; raise click.UsageError for a command that one process runs."""
    if not launched() or command == "train":  # which has its own way, that of accelerate
        return
    if not leads():
        sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 (for as long as this process lives)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends it at once, without a word
    if command not in _OWN:
        raise click.UsageError(
            f"torchrun starts {' or '.join(f'specx {each}' for each in _OWN)}; specx {command} runs in one process: "
            "for a target too large for one device give it --device-map auto"
        )


@contextmanager
def joined() -> Iterator["Ranks | None"]:
    """Give the processes of this torchrun, None where this is the only one; in the end they leave together.

    Whatever ends one of them ends all, and the first that fails is the one that says why.
    """
    if not launched():
        yield None
        return
    from specx.ranks import Ranks

    ranks = Ranks()
    try:
        ranks.join()
        yield ranks
    except BaseException:
        if ranks.rank == 0 and ranks.whole:
            ranks.leave()
            raise
        if not ranks.first_to_fail():
            os._exit(1)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        raise
    ranks.leave()


def follow(model: "SpeculativeModel") -> None:
    """Serve the first process until it is done; Ctrl-C reaches that one as well, which then ends in its own way."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    engine: Any = model.engine
    engine.follow()
