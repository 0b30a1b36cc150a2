"""What an output is worth against reference answers: the same for all exact methods, so a check, not a claim."""

import re
from collections.abc import Sequence

from specx.data.sets import Score

_WORD = re.compile(r"[a-z0-9]+")
_BOXED = re.compile(r"\\boxed\{\s*([^{}]*?)\s*\}")


def judged(text: str, answers: Sequence[str], score: Score) -> dict[str, float]:
    """Return {"rouge_l": the best over the answers} or {"found": 1.0 or 0.0}; nothing where there is no answer."""
    if not answers:
        return {}
    if score == "rouge_l":
        return {"rouge_l": round(max(rouge_l(text, answer) for answer in answers), 4)}
    if score == "contains":
        return {"found": float(any(answer in text for answer in answers))}
    boxed = _BOXED.findall(text)
    last = boxed[-1].lstrip("0") if boxed else None
    return {"found": float(last is not None and last in {answer.lstrip("0") for answer in answers})}


def rouge_l(text: str, reference: str) -> float:
    """Return ROUGE-L: the F1 of the longest common subsequence of words (Lin 2004, "ROUGE: A Package for Automatic
    Evaluation of Summaries", section 3.1, with beta = 1). Words are runs of a-z and 0-9 after lowercasing; no stemming.
    """
    ours, theirs = (_WORD.findall(each.lower()) for each in (text, reference))
    common = lcs_length(ours, theirs)
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def lcs_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the longest common subsequence.

    Bit-parallel (Hyyrö 2004, "Bit-Parallel LCS-length Computation Revisited"): bit i of `row` is 0 where the length
    grows at a[i]; a Python integer holds them all.
    """
    places: dict[str, int] = {}
    for index, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << index
    every = (1 << len(a)) - 1
    row = every
    for word in b:
        match = row & places.get(word, 0)
        row = (row + match | row - match) & every
    return len(a) - row.bit_count()
