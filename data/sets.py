"""The data sets of the field by name, each with the exact repository and file on the Hugging Face hub.

They are read as plain files (JSON lines, zip, CSV, parquet), because newer `datasets` refuses loading scripts. The
layouts were read off the hub's file lists and dataset cards in November 2026, not downloaded. Instructions are in words
of our own; who compares figures with a paper's should know that its prompts may be worded differently.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from specx.data.files import download, read_rows, revision

# What of a document stays when it is cut to a length: its beginning, its end, both, or all of it or nothing.
Keep = Literal["beginning", "end", "ends", "whole"]
# How an output is compared with the reference answers; see `specx.eval.quality`.
Score = Literal["rouge_l", "contains", "boxed"]
MAX_ROWS = 200


@dataclass(frozen=True, slots=True)
class DataSet:
    """Where a data set lies and how a prompt is made of its rows.

    Attributes:
        repo, file: Dataset repository on the hub, and the file in it.
        member: The file inside that one, where it is a zip.
        document: Field with the long text.
        before, after: What surrounds it in a prompt; {question} stands for the field `question`.
        question, answer: Fields with a question and with reference answers (a text or a list), where there are such.
        score: How outputs are compared with them.
        keep: What of the document stays when it is cut.
        chat: Whether the prompt is a request to an assistant, not text to be continued.
        lengths, new: Default lengths of prompts, and tokens to generate.
    """

    repo: str
    file: str
    document: str
    member: str | None = None
    before: str = ""
    after: str = ""
    question: str | None = None
    answer: str | None = None
    score: Score = "rouge_l"
    keep: Keep = "beginning"
    chat: bool = True
    lengths: str = "512,1K,2K,4K,8K,16K"
    new: int = 256


@dataclass(frozen=True, slots=True)
class Sample:
    """One row as text: `before` + `document` + `after` is the prompt."""

    name: str
    before: str
    document: str
    after: str
    answers: tuple[str, ...]


def _longbench(task: str, before: str, after: str, **more: Any) -> DataSet:
    """LongBench (arXiv 2308.14508): fields input, context, answers, in data/<task>.jsonl of one zip."""
    fields: dict[str, Any] = {"document": "context", "question": "input", "answer": "answers"}
    if more.get("keep") == "end":  # one line of code, which the first of many generated ones would be compared with
        fields["answer"] = None
    member = f"data/{task}.jsonl"
    return DataSet("THUDM/LongBench", "data.zip", member=member, before=before, after=after, **fields | more)


DATA_SETS = {
    "govreport": _longbench(
        "gov_report",
        "Below is a report of a government agency. Read it; a task follows.\n\nReport:\n",
        "\n\nSummarize this report on one page.\n\nSummary:",
    ),
    "qmsum": _longbench(
        "qmsum",
        "Below is the transcript of a meeting. Read it; a question follows.\n\nTranscript:\n",
        "\n\nAnswer from the transcript: {question}\n\nAnswer:",
    ),
    "multi_news": _longbench(
        "multi_news",
        "Below are several news articles. Read them; a task follows.\n\nArticles:\n",
        "\n\nSummarize all of them together on one page.\n\nSummary:",
    ),
    "lcc": _longbench("lcc", "", "", keep="end", chat=False),
    "repobench-p": _longbench("repobench-p", "", "{question}", keep="end", chat=False),
    "pg19": DataSet(
        "emozilla/pg19-test", "data/test-00000-of-00001-29a571947c0b5ccc.parquet", document="text", chat=False
    ),
    "booksum": DataSet(
        "kmfoda/booksum",
        "test.csv",
        document="chapter",
        answer="summary_text",
        before="Below is a chapter of a book. Read it; a task follows.\n\nChapter:\n",
        after="\n\nRetell the chapter in one page.\n\nSummary:",
    ),
    "aime24": DataSet(
        "HuggingFaceH4/aime_2024",
        "data/train-00000-of-00001.parquet",
        document="problem",
        answer="answer",
        after="\n\nReason step by step, and give the final answer within \\boxed{}.",
        score="boxed",
        keep="whole",
        lengths="1K",
        new=4096,
    ),
}


def read_set(name: str, fetch: Any = download) -> tuple[list[Sample], str]:
    """Return at most `MAX_ROWS` samples of a data set, and in words what was read.

    Args:
        name: A key of `DATA_SETS`.
        fetch: Returns a local path for (name, repository, file).

    Raises:
        ValueError: If a row is not as the table says.
        RuntimeError: If the hub does not give the file, or what reads it is not installed.
    """
    known = DATA_SETS[name]
    path = fetch(name, known.repo, known.file)
    samples = list(_samples(name, known, read_rows(path, known.member, _fields(known))))
    inside = f" ({known.member})" if known.member else ""
    return samples, f"{known.repo} {known.file}{inside}, revision {revision(path)}"


def _fields(known: DataSet) -> list[str]:
    return [each for each in (known.document, known.question, known.answer) if each is not None]


def _samples(name: str, known: DataSet, rows: Iterator[tuple[str, dict[str, Any]]]) -> Iterator[Sample]:
    for number, (place, row) in zip(range(1, MAX_ROWS + 1), rows, strict=False):
        document = row[known.document]
        if not isinstance(document, str) or not document.strip():
            raise ValueError(f"{place}: field {known.document!r} must be a text that is not blank")
        question = str(row[known.question]) if known.question else ""
        # not format(): a question, or \boxed{}, may hold braces
        before, after = (text.replace("{question}", question) for text in (known.before, known.after))
        yield Sample(f"{name}:{number}", before, document, after, answers_of(row.get(known.answer or "")))


def answers_of(value: Any) -> tuple[str, ...]:
    """Return reference answers that a row gives as a text, a number, a list of such, or not at all."""
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(str(each) for each in values if isinstance(each, str | int) and str(each).strip())
