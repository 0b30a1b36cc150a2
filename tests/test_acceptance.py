"""The walk down a tree, worked by hand."""

import itertools
import random

import pytest
import torch

from specx.acceptance import Walk, walk
from specx.tree import DraftTree


def tree_of(tokens, parents):
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    return DraftTree(torch.tensor(tokens), torch.tensor(parents), torch.tensor(depths), torch.zeros(len(tokens)))


@pytest.fixture
def tree():
    #        0:5
    #      /     \
    #    1:6     2:7
    #   /   \      \
    # 3:6   4:8    5:8
    #  |
    # 6:5
    return tree_of([5, 6, 7, 6, 8, 8, 5], [-1, 0, 0, 1, 1, 2, 3])


@pytest.mark.parametrize(
    ("chosen", "path", "tokens"),
    [
        ([9, 6, 6, 6, 6, 6, 6], (0,), (9,)),
        ([6, 9, 9, 9, 9, 9, 9], (0, 1), (6, 9)),
        ([7, 8, 9, 9, 9, 9, 9], (0, 2), (7, 9)),
        ([7, 9, 8, 9, 9, 1, 9], (0, 2, 5), (7, 8, 1)),
        ([6, 8, 9, 9, 2, 9, 9], (0, 1, 4), (6, 8, 2)),
        ([6, 6, 9, 5, 9, 9, 3], (0, 1, 3, 6), (6, 6, 5, 3)),
        ([8, 6, 6, 6, 6, 6, 6], (0,), (8,)),  # 8 is drafted, but not below the root
    ],
    ids=["nothing", "one", "other branch", "branch to its leaf", "second child", "deepest", "token elsewhere"],
)
def test_walks_by_hand(tree, chosen, path, tokens):
    assert walk(tree, chosen) == Walk(path, tokens, len(path) - 1)


def test_single_node_emits_the_bonus_only():
    assert walk(DraftTree.single(4), [4]) == Walk((0,), (4,), 0)


def test_entries_off_the_walk_are_not_read(tree):
    assert walk(tree, [7, -1, 8, -1, -1, 7, -1]) == Walk((0, 2, 5), (7, 8, 7), 2)


def test_plain_ints_come_out(tree):
    found = walk(tree, torch.tensor([6, 8, 0, 0, 1, 0, 0]))
    assert all(type(each) is int for each in (*found.path, *found.tokens))


@pytest.mark.parametrize("seed", range(20))
def test_random_walks_obey_the_rule(seed):
    """Every step but the last goes to the child that holds the chosen token; the last has no such child."""
    rng = random.Random(seed)
    parents, tokens = [-1], [0]
    for _ in range(rng.randint(0, 30)):
        child = rng.randrange(len(parents)), rng.randrange(4)
        if child not in zip(parents, tokens, strict=True):  # siblings hold distinct tokens
            parents.append(child[0])
            tokens.append(child[1])
    tree = tree_of(tokens, parents)
    chosen = [rng.randrange(4) for _ in tokens]
    found = walk(tree, chosen)
    assert found.tokens == tuple(chosen[node] for node in found.path)
    assert found.drafted == len(found.path) - 1
    for parent, child in itertools.pairwise(found.path):
        assert (parents[child], tokens[child]) == (parent, chosen[parent])
    assert (found.path[-1], found.tokens[-1]) not in zip(parents, tokens, strict=True)


FOUND = Walk((0, 1, 3, 6), (6, 6, 5, 3), drafted=3)


@pytest.mark.parametrize(
    ("count", "path", "tokens", "drafted"),
    [(1, (0,), (6,), 1), (2, (0, 1), (6, 6), 2), (3, (0, 1, 3), (6, 6, 5), 3), (4, FOUND.path, FOUND.tokens, 3)],
    ids=["1", "2", "3", "4"],
)
def test_cut_leaves_the_last_emitted_token_out_of_the_cache(count, path, tokens, drafted):
    assert FOUND.cut(count) == Walk(path, tokens, drafted)


def test_cut_behind_the_end_changes_nothing():
    assert FOUND.cut(9) is FOUND
