"""Data files: from the hub, and row by row out of JSON lines, zip, CSV and parquet."""

import csv
import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

_SECONDS = 5.0  # for the hub's first answer: without a network an error must not take minutes
_PARQUET = "reading parquet needs pyarrow: pip install 'specx[data]'"


def download(name: str, repo: str, file: str) -> Path:
    """Return the local path of a file of a dataset repository, from the hub or its cache.

    Raises:
        RuntimeError: If the hub does not give it and the cache does not hold it.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # without a network it warns of every attempt; the error below says it once
    try:
        return Path(hf_hub_download(repo, file, repo_type="dataset", etag_timeout=_SECONDS))
    except Exception as error:  # no such file, gated, or whatever the HTTP client raises without a network
        reason = " ".join(str(error).split())[:300]
        raise RuntimeError(
            f"data {name} is {file} of the dataset {repo} on the Hugging Face hub, which did not give it "
            f"({type(error).__name__}: {reason}); fill the cache (HF_HOME) on a connected machine, or give --data a "
            "JSONL file, a folder of them, needle or stdlib"
        ) from error
    finally:
        logging.set_verbosity(before)


def revision(path: Path) -> str:
    """Return the commit that a downloaded file is of, as the hub's cache names it; "unknown" for other files."""
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else "unknown"


def read_rows(path: Path, member: str | None, fields: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where it stands, row) for every row of a file; the rows have all `fields`.

    Args:
        path: A .jsonl, .csv or .parquet file, or a .zip that holds one.
        member: Which file of a zip.

    Raises:
        ValueError: A broken or empty file, a broken row, a missing field; the message says which line.
        RuntimeError: Parquet without pyarrow.
    """
    name, found = path.name, False
    for number, row in _opened(path, member):
        found, place = True, f"{member} in {name} line {number}" if member else f"{name} line {number}"
        missing = [each for each in fields if each not in row]
        if missing:
            raise ValueError(f"{place} has no field {missing[0]!r}; its fields: {', '.join(map(str, row))}")
        yield place, row
    if not found:
        raise ValueError(f"{member or name} is empty: it holds no rows")


def _opened(path: Path, member: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.suffix == ".parquet":
        yield from _parquet(path)
    elif path.suffix == ".zip":
        try:
            with zipfile.ZipFile(path) as archive, archive.open(member or "") as raw:
                yield from _text_rows(io.TextIOWrapper(raw, "utf-8", newline=""), member or "")
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path.name} is no zip file: {error}; delete it and download it again") from error
        except KeyError as error:
            raise ValueError(f"{path.name} holds no {member}") from error
    else:
        with path.open(encoding="utf-8", newline="") as stream:
            yield from _text_rows(stream, path.name)


def _text_rows(stream: TextIO, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        if name.endswith(".csv"):
            csv.field_size_limit(1 << 30)  # a chapter is longer than the 128 KB that a field may have by default
            reader = csv.DictReader(stream)
            for row in reader:
                yield reader.line_num, row
            return
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield number, _json_row(line, f"{name} line {number}")
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{name} cannot be read: {error}") from error


def _json_row(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place} is no JSON object")
    return row


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise RuntimeError(f"{path.name}: {_PARQUET}") from error
    try:
        number = 0
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=16):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path.name} is no parquet file that can be read: {error}") from error
