"""Synthetic key retrieval of any length: many lines that give a code for a key, and a question about one of them.

The task of "needle in a haystack" with a haystack of needles (compare RULER's multi-key task, arXiv 2404.06654), made
here, so that nothing is downloaded. The same seed, length and number give the same text.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

BEFORE = "Every line below gives the code of one locker. Remember them; a question follows.\n\n"
AFTER = "\nWhat is the code of locker {key}? Answer with the code alone.\nThe code of locker {key} is"
_COLOURS = ("amber", "azure", "coral", "ebony", "green", "ivory", "khaki", "olive", "pearl", "ruby", "slate", "white")
_THINGS = (
    "anchor",
    "basket",
    "candle",
    "drawer",
    "feather",
    "garden",
    "hammer",
    "island",
    "jacket",
    "kettle",
    "ladder",
)


@dataclass(frozen=True, slots=True)
class Haystack:
    """A generated task: its lines, the question after them, which line that asks for, and the code."""

    lines: tuple[str, ...]
    after: str
    place: int
    answer: str


def haystack(count: Callable[[str], int], room: int, depth: float, seed: str) -> Haystack:
    """Make as many lines as have room, one of which is asked for.

    Args:
        count: Tokens of a text.
        room: Tokens for all lines and the question together.
        depth: Where the line lies that is asked for, 0 the first, 1 the last.
        seed: Of everything that is drawn.

    Raises:
        ValueError: If not even two lines have room.
    """
    draw = random.Random(seed)
    wanted, answer = _key(draw), _code(draw)
    after, line = AFTER.format(key=wanted), _line(wanted, answer)
    left = room - count(after) - count(line)
    lines, taken = list[str](), {wanted, answer}
    while True:
        key, code = _key(draw), _code(draw)
        if taken & {key, code}:
            continue
        left -= count(_line(key, code))
        if left < 0:
            break
        taken |= {key, code}
        lines.append(_line(key, code))
    if not lines:
        raise ValueError(f"data needle: {room} tokens have no room for two lines and a question; give longer --lengths")
    place = round(depth * len(lines))
    return Haystack((*lines[:place], line, *lines[place:]), after, place, answer)


def _key(draw: random.Random) -> str:
    return f"{draw.choice(_COLOURS)}-{draw.choice(_THINGS)}-{draw.randrange(100, 1000)}"


def _code(draw: random.Random) -> str:
    return str(draw.randrange(100_000, 1_000_000))


def _line(key: str, code: str) -> str:
    return f"The code of locker {key} is {code}.\n"
