"""What `--data` names: a data set of the field, generated needles, the standard library, or the reader's own files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from specx.config import nearest
from specx.data import needle
from specx.data.documents import Document, labels_of, length_name, parse_lengths, read_documents
from specx.data.framed import document_ids, frame
from specx.data.sets import DATA_SETS, Sample, read_set

NEEDLE, STDLIB = "needle", "stdlib"
NAMES = (STDLIB, NEEDLE, *DATA_SETS)
_LENGTHS, _NEW = "512,2K,8K,16K", 128
_MARGIN = 8  # tokens by which lines together may differ from the sum of each
_CHARACTERS = 16  # a token more than covers, so that a book need not be tokenised whole


@dataclass(frozen=True, slots=True)
class Data:
    """What was read.

    Attributes:
        documents: Texts, with a frame where they are part of a prompt.
        about: What was read, in words.
        continues: Whether a document's own text can be walked along, as the measurement of tau does.
    """

    documents: list[Document]
    about: str
    continues: bool = True


def is_named(source: str) -> bool:
    """Tell whether `source` is a name of ours; an existing file or folder of that name goes before it."""
    if source == STDLIB:
        return True
    try:
        return source in NAMES and not Path(source).expanduser().exists()
    except OSError:
        return source in NAMES


def defaults_of(source: str) -> tuple[str, int]:
    """Return the lengths and the number of new tokens where none are asked for: those of the data, or of its names.

    Raises:
        ValueError: If there is nothing of that name.
    """
    if is_named(source):
        known = DATA_SETS.get(source)
        return (known.lengths, known.new) if known else (_LENGTHS, _NEW)
    labels = labels_of(source)
    return ",".join(map(length_name, labels)) if labels else _LENGTHS, _NEW


def check_source(source: str) -> None:
    """Find mistakes before a tokenizer is there.

    Raises:
        ValueError: Nothing of that name, or a file that cannot be read as documents.
    """
    if is_named(source):
        return
    try:
        read_documents(source, lambda text, verbose: {"input_ids": []})
    except ValueError as error:
        if "no file or folder" not in str(error):
            raise
        raise ValueError(f"{error}; known names: {', '.join(NAMES)}{nearest(source, list(NAMES))}") from error


def read_data(source: str, tokenizer: Any, lengths: str, samples: int, chat: bool | None = None, seed: int = 0) -> Data:
    """Read and tokenise documents.

    Args:
        source: A name of `NAMES`, or a file or folder for `read_documents`.
        lengths: Of prompts, as `parse_lengths` reads them; needles are made for each.
        samples: Needles a length.
        chat: Put prompts into the tokenizer's chat template; None: where they are requests and there is one.
        seed: Of generated data.

    Raises:
        ValueError: As `read_documents`, a broken data set, or a chat template where none can be used.
        RuntimeError: If the hub does not give a file, or a library is missing that reads it.
    """
    if chat and not getattr(tokenizer, "chat_template", None):
        raise ValueError("--chat needs a tokenizer with a chat template; this one has none: use --no-chat")
    if not is_named(source) or source == STDLIB:
        documents = read_documents(source, tokenizer)
        return Data([_local(tokenizer, each, chat) for each in documents], source)
    if source == NEEDLE:
        return Data(_needles(tokenizer, parse_lengths(lengths), samples, chat is not False, seed), source, False)
    found, about = read_set(source)
    known, longest = DATA_SETS[source], parse_lengths(lengths)[-1]
    asks = known.chat if chat is None else chat
    documents = [_framed(tokenizer, each, source, asks, _CHARACTERS * longest) for each in found]
    return Data(documents, about, known.keep != "whole")


def _local(tokenizer: Any, document: Document, chat: bool | None) -> Document:
    """Put a labelled document, which is a prompt of its own, into the chat template."""
    if document.label is None:
        if chat:
            raise ValueError(
                f"--chat needs data whose rows are prompts: {document.name} is one of the texts that are continued in "
                "their middle; name its file for the length of its prompts (name_2K.jsonl), or leave --chat out"
            )
        return document
    if chat is False or not getattr(tokenizer, "chat_template", None):
        return document
    around = frame(tokenizer, "", "", "ends", chat=True)
    special = _special_before(tokenizer)
    return replace(document, ids=document.ids[special:], frame=around)


def _special_before(tokenizer: Any) -> int:
    """Return how many special tokens the tokenizer puts before a text."""
    ids = tokenizer("", verbose=False)["input_ids"]
    end = getattr(tokenizer, "eos_token_id", None)
    return len([each for each in ids if each != end])


def _framed(tokenizer: Any, sample: Sample, source: str, chat: bool, characters: int) -> Document:
    known, text = DATA_SETS[source], sample.document
    if known.keep != "whole" and len(text) > characters:
        text = text[-characters:] if known.keep == "end" else text[:characters]
    around = frame(tokenizer, sample.before, sample.after, known.keep, chat)
    return Document(sample.name, document_ids(tokenizer, text), None, around, sample.answers, known.score)


def _needles(tokenizer: Any, lengths: Sequence[int], samples: int, chat: bool, seed: int) -> list[Document]:
    count: Callable[[str], int] = lambda text: len(document_ids(tokenizer, text))  # noqa: E731
    documents = []
    for length in lengths:
        for number in range(samples):
            bare = frame(tokenizer, needle.BEFORE, "", "whole", chat)
            room = length - len(bare.before) - len(bare.after) - _MARGIN
            depth = (number + 0.5) / samples
            made = needle.haystack(count, room, depth, f"{seed}:{length}:{number}")
            around = frame(tokenizer, needle.BEFORE, made.after, "whole", chat)
            ids = document_ids(tokenizer, "".join(made.lines))
            documents.append(Document(f"needle:{length}:{number + 1}", ids, length, around, (made.answer,), "contains"))
    return documents
