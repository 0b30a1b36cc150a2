"""Lookup: the index against a naive search, the tree's rules, exactness with every target."""

import random
import time

import pytest
import torch
from test_lossless import FAMILIES, assert_same, family, own_tokens

from specx.acceptance import Walk
from specx.adapters.lookup import LookupDraft, LookupIndex, LookupModel, MatchRates
from specx.api import SpeculativeModel, load
from specx.data.prompts import held_out_prompt
from specx.hf import HFModel
from specx.tree import Plan


def naive_matches(tokens: list[int]) -> set[tuple[int, int]]:
    """Every earlier place whose preceding two tokens or more are the newest ones."""
    found = set()
    for place in range(2, len(tokens)):
        length = 0
        while length < min(16, place) and tokens[place - 1 - length] == tokens[-1 - length]:
            length += 1
        if length >= 2:
            found.add((place, length))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_the_index_finds_what_a_search_finds(seed):
    rng, index = random.Random(seed), LookupIndex()
    for _ in range(40):
        index.extend([rng.randrange(4) for _ in range(rng.randrange(1, 6))])
        found = index.matches()
        truth = naive_matches(index.tokens)
        assert found == sorted(found, key=lambda match: (-match[1], -match[0])), "longest first, then newest"
        assert set(found) <= truth
        newest = sorted(truth, reverse=True)[:32]
        assert set(found) == set(newest)


def test_the_index_is_built_in_no_time():
    rng, index = random.Random(0), LookupIndex()
    tokens = [rng.randrange(2000) for _ in range(128_000)]
    began = time.process_time()
    index.extend(tokens)
    assert time.process_time() - began < 20  # measured: 0.2 s; this only rules out a quadratic index


def started(tokens: list[int]) -> LookupDraft:
    draft = LookupModel().start(0, 0, 0, None)
    draft.prefill(torch.tensor(tokens[:-1]), None)
    draft.begin(tokens[-1])
    return draft


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("nodes", [2, 5, 16])
def test_every_path_stands_in_the_context(seed, nodes):
    rng = random.Random(seed)
    tokens = [rng.randrange(5) for _ in range(200)]
    tree = started(tokens).propose(Plan(nodes, 3, 2))
    assert 1 <= len(tree) <= nodes
    assert int(tree.tokens[0]) == tokens[-1]
    text = f" {' '.join(map(str, tokens))} "
    paths = [tuple(int(tree.tokens[each]) for each in tree.path(node)) for node in range(len(tree))]
    assert len(set(paths)) == len(paths), "equal paths are one node"
    for node, path in enumerate(paths):
        assert f" {tokens[-2]} {' '.join(map(str, path))} " in text
        assert int(tree.depths[node]) == len(path) - 1
        assert int(tree.parents[node]) < node
        if node:
            assert tree.scores[node] < tree.scores[tree.parents[node]]
    for parent in range(len(tree)):  # what the siblings claim together is a probability
        children = [tree.scores[node] for node in range(len(tree)) if tree.parents[node] == parent]
        assert sum(torch.exp(score - tree.scores[parent]) for score in children) < 1


def test_nothing_to_find_is_the_root_alone():
    assert started([1, 2, 3, 4]).propose(Plan(16, 3, 4)).tokens.tolist() == [4]
    assert started([1]).propose(Plan(16, 3, 4)).tokens.tolist() == [1]


def test_a_repetition_is_drafted_to_its_end():
    tokens = [*range(10, 40), *range(10, 20)]
    assert started(tokens).propose(Plan(16, 3, 4)).tokens.tolist() == list(range(19, 35))


def test_rates_follow_what_happens():
    rates = MatchRates()
    assert 0 < rates.of(2) < rates.of(5) < rates.of(16) < 1
    for _ in range(100):
        rates.count(3, False)
        rates.count(7, True)
    assert rates.of(3) < 0.1
    assert rates.of(7) > 0.9
    assert rates.of(2) == MatchRates().of(2)
    assert rates.of(99) == rates.of(16)


def test_accept_learns_from_the_best_child_only():
    draft = started([1, 2, 3, 9, 1, 2, 4, 9, 1, 2])
    before = draft.rates.of(2)
    tree = draft.propose(Plan(16, 3, 4))
    first = [node for node in range(len(tree)) if tree.parents[node] == 0]
    assert {int(tree.tokens[node]) for node in first} == {3, 4}
    best = max(first, key=lambda node: float(tree.scores[node]))
    draft.accept(Walk((0, best), (int(tree.tokens[best]), 7), 1))
    assert draft.index.tokens[-2:] == [int(tree.tokens[best]), 7]
    assert draft.rates._tried != MatchRates()._tried
    assert draft.rates.of(2) != before or draft.rates.of(3) != MatchRates().of(3)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_exact_with_every_family(name, prompt_of):
    couple, positions = SpeculativeModel(HFModel(family(name)), LookupModel(), None), 200
    base = prompt_of(min(positions, family(name).config.max_position_embeddings - 64) // 2)
    ids = torch.cat([base, base])
    for policy in ("auto", "full"):
        out = couple.generate(ids, max_new_tokens=30, policy=policy)
        assert_same(family(name), ids, out.tokens, own_tokens(family(name), ids, 30))
    assert out.stats["draft"] == "lookup"


def test_by_name_with_the_bundled_target():
    model = load(None, "lookup", dtype="float32")
    prompt = held_out_prompt(model.tokenizer, 500)
    out = model.generate(prompt, max_new_tokens=64)
    assert out.tokens == model.generate(prompt, max_new_tokens=64, plain=True).tokens
    assert out.stats["tau"] > 1.5  # 3.4 when this was written
    assert model.generate("x = 1", max_new_tokens=8, temperature=1.5, seed=3).tokens
