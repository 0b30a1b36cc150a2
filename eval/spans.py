"""Nested prompts: the same place in a document behind ever more of the context before it.

Prompts of different lengths cut from different places differ in more than their length. A span fixes the place, hence
the text that the model goes on with, and only the context grows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from specx.data.documents import Document

Kind = Literal["ordinary", "recurrence"]
Ints = NDArray[np.int64]
# A span of kind "recurrence" copies at least this share of its continuation from beyond the draft's window.
RECURRENCE_SHARE = 0.25
# Tokens that must agree for a copy: the six before a token, which make a model expect it, and the token itself.
ORDER = 7


@dataclass(frozen=True, slots=True)
class Span:
    """A place in a document.

    Attributes:
        document: The document's name.
        position: Index of the continuation's first token.
        ids: The whole document, int64 [L].
        length: Tokens of the continuation.
        recurrence: Its `recurrence_share`, from 0 to 1, with the context and window that it was chosen for.
        kind: How it was chosen, see `choose_spans`.
    """

    document: str
    position: int
    ids: Tensor = field(repr=False, compare=False)  # spans compare by place; tensors have no single truth value
    length: int
    recurrence: float
    kind: Kind

    def prompt(self, context: int) -> Tensor:
        """Return the last `context` tokens before the continuation, int64 [context].

        Raises:
            ValueError: If there are fewer.
        """
        if not 1 <= context <= self.position:
            raise ValueError(
                f"context must be between 1 and {self.position}, the tokens before this span of {self.document}; "
                f"got {context}"
            )
        return self.ids[self.position - context : self.position]

    @property
    def continuation(self) -> Tensor:
        """The tokens that the document goes on with, int64 [length]."""
        return self.ids[self.position : self.position + self.length]


def recurrence_share(ids: Tensor, position: int, length: int, context: int, window: int, order: int = ORDER) -> float:
    """Return the share of a continuation's tokens that can be copied only from beyond the window.

    Such a token ends an `order`-gram that occurs in the prompt with its last token before the window, and does not
    occur with its last token in the window or in the continuation before it. The draft's window holds the newest
    tokens, so a draft can copy the token only if retrieval brings the far occurrence back.

    Args:
        ids: The document, int64 [L].
        position: Index of the continuation's first token.
        length: Tokens of the continuation.
        context: Tokens of the prompt, the ones just before `position`; n-grams lie within them.
        window: The newest tokens of the prompt that the draft keeps anyway.
        order: Tokens of an n-gram.

    Raises:
        ValueError: If prompt or continuation reach beyond the document, or a count is below 1.
    """
    _check_counts(length=length, context=context, order=order)
    if not context <= position <= len(ids) - length:
        raise ValueError(
            f"position must be between context {context} and {len(ids) - length}, where {length} tokens of the "
            f"document's {len(ids)} are left; got {position}"
        )
    part = ids[position - context : position + length].numpy()
    return _share(_previous(part, order), context, length, context, window, order)


def choose_spans(
    documents: Sequence[Document], count: int, context: int, length: int, window: int, kind: Kind
) -> list[Span]:
    """Choose places spread evenly over all documents; the same arguments give the same spans.

    Candidates lie every `length` tokens, from `context` on, wherever a whole continuation is left.

    Args:
        documents: Where to choose; those that are too short have no candidates.
        count: Spans wanted; if there are fewer candidates, all of them are returned.
        context: Tokens of the longest prompt.
        length: Tokens of a continuation.
        window: Tokens of the draft's window, for `recurrence_share`.
        kind: "ordinary" takes candidates whatever they repeat, "recurrence" only those whose recurrence share is at
            least `RECURRENCE_SHARE`; there may be none.

    Raises:
        ValueError: If no document is long enough, a count is below 1, or the kind is unknown.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}; got {kind!r}")
    _check_counts(count=count, context=context, length=length)
    found = [span for document in documents for span in _candidates(document, context, length, window, kind)]
    if not found:
        longest = max((len(document.ids) for document in documents), default=0)
        raise ValueError(
            f"no document has the {context + length} tokens of a prompt and its continuation ({context} + {length}); "
            f"the longest of {len(documents)} has {longest}: give smaller --lengths, or other data"
        )
    if kind == "recurrence":
        found = [span for span in found if span.recurrence >= RECURRENCE_SHARE]
    if len(found) <= count:
        return found
    return [found[(2 * k + 1) * len(found) // (2 * count)] for k in range(count)]  # floor((k + 0.5) * n / count)


def _candidates(document: Document, context: int, length: int, window: int, kind: Kind) -> list[Span]:
    positions = range(context, len(document.ids) - length + 1, length)
    if not positions:
        return []
    previous = _previous(document.ids.numpy(), ORDER)
    return [
        Span(
            document.name,
            position,
            document.ids,
            length,
            _share(previous, position, length, context, window, ORDER),
            kind,
        )
        for position in positions
    ]


def _share(previous: Ints, position: int, length: int, context: int, window: int, order: int) -> float:
    """Return the recurrence share, given where every n-gram occurred last.

    One look is enough: if the newest occurrence before a token is not in the window or behind it, none is, and if it
    is older than the prompt, all are.
    """
    last = previous[position : position + length]
    far = (last >= position - context + order - 1) & (last < position - window)
    return int(far.sum()) / length


def _previous(ids: Ints, order: int) -> Ints:
    """Return where the `order`-gram that ends at each token ended before: int64 [L], -1 for nowhere."""
    previous = np.full(len(ids), -1)
    if len(ids) < order:
        return previous
    tokens = np.unique(ids, return_inverse=True)[1]
    gram = tokens
    for first in range(1, order):  # exact, no hash: a gram is the pair of a shorter gram's number and a token
        gram = np.unique(gram[:-1] * len(ids) + tokens[first:], return_inverse=True)[1]
    places = gram.argsort(kind="stable")  # those of one gram side by side, ascending
    same = gram[places[1:]] == gram[places[:-1]]
    previous[places[1:][same] + order - 1] = places[:-1][same] + order - 1
    return previous


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
