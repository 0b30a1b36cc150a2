"""What a long command says of the time left: a bar on a terminal, plain lines on a pipe."""

import io
import sys
from types import SimpleNamespace

from specx import progress


def left(done, total=4):
    return SimpleNamespace(left=total - done, total=total, words=lambda: "about 9 s")


def test_a_pipe_gets_lines_and_not_too_many(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with progress.shown() as (say, tick):
        say("speed 512 ar [red] 9 tokens/s")
        for done, seconds in ((1, 100.0), (2, 101.0), (3, 115.0), (4, 130.0)):
            now[0] = seconds
            tick(left(done))
    assert capsys.readouterr().err.splitlines() == [
        "speed 512 ar [red] 9 tokens/s",
        "1 of 4 parts done, about 9 s left",
        "3 of 4 parts done, about 9 s left",
    ]


def test_a_terminal_gets_a_bar_below_the_lines(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "90")
    with progress.shown() as (say, tick):
        say("speed 512 ar [red] 9 tokens/s")
        tick(left(3))
    text = stream.getvalue()
    assert "speed 512 ar [red] 9 tokens/s" in text
    assert "3/4" in text
    assert "about 9 s left" in text
    assert "\x1b[" in text
