"""Text for training: read once, kept as token ids on disk, drawn as windows by seed and step."""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from specx.data import stdlib

_HELD_OUT = 50  # one document of so many is held out, or that share of the last tokens where there are fewer
_DATASET = ("dataset_info.json", "dataset_dict.json", "state.json")


def read_texts(source: str, tokenizer: Any) -> Iterator[str]:
    """Yield the texts of a source.

    Args:
        source: "stdlib" (without its held-out modules), a folder of text, a file, a folder that `datasets` saved, or
            the name of a dataset on the hub, NAME or NAME:SPLIT. A row of .jsonl or of a dataset has a "text", or
            "messages", which become text by the tokenizer's chat template.

    Raises:
        ValueError: Nothing of that name, or a row without any of these.
    """
    path = Path(source).expanduser()
    if source == "stdlib":
        for _, file in stdlib.training_files():
            yield file.read_text(encoding="utf-8")
    elif path.is_dir() and not any((path / name).is_file() for name in _DATASET):
        for file in sorted(each for each in path.rglob("*") if each.is_file() and not each.name.startswith(".")):
            yield from _file(file, tokenizer)
    elif path.is_file():
        yield from _file(path, tokenizer)
    else:
        for number, row in enumerate(_dataset(source, path), 1):
            yield _text(row, f"{source} row {number}", tokenizer)


def _file(file: Path, tokenizer: Any) -> Iterator[str]:
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return  # no text
    if file.suffix != ".jsonl":
        yield content
        return
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{file} line {number} is no JSON: {error}") from error
            yield _text(row, f"{file} line {number}", tokenizer)


def _text(row: Any, name: str, tokenizer: Any) -> str:
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return row["text"]
    if isinstance(row, dict) and row.get("messages") and getattr(tokenizer, "chat_template", None):
        return tokenizer.apply_chat_template(row["messages"], tokenize=False)
    raise ValueError(f'{name} has no "text", nor "messages" and a chat template for them')


def _dataset(source: str, path: Path) -> Any:
    name, _, split = source.partition(":")
    if not path.is_dir() and ("/" not in name or name.startswith((".", "/", "~"))):
        raise ValueError(f"--data {source}: no such file or folder; give one, stdlib, or a dataset as owner/name:split")
    if find_spec("datasets") is None:
        raise ValueError(f"--data {source} needs the datasets package: pip install datasets; or give a folder of text")
    import datasets

    try:
        if path.is_dir():
            found = datasets.load_from_disk(str(path))
            return found["train"] if isinstance(found, dict) else found
        return datasets.load_dataset(name, split=split or "train", streaming=True)
    except Exception as error:  # whatever the package or the network raises
        raise ValueError(f"--data {source} cannot be read: {' '.join(str(error).split())[:300]}") from error


class Tokens:
    """Token ids of a source in `folder`, encoded by the first who asks.

    Attributes:
        train, held_out: uint32, memory-mapped.

    Raises:
        ValueError: A source with no text, or another one than what the folder was made from.
    """

    def __init__(self, folder: Path, source: str, tokenizer: Any) -> None:
        self.folder = folder
        about = {"data": source, "vocabulary": len(tokenizer)}
        made = folder / "about.json"
        if not made.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            self._encode(source, tokenizer)
            made.write_text(json.dumps(about))
        if json.loads(made.read_text()) != about:
            raise ValueError(f"{folder} holds the tokens of {json.loads(made.read_text())}, not of {about}")
        self.train, self.held_out = (np.memmap(folder / name, np.uint32, "r") for name in ("train.bin", "held.bin"))

    def _encode(self, source: str, tokenizer: Any) -> None:
        end = tokenizer.eos_token_id
        tail = [] if end is None else [end]
        with (self.folder / "train.bin").open("wb") as train, (self.folder / "held.bin").open("wb") as held:
            for number, text in enumerate(read_texts(source, tokenizer)):
                ids = tokenizer(text, verbose=False)["input_ids"] + tail
                (held if number % _HELD_OUT == _HELD_OUT // 2 else train).write(np.asarray(ids, np.uint32).tobytes())
        if not (self.folder / "train.bin").stat().st_size:
            raise ValueError(f"--data {source} holds no text")
        if not (self.folder / "held.bin").stat().st_size:
            whole = np.fromfile(self.folder / "train.bin", np.uint32)
            kept = len(whole) - max(1, len(whole) // _HELD_OUT)
            whole[kept:].tofile(self.folder / "held.bin")
            whole[:kept].tofile(self.folder / "train.bin")

    def windows(self, seed: int, step: int, rows: int, length: int) -> np.ndarray:
        """Draw training windows, int64 [rows, length]; the same for one (seed, step) always."""
        if len(self.train) < length:
            raise ValueError(
                f"the data has {len(self.train)} tokens; a window needs {length}: give more, or less length"
            )
        starts = np.random.default_rng((seed, step)).integers(0, len(self.train) - length + 1, rows)
        return np.stack([self.train[start : start + length] for start in starts]).astype(np.int64)

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """Return held-out prompts, evenly spread; shorter ones where the text is short."""
        length = min(length, len(self.held_out))
        starts = np.linspace(0, len(self.held_out) - length, count).astype(int)
        return [self.held_out[start : start + length].tolist() for start in dict.fromkeys(starts.tolist())]

    def frequent(self, count: int, vocabulary: int) -> np.ndarray:
        """Return the `count` most frequent ids, ascending; of ids that are as frequent the lower ones."""
        counts = np.zeros(vocabulary, np.int64)
        for first in range(0, len(self.train), 1 << 24):
            counts += np.bincount(self.train[first : first + (1 << 24)], minlength=vocabulary)[:vocabulary]
        return np.sort(np.argsort(-counts, kind="stable")[:count])
