"""Lookup: the index against a naive search, the tree's rules, exactness with every target."""

import random
import time

import pytest
import torch
from test_lossless import FAMILIES, assert_same, family, own_tokens

from specx.acceptance import Walk, walk
from specx.adapters.lookup import LookupModel
from specx.api import SpeculativeModel, load
from specx.data.prompts import held_out_prompt
from specx.hf import HFModel
from specx.lookup import Lookup, LookupIndex, MatchRates
from specx.sources import Sources
from specx.tree import DraftTree, Plan


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
        newest = sorted(truth, reverse=True)[:24]
        assert set(found) == set(newest)


def test_the_index_is_built_in_no_time():
    rng, index = random.Random(0), LookupIndex()
    tokens = [rng.randrange(2000) for _ in range(128_000)]
    began = time.process_time()
    index.extend(tokens)
    assert time.process_time() - began < 20  # measured: 0.2 s; this only rules out a quadratic index


def started(tokens: list[int]) -> Sources:
    sources = Sources(None, Lookup(), torch.device("cpu"))
    sources.prefill(torch.tensor(tokens[:-1], dtype=torch.long), None, tokens[-1])
    return sources


def tree_of(sources: Sources, nodes: int, depth: int = 99) -> DraftTree:
    return sources.propose(Plan(nodes, 3, 2).within(depth + 1, sources.offer(nodes, depth)))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("nodes", [2, 5, 16])
def test_every_path_stands_in_the_context(seed, nodes):
    rng = random.Random(seed)
    tokens = [rng.randrange(5) for _ in range(200)]
    tree = tree_of(started(tokens), nodes)
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
    assert tree_of(started([1, 2, 3, 4]), 16).tokens.tolist() == [4]
    assert tree_of(started([1]), 16).tokens.tolist() == [1]


def test_a_repetition_is_drafted_to_its_end():
    tokens = [*range(10, 40), *range(10, 20)]
    assert tree_of(started(tokens), 16).tokens.tolist() == list(range(19, 35))


@pytest.mark.parametrize(("matched", "size"), [(15, 16), (16, 41), (17, 41)])
def test_a_passage_that_is_being_copied_gets_a_larger_tree(matched, size):
    lookup = Lookup()
    lookup.extend([*range(100, 200), *range(110, 110 + matched)])
    offer = lookup.branches(15, 99, copying=40)
    assert len(offer) == size - 1
    assert offer.tokens == list(range(110 + matched, 110 + matched + size - 1))
    assert len(lookup.branches(15, 7, copying=40)) == 7, "none deeper than asked"
    assert len(lookup.branches(50, 99, copying=40)) == 50, "the larger number counts"


def test_a_short_loop_is_followed_far():
    """Each match of a loop ends with the text, one turn after the match before it."""
    lookup = Lookup()
    lookup.extend([5, 6] * 30)
    assert lookup.branches(15, 99, copying=40).tokens[:15] == lookup.branches(15, 99).tokens == ([5, 6] * 8)[:15]
    assert len(lookup.branches(15, 99, copying=40)) == 40


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


@pytest.mark.parametrize("verified", [True, False], ids=["verified", "not tried"])
@pytest.mark.parametrize("right", [True, False])
def test_accept_learns_from_the_best_children_only(right, verified):
    """Also in rounds that did not try what the context offered: it is known what would have been right."""
    sources = started([1, 2, 3, 9, 1, 2, 4, 9, 1, 2])
    rates, fresh = sources.lookup.rates, MatchRates()
    tree = tree_of(sources, 16)
    first = [node for node in range(len(tree)) if tree.parents[node] == 0]
    assert {int(tree.tokens[node]) for node in first} == {3, 4}
    best, other = sorted(first, key=lambda node: -float(tree.scores[node]))
    node = best if right else other
    path, tokens = (0, node) if verified else (0,), (int(tree.tokens[node]), 7)
    if not verified:
        sources.propose(Plan(1, 0, 1))
    walk(tree, torch.zeros(len(tree), dtype=torch.long))  # which brings the tree to the host, as every step does
    sources.accept(Walk(path, tokens, len(path) - 1), None)
    assert sources.lookup.index.tokens[-2:] == list(tokens)
    moved = [length for length in range(2, 17) if rates.of(length) != fresh.of(length)]
    assert (rates.of(moved[0]) > fresh.of(moved[0])) == right
    assert moved[0] == 3, "the match 9, 1, 2 is longer than 1, 2"


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_exact_with_every_family(name, prompt_of):
    couple, positions = SpeculativeModel(HFModel(family(name)), LookupModel(), None), 200
    base = prompt_of(min(positions, family(name).config.max_position_embeddings - 64) // 2)
    ids = torch.cat([base, base])
    for policy in ("auto", "full"):
        out = couple.generate(ids, max_new_tokens=30, policy=policy)
        assert_same(family(name), ids, out.tokens, own_tokens(family(name), ids, 30))
    assert out.stats["draft"] == "lookup"


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_exact_while_copying(temperature):
    """With trees larger than `nodes`, to the last token that is wanted."""
    model = load(None, "lookup", dtype="float32")
    prompt = model.tokenizer.encode("def a(self):\n    return self.b\n\n" * 12)
    options = {"max_new_tokens": 150, "temperature": temperature, "seed": 1}
    out = model.generate(prompt, trace=True, nodes=4, copy_nodes=48, **options)
    assert out.tokens == model.generate(prompt, plain=True, **options).tokens
    smaller = model.generate(prompt, trace=True, nodes=4, copy_nodes=1, **options)
    largest = [max(len(step["tokens"]) for step in each.trace) for each in (out, smaller)]
    assert largest[1] == 4
    assert largest[0] > 4 or temperature


def test_by_name_with_the_bundled_target():
    model = load(None, "lookup", dtype="float32")
    prompt = held_out_prompt(model.tokenizer, 500)
    out = model.generate(prompt, max_new_tokens=64)
    assert out.tokens == model.generate(prompt, max_new_tokens=64, plain=True).tokens
    assert out.stats["tau"] > 1.5  # 3.4 when this was written
    assert model.generate("x = 1", max_new_tokens=8, temperature=1.5, seed=3).tokens
