"""Nested prompts: what a span holds, its recurrence against a naive search, and which spans are chosen."""

import random
import time
from itertools import pairwise

import pytest
import torch

from specx.data.documents import Document
from specx.eval.spans import RECURRENCE_SHARE, Span, choose_spans, recurrence_share


def naive_share(ids, position, length, context, window, order):
    """The definition, word by word."""
    ids = ids.tolist()

    def gram(last):
        return ids[last - order + 1 : last + 1]

    def copied(index):
        far = any(gram(last) == gram(index) for last in range(position - context + order - 1, position - window))
        near = any(gram(last) == gram(index) for last in range(max(position - window, order - 1), index))
        return index >= order - 1 and far and not near

    return sum(copied(index) for index in range(position, position + length)) / length


def random_document(seed, size, vocabulary=8, name="random"):
    ids = torch.randint(vocabulary, (size,), generator=torch.Generator().manual_seed(seed))
    return Document(name, ids, None)


def counting(size, name="counting"):
    return Document(name, torch.arange(size), None)


@pytest.mark.parametrize("seed", range(60))
def test_recurrence_share_equals_a_naive_search(seed):
    rng = random.Random(seed)
    ids = random_document(seed, rng.randint(20, 160), rng.choice([1, 2, 3, 5])).ids
    order, length = rng.choice([1, 2, 3, 7]), rng.randint(1, 12)
    context = rng.randint(1, len(ids) - length)
    position = rng.randint(context, len(ids) - length)
    window = rng.choice([0, 1, order, context // 2, context, context + 5])
    found = recurrence_share(ids, position, length, context, window, order)
    assert found == naive_share(ids, position, length, context, window, order)


def test_the_naive_search_finds_every_kind():
    """The random cases above are neither all 0 nor all 1."""
    ids = random_document(0, 400, 2).ids
    shares = {recurrence_share(ids, 200, length, 200, 8, 7) for length in (1, 8, 50)}
    assert any(0 < share < 1 for share in shares)


def test_recurrence_share_by_hand():
    # far away 1 2 3 4; in the window only 9s; the continuation copies 1 2 3 4, then does so again
    ids = torch.tensor([1, 2, 3, 4, 8, 8, 8, 9, 9, 9, 1, 2, 3, 4, 1, 2, 3, 4])
    assert recurrence_share(ids, 10, 4, 10, 3, order=2) == 3 / 4  # 9 1 is new; 1 2, 2 3 and 3 4 are copied
    assert recurrence_share(ids, 10, 8, 10, 3, order=2) == 3 / 8  # the second copy finds the first one nearby
    assert recurrence_share(ids, 10, 4, 10, 9, order=2) == 0  # the window's first token ends the far 1 2
    assert recurrence_share(ids, 10, 4, 10, 8, order=2) == 1 / 4  # only 1 2 ends before the window
    assert recurrence_share(ids, 10, 4, 9, 3, order=2) == 2 / 4  # a prompt without the first 1 has no 1 2
    assert recurrence_share(ids, 10, 4, 10, 3, order=4) == 1 / 4
    assert recurrence_share(ids, 10, 4, 10, 3) == 0


def test_a_copy_in_the_window_is_not_counted():
    ids = torch.tensor([5, 6, 0, 0, 5, 6, 1, 5, 6])
    assert recurrence_share(ids, 8, 1, 8, 2, order=2) == 1
    assert recurrence_share(ids, 8, 1, 8, 3, order=2) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position": 9}, r"position must be between context 10 and 18.*got 9"),
        ({"position": 19}, r"position must be between context 10 and 18, where 2 tokens of the document's 20.*got 19"),
        ({"length": 0}, "length must be at least 1; got 0"),
        ({"context": 0}, "context must be at least 1; got 0"),
        ({"order": 0}, "order must be at least 1; got 0"),
    ],
)
def test_recurrence_share_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        recurrence_share(torch.arange(20), **({"position": 12, "length": 2, "context": 10, "window": 4} | options))


def test_a_document_shorter_than_an_ngram_repeats_nothing():
    assert recurrence_share(torch.zeros(4, dtype=torch.int64), 2, 2, 2, 0) == 0


def test_prompts_are_nested():
    document = random_document(1, 6000)
    spans = choose_spans([document], 3, 2048, 64, 256, "ordinary")
    for span in spans:
        long, short = span.prompt(2048), span.prompt(512)
        assert (len(long), len(short)) == (2048, 512)
        assert torch.equal(long[-512:], short)
        assert torch.equal(torch.cat([long, span.continuation]), document.ids[span.position - 2048 :][: 2048 + 64])
        assert len(span.continuation) == span.length == 64


@pytest.mark.parametrize("context", [0, -1, 101])
def test_a_prompt_longer_than_what_is_there(context):
    span = Span("a.py", 100, torch.arange(200), 10, 0.0, "ordinary")
    assert span.prompt(100).tolist() == list(range(100))
    with pytest.raises(ValueError, match=rf"between 1 and 100, the tokens before this span of a.py; got {context}"):
        span.prompt(context)


def test_ordinary_spans_are_spread_evenly():
    # 100 and 50 candidates, every 10 tokens from 100 on, and a document too short for one
    documents = [counting(1100, "a"), counting(109, "short"), counting(609, "b")]
    everything = choose_spans(documents, 10**6, 100, 10, 20, "ordinary")
    assert [(span.document, span.position) for span in everything] == [
        *(("a", position) for position in range(100, 1100, 10)),
        *(("b", position) for position in range(100, 600, 10)),
    ]
    chosen = choose_spans(documents, 6, 100, 10, 20, "ordinary")
    assert [everything.index(span) for span in chosen] == [12, 37, 62, 87, 112, 137]  # floor((k + 0.5) * 25)
    for count in range(1, 151):
        places = [everything.index(span) for span in choose_spans(documents, count, 100, 10, 20, "ordinary")]
        gaps = [after - before for before, after in pairwise(places)]
        assert len(places) == count
        assert not gaps or max(gaps) - min(gaps) <= 1
        assert min(gaps, default=1) >= 1


def test_a_continuation_fits_to_the_last_token():
    assert len(choose_spans([counting(110)], 9, 100, 10, 20, "ordinary")) == 1
    assert [span.position for span in choose_spans([counting(120)], 9, 100, 10, 20, "ordinary")] == [100, 110]


def test_the_choice_is_the_same_every_time():
    documents = [random_document(seed, 3000, 2, str(seed)) for seed in range(3)]
    first, second = (choose_spans(documents, 7, 500, 32, 100, "recurrence") for _ in range(2))
    assert first == second
    assert len(first) == 7


def test_recurrence_spans_are_those_that_copy():
    documents = [random_document(seed, 3000, 3, str(seed)) for seed in range(3)]
    every = choose_spans(documents, 10**6, 500, 32, 100, "ordinary")
    copying = choose_spans(documents, 10**6, 500, 32, 100, "recurrence")
    wanted = [(span.document, span.position) for span in every if span.recurrence >= RECURRENCE_SHARE]
    assert 0 < len(wanted) < len(every)
    assert [(span.document, span.position) for span in copying] == wanted
    assert {span.kind for span in every} == {"ordinary"}
    assert {span.kind for span in copying} == {"recurrence"}
    chosen = choose_spans(documents, 5, 500, 32, 100, "recurrence")
    assert [copying.index(span) for span in chosen] == [(2 * k + 1) * len(copying) // 10 for k in range(5)]
    ids = {document.name: document.ids for document in documents}
    for span in chosen:
        assert span.recurrence == recurrence_share(ids[span.document], span.position, 32, 500, 100)


def test_where_nothing_recurs_there_are_no_recurrence_spans():
    assert choose_spans([counting(1000)], 5, 100, 10, 20, "recurrence") == []


@pytest.mark.parametrize(("documents", "number", "longest"), [([], 0, 0), ([counting(40), counting(109)], 2, 109)])
def test_no_document_is_long_enough(documents, number, longest):
    message = rf"has the 110 tokens.*\(100 \+ 10\); the longest of {number} has {longest}: give smaller --lengths, or"
    with pytest.raises(ValueError, match=message):
        choose_spans(documents, 1, 100, 10, 20, "ordinary")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "rare"}, "kind must be one of ordinary, recurrence; got 'rare'"),
        ({"count": 0}, "count must be at least 1; got 0"),
        ({"length": 0}, "length must be at least 1; got 0"),
    ],
)
def test_choose_spans_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        choose_spans(
            [counting(500)], **({"count": 1, "context": 9, "length": 9, "window": 4, "kind": "ordinary"} | options)
        )


def test_long_documents_take_seconds():
    documents = [random_document(seed, 100_000, 50, str(seed)) for seed in range(2)]
    started = time.thread_time()
    choose_spans(documents, 8, 16384, 64, 1024, "recurrence")
    assert time.thread_time() - started < 10  # a naive search takes hours
