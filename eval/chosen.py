"""Which prompts and spans are measured, of the documents that were read."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from torch import Tensor

from specx.data.documents import WHOLE, Document, length_name
from specx.data.framed import cut
from specx.data.sets import Score
from specx.eval.spans import Kind, Span, choose_spans


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt of the measurements of generations.

    Attributes:
        name: Of the document.
        context: The length that it stands for.
        ids: int64 [at most context]; of whole documents about as many.
        answers, score: Reference answers, and how the output is compared with them.
    """

    name: str
    context: int
    ids: Tensor
    answers: tuple[str, ...] = ()
    score: Score = "rouge_l"


def choose_prompts(
    data: str, documents: list[Document], contexts: Sequence[int], samples: int, new: int, say: Callable[[str], None]
) -> list[Prompt]:
    """Return prompts by length.

    A labelled document (of govreport_2K.jsonl) is a prompt of its own length, or of the next shorter one that is asked
    for; one with more tokens is cut inside, so that the instruction at its beginning and its end stay. A framed one
    gives way inside its instruction; those that fit more of the lengths come first, so that lengths are compared on the
    same documents. Of others prompts are taken out: nested ones, which end at the same place.

    Args:
        data: What was read, for messages.
        say: Told where there are fewer prompts than `samples`.

    Raises:
        ValueError: If no document is long enough for a length.
    """
    if any(document.label is not None for document in documents):
        found = _labelled(data, documents, contexts, samples)
    elif any(document.frame is not None for document in documents):
        found = _framed(data, documents, contexts, samples)
    else:
        spans = choose_spans(documents, samples, contexts[-1], new, 1, "ordinary")
        found = [
            Prompt(f"{span.document}@{span.position}", context, span.prompt(context))
            for context in contexts
            for span in spans
        ]
    for context in contexts:
        count = sum(prompt.context == context for prompt in found)
        if count < samples:
            say(f"note: the data has {count} of the {samples} prompts of {length_name(context)} that were asked for")
    return found


def whole_prompts(
    data: str, documents: list[Document], samples: int, room: int, say: Callable[[str], None]
) -> list[Prompt]:
    """Return the first documents as whole prompts, all standing for one length, their median.

    Args:
        room: Tokens that a prompt may have; one with more is cut as for that length.
        say: Told how long they are, and how many were cut.

    Raises:
        ValueError: If the data is made for given lengths.
    """
    if any(each.score == "contains" for each in documents):
        raise ValueError(f"--lengths {WHOLE} is for documents; {data} is generated at the lengths that it is given")
    chosen = documents[:samples]
    prompts = [_prompt(each, room) for each in chosen]
    sizes = sorted(len(each.ids) for each in prompts)
    context = statistics.median_low(sizes)
    cut_short = sum(len(each.ids) + _around(each) > room for each in chosen)
    also = f"; {cut_short} of them, longer than the target's room, cut to {room}" if cut_short else ""
    say(f"note: {len(sizes)} whole documents of {sizes[0]} to {sizes[-1]} tokens, shown as their median{also}")
    return [replace(each, context=context) for each in prompts]


def _around(document: Document) -> int:
    return len(document.frame.before) + len(document.frame.after) if document.frame else 0


def _labelled(data: str, documents: list[Document], contexts: Sequence[int], samples: int) -> list[Prompt]:
    prompts = []
    for context in contexts:
        label = min((each.label for each in documents if each.label and each.label >= context), default=None)
        own = [each for each in documents if each.label == label][:samples]
        if label is None:
            labels = ",".join(length_name(n) for n in sorted({each.label for each in documents if each.label}))
            raise ValueError(f"{data} has no file for length {length_name(context)}; its files have --lengths {labels}")
        prompts += [_prompt(each, context) for each in own]
    return prompts


def _framed(data: str, documents: list[Document], contexts: Sequence[int], samples: int) -> list[Prompt]:
    def fits(document: Document, context: int) -> bool:
        return document.frame is not None and document.frame.fits(document.ids, context)

    ranked = sorted(documents, key=lambda each: -sum(fits(each, context) for context in contexts))
    prompts = []
    for context in contexts:
        own = [each for each in ranked if fits(each, context)][:samples]
        if not own:
            sizes = [len(each.ids) for each in documents]
            raise ValueError(
                f"{data}: of {len(documents)} documents of {min(sizes)} to {max(sizes)} tokens, instruction apart, "
                f"none gives a prompt of {length_name(context)}: give other --lengths"
            )
        prompts += [_prompt(each, context) for each in own]
    return prompts


def _prompt(document: Document, context: int) -> Prompt:
    ids = cut(document.ids, context, "ends") if document.frame is None else document.frame.prompt(document.ids, context)
    return Prompt(document.name, context, ids, document.answers, document.score)


def choose_kinds(
    documents: list[Document], count: int, context: int, length: int, window: int, say: Callable[[str], None]
) -> list[Span]:
    """Return the spans of both kinds, at most `count` of each; a kind that the data does not have is left out.

    Args:
        context: Tokens of the longest prompt.
        length: Tokens of a continuation.
        window: Tokens that the draft was trained for.

    Raises:
        ValueError: If no document is long enough.
    """
    spans: list[Span] = []
    for kind in get_args(Kind):
        try:
            found = choose_spans(documents, count, context, length, window, kind)
        except ValueError as error:
            raise ValueError(f"for tau, {error}, or leave tau out of --measure") from error
        if len(found) < count:
            say(f"note: the data has {len(found)} of the {count} {kind} spans that were asked for")
        spans += found
    return spans
