"""Prompts from files, standard input, and the standard library."""

import json
import sys
from pathlib import Path
from typing import Any

from specx.data import stdlib

DEMO_TOKENS = 8192
_DEMO_MODULE = "argparse.py"


def read_prompts(source: str) -> list[str]:
    """Read prompts from a file, or from standard input for "-".

    A name ending in .jsonl, or text whose first line is a JSON object, is read as JSON lines with a "text" key each;
    anything else is one prompt.

    Raises:
        ValueError: Missing or binary file, a line that is no JSON, no "text" key, or nothing to read.
    """
    name = "standard input" if source == "-" else source
    content = _read(source)
    if not content.strip():
        raise ValueError(f"{name} is empty; give a prompt with some text")
    if not (source.endswith(".jsonl") or _is_json_lines(content)):
        return [content]
    return [_text_of(line, f"{name} line {n}") for n, line in enumerate(content.splitlines(), 1) if line.strip()]


def demo_prompt(tokenizer: Any, tokens: int = DEMO_TOKENS) -> tuple[str, list[int]]:
    """Return the name and the first tokens of a long module that the bundled pair was not trained on."""
    found = dict(stdlib.held_out_files())
    name = _DEMO_MODULE if _DEMO_MODULE in found else next(iter(found), "")
    if not name:
        raise RuntimeError("this interpreter has no readable standard library source; use --input or --prompt")
    ids = tokenizer(found[name].read_text(encoding="utf-8"), verbose=False)["input_ids"]
    return name, ids[:tokens]


def _read(source: str) -> str:
    try:
        if source == "-":
            return sys.stdin.buffer.read().decode("utf-8")
        return Path(source).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 text (byte {error.start}); give a text or a JSONL file") from error
    except OSError as error:
        raise ValueError(f"cannot read {source}: {error.strerror or error}") from error


def _is_json_lines(content: str) -> bool:
    first = content.lstrip().splitlines()[0]
    try:
        return "text" in json.loads(first) if first.startswith("{") else False
    except ValueError:
        return False


def _text_of(line: str, place: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ValueError(f'{place} has no "text" key with a string; each line must be like {{"text": "..."}}')
    if not row["text"].strip():
        raise ValueError(f'{place} has an empty "text"')
    return row["text"]
