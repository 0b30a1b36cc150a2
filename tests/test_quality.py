"""Outputs against reference answers."""

import random

import pytest

from specx.eval.quality import judged, lcs_length, rouge_l


def slow_lcs(a, b):
    """The textbook's table."""
    row = [0] * (len(b) + 1)
    for x in a:
        before, row = row, [0]
        for column, y in enumerate(b):
            row.append(before[column] + 1 if x == y else max(before[column + 1], row[column]))
    return row[-1]


def test_lcs_is_the_textbooks():
    draw = random.Random(0)
    for _ in range(300):
        a, b = (draw.choices("abcd", k=draw.randrange(0, 90)) for _ in range(2))
        assert lcs_length(a, b) == slow_lcs(a, b)


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        # Lin 2004, section 3.1: "police killed the gunman" against two candidates, beta = 1
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        ("The Report, again!", "the report", 4 / 5),
        ("", "the report", 0.0),
        ("other", "the report", 0.0),
        ("a b", "a b", 1.0),
    ],
)
def test_rouge_l(text, reference, expected):
    assert rouge_l(text, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "answers", "score", "expected"),
    [
        ("a b", (), "rouge_l", {}),
        ("a b", ("c", "a b c d"), "rouge_l", {"rouge_l": 0.6667}),
        ("it is 123456.", ("123456",), "contains", {"found": 1.0}),
        ("it is 12345.", ("123456",), "contains", {"found": 0.0}),
        (r"first \boxed{7}, no: \boxed{ 033 }", ("33",), "boxed", {"found": 1.0}),
        (r"33 \boxed{34}", ("33",), "boxed", {"found": 0.0}),
        ("33", ("33",), "boxed", {"found": 0.0}),
    ],
)
def test_judged(text, answers, score, expected):
    assert judged(text, answers, score) == expected
