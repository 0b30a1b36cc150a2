"""What a draft is worth: counted rounds, tokens foreseen, and what one text tells about the next."""

import pytest
import torch
from conftest import noised, pair
from heads import EAGLE1, EAGLE3, fitted, tiny_target
from heads import couple as eagle_couple

from specx import decoding
from specx.adapters import classic, eagle
from specx.config import Settings
from specx.experience import Experience
from specx.lookup import MatchRates
from specx.packed import steady_rows
from specx.tree import FEW, FORESEEN, LOOK_BACK, Plan, ranks_of
from specx.worth import DraftWorth

CHAIN, TREE = (4, 1), (16, 4)


def accepted(*ranks: int, first: bool = True) -> list[int]:
    """Origins of nodes that the draft proposed, at these places of their tree."""
    return [12 | (0x20 if first else 0) | rank << 12 for rank in ranks]


def test_a_tree_tells_what_a_smaller_one_would_have_given():
    worth = DraftWorth([CHAIN, TREE], 4)
    before = {family: worth.tokens(family, 4) for family in (CHAIN, TREE)}
    for _ in range(10):
        worth.learn(Plan(16, 3, 4), accepted(1, 7, 9, first=False))
    assert worth.tokens(TREE, 4) > before[TREE]
    assert worth.tokens(CHAIN, 4) < before[CHAIN], "its first guess was never right"
    assert worth.tokens(TREE, 1) < worth.tokens(TREE, 2) < worth.tokens(TREE, 4)


def test_tokens_that_were_foreseen_count_as_tries():
    right, wrong = DraftWorth([CHAIN, TREE], 4), DraftWorth([CHAIN, TREE], 4)
    right.foresee([0] * 20)
    wrong.foresee([FORESEEN] * 20)
    assert right.tokens(CHAIN, 1) > 0.9
    assert wrong.tokens(CHAIN, 1) < 0.1
    assert right.tokens(TREE, 4) > 3
    assert wrong.tokens(TREE, 4) < 0.5
    second = DraftWorth([CHAIN, TREE], 4)
    second.foresee([1] * 20)
    assert second.tokens(CHAIN, 1) < 0.1, "a chain has the best guess only"
    assert second.tokens(TREE, 1) > 0.9, "a tree of 16 nodes and 4 levels has four"
    late = DraftWorth([CHAIN], 4)
    late.foresee([0] * 20 + [FORESEEN] * 20)
    assert late.tokens(CHAIN, 1) < 0.4, "the newest count most"


def test_a_text_starts_from_what_is_usual():
    usual = DraftWorth([CHAIN, TREE], 4, fade=1 - 1 / 64)
    first = DraftWorth([CHAIN, TREE], 4, usual)
    for _ in range(40):
        first.learn(Plan(16, 3, 4), accepted(1))
    second, unknown = DraftWorth([CHAIN, TREE], 4, usual), DraftWorth([CHAIN, TREE], 4)
    assert second.tokens(TREE, 1) == pytest.approx(usual.tokens(TREE, 1))
    assert second.tokens(TREE, 1) > unknown.tokens(TREE, 1)
    assert second.tokens(TREE, 4) < unknown.tokens(TREE, 4), "deeper ones never were accepted"
    second.foresee([FORESEEN] * 10)
    assert second.tokens(TREE, 1) < 0.4, "what this text tells soon counts more"
    assert usual.seen > 10


def test_experience_knows_each_set_of_shapes():
    experience = Experience()
    found = experience.worth([CHAIN, TREE], 4)
    assert experience.worth([CHAIN, TREE], 4) is found
    assert experience.worth([CHAIN], 4) is not found


def test_matches_start_from_what_is_usual():
    usual = MatchRates()
    first = MatchRates(usual)
    for _ in range(200):
        first.count(2, False)
    assert MatchRates(usual).of(2) < 0.2 < MatchRates().of(2)
    assert MatchRates(usual).of(5) == MatchRates().of(5)


def test_ranks_by_hand():
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0], [5.0, 3.0, 2.0, 1.0], [0.0, 3.0, 2.0, 1.0]])
    assert ranks_of(logits, torch.tensor([1, 3, 0])) == [0, 3, 3]
    columns = torch.tensor([10, 11, 12, 13])
    assert ranks_of(logits, torch.tensor([12, 10, 1]), columns) == [1, 0, FORESEEN]
    wide = torch.arange(20.0).flip(0)[None]
    assert ranks_of(wide, torch.tensor([FORESEEN])) == [FORESEEN], "beyond those that are told apart"


class Fixed:
    """Plans one thing, and every so many rounds another; keeps what it is told."""

    def __init__(self, often: Plan, seldom: Plan, every: int) -> None:
        self.often, self.seldom, self.every, self.rounds, self.done = often, seldom, every, 0, []

    def plan(self, remaining, offer, context, waiting):
        self.rounds += 1
        return (self.seldom if self.rounds % self.every == 0 else self.often).within(remaining)

    def learn(self, done):
        self.done.append(done)
        return "tree"


@pytest.fixture(params=["classic", EAGLE1, EAGLE3], ids=["classic", "eagle1", "eagle3"])
def model(request, tiny, tmp_path):
    if request.param == "classic":
        return pair(tiny, noised(tiny, 0.02), settings=Settings())
    target = tiny_target()
    return eagle_couple(target, fitted(target, tmp_path, request.param, (300,)), 64)


@pytest.mark.parametrize(("every", "padded"), [(25, False), (25, True), (75, True)])
def test_foreseen_is_what_it_would_have_guessed(model, prompt_of, monkeypatch, every, padded):
    """The same ranks, whether the draft is asked every round or guesses afterwards at what it was not asked for."""
    if padded:  # as it is in bfloat16 on a CPU

        def steady(rows, room, *_):
            return steady_rows(rows, room, torch.bfloat16, torch.device("cpu"))

        for adapter in (classic, eagle):
            monkeypatch.setattr(adapter, "steady_rows", steady)
    ids, options = prompt_of(40), {"max_new_tokens": 100, "policy": "full", "lookup": False}
    guesses, plain = Plan(FORESEEN + 1, 0, FORESEEN), Plan(1, 0, 1)
    always, seldom = Fixed(guesses, guesses, 1), Fixed(plain, guesses, every)
    monkeypatch.setattr(decoding._Request, "_controller", lambda request, experience: always)
    asked = model.generate(ids, trace=True, **options)
    ranks = {}  # by position among the new tokens
    at = 1
    for step in asked.trace:
        below = [node for node, parent in enumerate(step["parents"]) if parent == 0]
        order = sorted(below, key=lambda node: -step["scores"][node])
        guessed = [step["tokens"][node] for node in order]
        token = asked.tokens[at] if at < len(asked.tokens) else None
        ranks[at] = guessed.index(token) if token in guessed else FORESEEN
        at += len(step["path"])
    monkeypatch.setattr(decoding._Request, "_controller", lambda request, experience: seldom)
    later = model.generate(ids, **options)
    assert later.tokens == asked.tokens
    told = [done for done in seldom.done if done.foreseen]
    assert len(told) == 99 // every
    compared = 0
    for done in told:
        assert FEW < len(done.foreseen) + 1 <= min(done.waiting, LOOK_BACK)
        newest = done.context - len(ids) - 1  # the root
        for back, rank in enumerate(reversed(done.foreseen)):
            if newest - back in ranks:
                assert ranks[newest - back] == rank
                compared += 1
    assert compared > 20
    assert len(set(ranks.values())) > 1
