"""Long documents for a measurement: held-out modules of the standard library, or the reader's own files.

File names may carry a label, the length in tokens that their texts were cut to: `govreport_2K.jsonl`, `pg19_512.jsonl`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specx.data import stdlib
from specx.data.framed import Frame
from specx.data.prompts import read_answered
from specx.data.sets import Score

KILO = 1024
WHOLE = "whole"  # in place of lengths: every document as long as it is
_LENGTH = re.compile(r"([0-9]+(?:\.[0-9]+)?)([kK]?)")


@dataclass(frozen=True, slots=True)
class Document:
    """A tokenised text.

    Attributes:
        name: A module's relative path, or a file's name and the row in it, counted from 1: `file.jsonl:3`.
        ids: int64 [L].
        label: The length in tokens that the file's name tells, or None; the text itself may be longer or shorter.
        frame: What stands around the text in a prompt; None: the text is the prompt, or a prompt is taken out of it.
        answers: Reference answers.
        score: How outputs are compared with them.
    """

    name: str
    ids: Tensor
    label: int | None
    frame: Frame | None = None
    answers: tuple[str, ...] = ()
    score: Score = "rouge_l"


def read_documents(source: str, tokenizer: Any, limit: int | None = None) -> list[Document]:
    """Read and tokenise documents.

    Args:
        source: "stdlib": held-out modules of the standard library, each followed by its tests, sorted by name; a file:
            JSON lines with a "text" each (and perhaps an "answer", or "answers"), or one plain text; a folder: its
            *.jsonl files, sorted by label, then name, those without a label last.
        tokenizer: Called as transformers' are.
        limit: Read at most this many rows of each file; "stdlib" is read whole.

    Raises:
        ValueError: Nothing of that name, nothing to read in it, or a file that `prompts.read_answered` refuses.
    """
    return [
        Document(
            name, torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64), label, None, answers
        )
        for name, text, answers, label in _texts(source, limit)
    ]


def labels_of(source: str) -> list[int]:
    """Return the lengths that file names tell, ascending; none if one of them tells nothing."""
    labels = [_label(file) for file in _files(source)]
    return sorted({each for each in labels if each}) if None not in labels else []


def parse_length(text: str) -> int:
    """Return the tokens that `text` stands for: 512 for "512", 2048 for "2K" or "2k", 1536 for "1.5K".

    Raises:
        ValueError: If that is no whole number of at least one token.
    """
    match = _LENGTH.fullmatch(text.strip())
    tokens = float(match[1]) * (KILO if match[2] else 1) if match else 0.0
    if tokens < 1 or not tokens.is_integer():  # an infinity is no integer
        raise ValueError(f"a length must be a whole number of tokens like 512, 2K or 1.5K; got {text!r}")
    return int(tokens)


def parse_lengths(text: str) -> list[int]:
    """Return the lengths of a comma-separated list, ascending, each once.

    Raises:
        ValueError: If one of them is no length.
    """
    return sorted({parse_length(part) for part in text.split(",")})


def length_name(tokens: int) -> str:
    """Return the short name of a length: "2K" for 2048; what is no multiple of 1024 stays a plain number."""
    return str(tokens) if tokens % KILO else f"{tokens // KILO}K"


def short_length(tokens: int) -> str:
    """Return how tables and charts call a length: as `length_name`, and "15.5K" for 15872."""
    return length_name(tokens) if tokens < KILO or tokens % (KILO // 2) else f"{tokens / KILO:g}K"


def _texts(source: str, limit: int | None) -> Iterator[tuple[str, str, tuple[str, ...], int | None]]:
    """Yield (name, text, reference answers, label) of every document."""
    if source == "stdlib":
        yield from _stdlib_texts()
        return
    for file in _files(source):
        for row, (text, answers) in enumerate(read_answered(str(file), limit), 1):
            yield f"{file.name}:{row}", text, answers, _label(file)


def _stdlib_texts() -> Iterator[tuple[str, str, tuple[str, ...], None]]:
    groups = stdlib.held_out_groups()
    if not groups:
        raise ValueError(
            "data stdlib needs the source of the standard library, and this interpreter has none that can be read; "
            "give a JSONL file or a folder of them"
        )
    for name, paths in groups:
        yield name, "\n".join(path.read_text(encoding="utf-8") for path in paths), (), None


def _files(source: str) -> list[Path]:
    allowed = f"data must be stdlib, a JSONL file or a folder of them; got {source!r}"
    try:
        path = Path(source).expanduser()
        if not source or source == "-" or not path.exists():  # read_answered takes "-" for standard input
            raise ValueError(f"{allowed}, which is no file or folder")
        if not path.is_dir():
            return [path]
        files = [file for file in path.iterdir() if file.suffix == ".jsonl"]
    except (OSError, RuntimeError) as error:  # RuntimeError: ~ of somebody unknown
        raise ValueError(f"{allowed}, which cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not files:
        raise ValueError(f"{allowed}, a folder without .jsonl files; put some there, or name one file")
    return sorted(files, key=lambda file: (_label(file) is None, _label(file) or 0, file.name))


def _label(file: Path) -> int | None:
    """Return the tokens that a name like `pg19_512.jsonl` ends in, or None."""
    _, underscore, end = file.stem.rpartition("_")
    try:
        return parse_length(end) if underscore else None
    except ValueError:
        return None
