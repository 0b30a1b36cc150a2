"""What `specx run` writes: text as it comes, figures after it, a file of figures. No torch here."""

import json
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from specx.api import Segment
    from specx.generation import Generation

_COLOURS = {"draft": "green", "context": "yellow", "both": "cyan", "target": "blue"}
INTERRUPTED, TERMINATED = 130, 143  # what shells say of a process that Ctrl-C, or SIGTERM, ended


class Terminated(KeyboardInterrupt):
    """SIGTERM: somebody, such as a cluster's scheduler, wants this process to end."""


def stream(steps: "Generator[list[Segment]]", coloured: bool) -> bool:
    """Write every step's text to stdout at once, then a newline; return whether Ctrl-C ended it early.

    Ctrl-C ends it between two steps, so that what was printed is what was counted. Before the first token, where a
    long prompt may take minutes, and when pressed twice, it acts at once.
    """
    colours = coloured and sys.stdout.isatty()
    interrupted = False
    try:
        with closing(steps), _gentle_ctrl_c() as pressed:
            for segments in steps:
                texts = (click.style(s.text, fg=_COLOURS[s.source]) if colours else s.text for s in segments)
                # not click.echo, which strips escape sequences: a model may have written them
                sys.stdout.write("".join(texts))
                sys.stdout.flush()
                pressed["gently"] = True
                if pressed["count"]:
                    interrupted = True
                    break
    except KeyboardInterrupt:
        interrupted = True
    click.echo()
    return interrupted


@contextmanager
def quitting_at_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C end the process at once while nothing has been generated.

    A KeyboardInterrupt would not do: raised inside an import of torch it may become an ImportError or be swallowed.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        os.write(2, b"interrupted\n")
        os._exit(INTERRUPTED)

    with _on(signal.SIGINT, leave):
        yield


@contextmanager
def ending_at_sigterm() -> Iterator[None]:
    """Let SIGTERM end what runs inside as Ctrl-C does, with `Terminated`; a second one changes nothing."""

    def leave(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # or it would end the writing of what is there
        raise Terminated

    with _on(signal.SIGTERM, leave):
        yield


@contextmanager
def _on(number: int, handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = signal.getsignal(number)
    if before is not signal.SIG_IGN:  # as Ctrl-C is in a shell script's background jobs
        signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


@contextmanager
def _gentle_ctrl_c() -> Iterator[dict[str, int]]:
    pressed = {"count": 0, "gently": False}

    def note(number: int, frame: FrameType | None) -> None:
        pressed["count"] += 1
        if not pressed["gently"] or pressed["count"] > 1:
            raise KeyboardInterrupt

    with _on(signal.SIGINT, note):
        yield pressed


def report(out: "Generation", verbose: bool) -> None:
    """Write what a generation cost to stderr."""
    stats = out.stats
    for note in out.notes:
        click.echo(f"note: {note}", err=True)
    for decision in out.decisions or []:
        click.echo(f"controller: {decision}", err=True)
    for number, record in enumerate(out.trace or [] if verbose else []):
        click.echo(f"step {number}: {', '.join(record['sources'])}", err=True)
        if record["kept_chunks"] is not None:
            texts = record.get("kept_texts") or [""] * len(record["kept_chunks"])
            chunks = ", ".join(f"{chunk} {text!r}" for chunk, text in zip(record["kept_chunks"], texts, strict=True))
            click.echo(f"step {number}: draft cache rebuilt, chunks kept: {chunks or 'none'}", err=True)
    rate = stats["decode_tokens_per_second"]
    speed = f"{rate:.1f} tokens/s" if rate else "no decode step"
    tau = f"{stats['tau']:.2f}" if stats["tau"] else "-"
    click.echo(
        f"{stats['new_tokens']} tokens after {stats['prompt_tokens']} ({stats['finish_reason']}), {speed}, tau {tau}, "
        f"{_share(stats)}first token {stats['ttft_seconds']:.2f} s; draft cache {stats['draft_kv_tokens']} tokens "
        f"(policy {stats['policy']})",
        err=True,
    )


def _share(stats: dict[str, Any]) -> str:
    """Say who proposed the tokens, where more than one could."""
    found = {source: count for source, count in stats["tokens_by_source"].items() if count}
    if not found.keys() & {"context", "both"}:
        return ""
    return "tokens by source: " + ", ".join(f"{source} {count}" for source, count in found.items()) + "; "


def compare(out: "Generation", plain: "Generation", greedy: bool) -> dict[str, Any]:
    """Write the ratio to plain decoding to stderr; return it."""
    mine, other = out.stats["decode_tokens_per_second"], plain.stats["decode_tokens_per_second"]
    ratio = mine / other if mine and other else None
    same = plain.tokens == out.tokens
    pairs = enumerate(zip(out.tokens, plain.tokens, strict=False))
    first = next((at for at, (left, right) in pairs if left != right), min(len(out.tokens), len(plain.tokens)))
    verdict = "output identical" if same else f"output differs from token {first} on"
    figures = f"{other:.1f} tokens/s; ratio {ratio:.2f}" if ratio else "too short to compare"
    click.echo(f"plain decoding of the same target: {figures}" + (f"; {verdict}" if greedy else ""), err=True)
    return {"plain_decode_tokens_per_second": other, "ratio": ratio, "identical": same}


def check_writable(name: str) -> None:
    """Raise click.UsageError if a file cannot be written, leaving no trace: the disk may hold its old content yet."""
    path = Path(name).expanduser()
    fresh = not path.exists()
    try:
        with path.open("a"):
            pass
        if fresh:
            path.unlink()
    except OSError as error:
        raise click.UsageError(f"--stats-json {name} cannot be written: {error.strerror or error}") from error


def write_json(name: str, content: Any) -> None:
    """Write a file that appears whole or not at all; devices and pipes are written to."""
    path = Path(name).expanduser()
    text = json.dumps(content, indent=1) + "\n"
    if path.exists() and (not path.is_file() or path.is_relative_to("/dev")):  # /dev/stdout may be a file, with text
        with path.open("a", encoding="utf-8") as stream:
            stream.write(text)
        return
    path = path.resolve()
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    except OSError:  # a file that may be written in a folder that may not
        draft.unlink(missing_ok=True)
        path.write_text(text, encoding="utf-8")
