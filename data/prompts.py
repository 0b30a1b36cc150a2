"""Prompts from files, standard input, and the standard library."""

import json
import sys
import sysconfig
from pathlib import Path
from typing import Any

from specx.data import stdlib
from specx.data.sets import answers_of

DEMO_TOKENS = 8192
_DEMO_MODULE = "asyncio/base_events.py"


def read_prompts(source: str, limit: int | None = None) -> list[str]:
    """Read prompts from a file, or from standard input for "-".

    A name ending in .jsonl, or text whose first line is a JSON object with a "text" key, is read as JSON lines with
    such a key each; anything else is one prompt.

    Args:
        source: A file's name, or "-".
        limit: Read at most this many lines of JSON.

    Raises:
        ValueError: Missing or binary file, a line that is no JSON, no "text" key, or nothing to read.
    """
    return [text for text, _ in read_answered(source, limit)]


def read_answered(source: str, limit: int | None = None) -> list[tuple[str, tuple[str, ...]]]:
    """Read prompts as `read_prompts` does, each with the reference answers of its line ("answer" or "answers")."""
    name = "standard input" if source == "-" else source
    content = _read(source, name)
    check_text(content, name)
    if not (source.endswith(".jsonl") or _is_json_lines(content)):
        return [(content, ())]
    # not splitlines(), which also splits at characters that JSON allows inside a string
    lines = [(number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    return [_text_of(line, f"{name} line {number}") for number, line in lines[:limit]]


def check_text(text: str, name: str) -> str:
    """Return the text, or raise ValueError if it is blank or no Unicode (half a surrogate pair, a byte of argv)."""
    if not text.strip():
        raise ValueError(f"{name} is empty; give some text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not valid Unicode text: {error.reason}") from error
    return text


def demo_prompt(tokenizer: Any, tokens: int = DEMO_TOKENS) -> tuple[str, list[int]]:
    """Return the name and the first tokens of a long module that the bundled pair was not trained on."""
    name, path = _DEMO_MODULE, Path(sysconfig.get_paths()["stdlib"]) / _DEMO_MODULE
    if not path.is_file():  # listing the library takes seconds, so only then
        found = max(stdlib.held_out_files(), key=lambda item: item[1].stat().st_size, default=None)
        if found is None:
            raise RuntimeError("this interpreter has no readable standard library source; use --input or --prompt")
        name, path = found
    ids = tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    return name, ids[:tokens]


def held_out_prompt(tokenizer: Any, tokens: int, number: int = 0) -> list[int]:
    """Return the first `tokens` tokens of a held-out module of the standard library that is long enough.

    Args:
        number: Which of them.

    Raises:
        RuntimeError: If there are no more than `number`.
    """
    root, seen = Path(sysconfig.get_paths()["stdlib"]), 0
    for file in (root / f"{name}.py" for name in stdlib.HELD_OUT):
        if file.is_file() and file.stat().st_size >= tokens:  # a token takes a byte or more
            ids = tokenizer(file.read_text(encoding="utf-8"), verbose=False)["input_ids"]
            if len(ids) >= tokens and seen == number:
                return ids[:tokens]
            seen += len(ids) >= tokens
    raise RuntimeError(f"the standard library has {seen} held-out modules of {tokens} tokens or more")


def chat_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a conversation that `text` opens.

    Raises:
        ValueError: If the tokenizer has no chat template, or it cannot be rendered.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("--chat needs a tokenizer with a chat template; this one has none: use --no-chat")
    messages = [{"role": "user", "content": text}]
    try:
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template is a program that the checkpoint brings
        raise ValueError(f"the tokenizer's chat template fails: {error}; use --no-chat") from error
    return tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]


def _read(source: str, name: str) -> str:
    if not source:
        raise ValueError("the name of the input file is empty; give a file, or - for standard input")
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).expanduser().read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {name}: {error.strerror or error}") from error
    try:
        if b"\0" in data:
            raise ValueError("it holds zero bytes")
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f"{name} is not UTF-8 text ({error}); give a text or a JSONL file") from error


def _is_json_lines(content: str) -> bool:
    first = content.lstrip().split("\n", 1)[0]
    try:
        return first.startswith("{") and "text" in json.loads(first)
    except ValueError:
        return False


def _text_of(line: str, place: str) -> tuple[str, tuple[str, ...]]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ValueError(f'{place} has no "text" key with a string; each line must be like {{"text": "..."}}')
    return check_text(row["text"], f'"text" of {place}'), answers_of(row.get("answer", row.get("answers")))
