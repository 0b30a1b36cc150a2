"""Prompts of exact length: the instruction around a document stays whole, and the document gives way."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specx.data.sets import Keep

_MARK = "\N{SYMBOL FOR RECORD SEPARATOR}specx\N{SYMBOL FOR RECORD SEPARATOR}"
ENDING = 16  # tokens of a document's end that Keep "ends" keeps


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands around a document in a prompt, and how the document is cut.

    Attributes:
        before, after: int64 [n]; special tokens and the chat template's included.
        keep: See `specx.data.sets.Keep`.
    """

    before: Tensor
    after: Tensor
    keep: Keep

    def fits(self, document: Tensor, length: int) -> bool:
        """Tell whether a document gives a prompt for this length: exactly it, or whole at most it ("whole", "ends")."""
        whole = len(self.before) + len(document) + len(self.after)
        if self.keep == "whole":
            return whole <= length
        room = length - len(self.before) - len(self.after)
        return room >= 1 and (self.keep == "ends" or whole >= length)

    def prompt(self, document: Tensor, length: int) -> Tensor:
        """Return the prompt, int64 [at most length]."""
        room = length - len(self.before) - len(self.after)
        return torch.cat([self.before, cut(document, room, self.keep), self.after])


def cut(ids: Tensor, length: int, keep: Keep) -> Tensor:
    """Return at most `length` tokens of ids [L]: the first, the last, or the first and the last `ENDING` ones."""
    if len(ids) <= length or keep == "whole":
        return ids
    if keep == "beginning":
        return ids[:length]
    end = length if keep == "end" else min(ENDING, length // 2)
    return torch.cat([ids[: length - end], ids[len(ids) - end :]])


def frame(tokenizer: Any, before: str, after: str, keep: Keep, chat: bool) -> Frame:
    """Tokenise what stands around a document.

    Args:
        chat: Put the whole prompt into the tokenizer's chat template, where it has one.

    Raises:
        ValueError: If the template cannot be rendered, or does not give the text back.
    """
    if chat and getattr(tokenizer, "chat_template", None):
        head, tail = _rendered(tokenizer, before, after)
        return Frame(_ids(tokenizer, head, False), _ids(tokenizer, tail, False), keep)
    return Frame(_ids(tokenizer, before, True), _ids(tokenizer, after, False), keep)


def document_ids(tokenizer: Any, text: str) -> Tensor:
    """Return a document's ids without special tokens, int64 [L]."""
    return _ids(tokenizer, text, False)


def _rendered(tokenizer: Any, before: str, after: str) -> Sequence[str]:
    messages = [{"role": "user", "content": before + _MARK + after}]
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template is a program that the checkpoint brings
        raise ValueError(f"the tokenizer's chat template fails: {error}; use --no-chat") from error
    parts = text.split(_MARK)
    if len(parts) != 2:
        raise ValueError("the tokenizer's chat template does not render the text as it is; use --no-chat")
    return parts


def _ids(tokenizer: Any, text: str, special: bool) -> Tensor:
    ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)
