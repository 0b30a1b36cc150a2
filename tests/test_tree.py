"""Trees: masks, growth and its rules, against naive references."""

import math
import random
from dataclasses import replace

import pytest
import torch

from specx.lookup import Lookup
from specx.tree import DraftTree, Plan, ancestors, grow

SEEDS = pytest.mark.parametrize("seed", range(20))


def random_tree(seed: int, size: int | None = None) -> DraftTree:
    """Any tree whose parents precede their children; sizes 1 to 40, from bushy to one long chain."""
    rng = random.Random(seed)
    size = size or rng.randint(1, 40)
    reach = rng.choice([1, 2, 5, size])
    parents = [-1] + [rng.randrange(max(0, node - reach), node) for node in range(1, size)]
    depths = [0]
    for node in range(1, size):
        depths.append(depths[parents[node]] + 1)
    tokens = torch.tensor([rng.randrange(50) for _ in range(size)])
    return DraftTree(tokens, torch.tensor(parents), torch.tensor(depths), torch.zeros(size))


class TableDraft:
    """A draft whose logits are a pure function of the path, which `expand` must tell apart by the mask alone."""

    def __init__(self, vocab: int, seed: int, style: str = "smooth") -> None:
        self.vocab, self.seed, self.style = vocab, seed, style
        self.rows: list[int] = []
        self.calls: list[int] = []

    def logits(self, path: tuple[int, ...]) -> torch.Tensor:
        """The logits after `path`, the drafted tokens below the root."""
        generator = torch.Generator().manual_seed(hash((self.seed, *path)) % 2**31)
        noise = torch.randn(self.vocab, generator=generator)
        if self.style == "ties":
            return noise.round()
        if self.style == "one-hot":
            return torch.full((self.vocab,), -torch.inf).index_fill_(0, noise.argmax(), 0.0)
        return noise * {"smooth": 1.5, "huge": 1e30, "peaked": 200.0, "flat": 0.0}[self.style]

    def expand(self, tokens: torch.Tensor, mask: torch.Tensor, level: int) -> torch.Tensor:
        """Check the contract of `grow`, then answer."""
        assert level == len(self.calls)
        first = len(self.rows)
        self.calls.append(len(tokens))
        self.rows += tokens.tolist()
        assert mask.dtype == torch.bool
        assert mask.shape == (len(tokens), len(self.rows))
        answers = []
        for number, row in enumerate(mask):
            seen = row.nonzero().flatten().tolist()
            assert seen[-1] == first + number  # itself, and nothing behind it
            assert len(seen) == level + 1  # one row of each level
            answers.append(self.logits(tuple(self.rows[each] for each in seen)))
        return torch.stack(answers)

    def grow(self, plan: Plan, root: int = 7):
        return grow(root, self.logits(()), self.expand, plan)


def path_tokens(tree: DraftTree, node: int) -> tuple[int, ...]:
    """The drafted tokens from below the root to `node`, by a naive loop."""
    parents, tokens, found = tree.parents.tolist(), tree.tokens.tolist(), []
    while node > 0:
        found.append(tokens[node])
        node = parents[node]
    return tuple(found[::-1])


def best_first(draft: TableDraft, plan: Plan) -> dict[tuple[int, ...], float]:
    """EAGLE-2's growth with Python floats and lists: the kept paths and their log-probabilities."""
    beam = min(plan.beam, draft.vocab)

    def children(path: tuple[int, ...], score: float) -> list[tuple[float, tuple[int, ...]]]:
        logits = draft.logits(path).double().tolist()
        norm = math.log(sum(math.exp(each) for each in logits))
        ranked = sorted(range(draft.vocab), key=lambda token: -logits[token])[:beam]
        return [(score + logits[token] - norm, (*path, token)) for token in ranked]

    level = children((), 0.0)
    found = list(level)
    for _ in range(plan.depth):
        frontier = sorted(level, reverse=True)[:beam]
        level = [child for score, path in frontier for child in children(path, score)]
        found += level
    return {path: score for score, path in sorted(found, reverse=True)[: plan.nodes - 1]}


def test_mask_of_five_nodes_written_out():
    #     0
    #    / \
    #   1   2
    #  / \
    # 3   4
    tree = DraftTree(
        tokens=torch.tensor([5, 6, 7, 8, 9]),
        parents=torch.tensor([-1, 0, 0, 1, 1]),
        depths=torch.tensor([0, 1, 1, 2, 2]),
        scores=torch.zeros(5),
    )
    expected = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    assert tree.mask().int().tolist() == expected
    assert tree.mask().dtype == torch.bool
    assert tree.path(4) == [0, 1, 4]
    assert tree.path(0) == [0]
    assert len(tree) == 5


def test_single_is_one_root():
    tree = DraftTree.single(3)
    assert (tree.tokens.tolist(), tree.parents.tolist(), tree.depths.tolist()) == ([3], [-1], [0])
    assert tree.scores.tolist() == [0.0]
    assert tree.mask().tolist() == [[True]]


@SEEDS
def test_mask_marks_exactly_the_ancestors(seed):
    tree = random_tree(seed)
    mask, parents = tree.mask(), tree.parents.tolist()
    for node in range(len(tree)):
        found, at = set(), node
        while at >= 0:
            found.add(at)
            at = parents[at]
        assert set(mask[node].nonzero().flatten().tolist()) == found
        assert tree.path(node) == sorted(found)
    assert ancestors(tree.parents).equal(mask)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64, 65])
def test_mask_of_a_chain_is_a_triangle(size):
    steps = torch.arange(size)
    chain = DraftTree(steps, steps - 1, steps, torch.zeros(size))
    assert chain.mask().equal(torch.ones(size, size, dtype=torch.bool).tril())
    assert ancestors(chain.parents).equal(chain.mask())


def test_lists_known_beforehand_are_those_of_the_tensors():
    lookup = Lookup()
    lookup.extend([1, 2, 3, 4, 1, 2, 5, 6, 1, 2])
    for tree in (DraftTree.single(7), DraftTree.of_branches(2, lookup.branches(6, 4), torch.device("cpu"))):
        more = torch.arange(len(tree))
        assert tree.lists(more) == replace(tree, _lists=[]).lists(more)
        assert tree.lists() == tree.lists(more)[:4]


@pytest.mark.parametrize("style", ["smooth", "ties", "one-hot", "huge", "peaked", "flat"])
@SEEDS
def test_grown_tree_is_well_formed(seed, style):
    rng = random.Random(seed)
    plan = Plan(nodes=rng.randint(2, 40), depth=rng.randint(0, 6), beam=rng.randint(1, 6))
    draft = TableDraft(vocab=rng.randint(2, 12), seed=seed, style=style)
    tree = draft.grow(plan)
    parents, scores, depths = tree.parents.tolist(), tree.scores.tolist(), tree.depths.tolist()
    assert len(draft.calls) == plan.depth
    assert 2 <= len(tree) <= plan.nodes
    assert (parents[0], depths[0], scores[0], int(tree.tokens[0])) == (-1, 0, 0.0, 7)
    assert max(depths) <= plan.depth + 1
    assert not any(math.isnan(score) for score in scores)
    for node in range(1, len(tree)):
        assert 0 <= parents[node] < node
        assert depths[node] == depths[parents[node]] + 1
        assert scores[node] <= scores[parents[node]]  # a child never outranks its parent
    siblings = list(zip(parents, tree.tokens.tolist(), strict=True))
    assert len(set(siblings)) == len(siblings)  # the walk needs distinct children
    assert tree.tokens[1:].max() < draft.vocab


@SEEDS
def test_growth_equals_naive_best_first(seed):
    rng = random.Random(100 + seed)
    plan = Plan(nodes=rng.randint(2, 30), depth=rng.randint(0, 5), beam=rng.randint(1, 5))
    draft = TableDraft(vocab=rng.randint(2, 10), seed=seed)
    expected = best_first(draft, plan)
    tree = draft.grow(plan)
    grown = {path_tokens(tree, node): float(tree.scores[node]) for node in range(1, len(tree))}
    assert grown.keys() == expected.keys()
    for path, score in expected.items():
        assert grown[path] == pytest.approx(score, abs=1e-4)


@SEEDS
def test_rows_name_the_fed_row_of_each_node(seed):
    plan = Plan(nodes=12, depth=3, beam=3)
    draft = TableDraft(vocab=8, seed=seed)
    growth = draft.grow(plan)
    rows, tree = growth.rows.tolist(), growth
    assert rows[0] == -1
    for node in range(1, len(tree)):
        if rows[node] >= 0:
            assert draft.rows[rows[node]] == int(tree.tokens[node])
            assert sum(draft.calls[: int(tree.depths[node]) - 1]) <= rows[node]
            assert rows[node] < sum(draft.calls[: int(tree.depths[node])])
        if rows[int(tree.parents[node])] < 0:
            assert tree.parents[node] == 0  # only fed nodes have children
    fed = [row for row in rows if row >= 0]
    assert len(set(fed)) == len(fed)
    assert all(rows[node] == -1 for node in range(len(tree)) if tree.depths[node] == plan.depth + 1)


def best_of_levels(draft: TableDraft, shape: tuple[int, ...]) -> dict[tuple[int, ...], float]:
    """LongSpec's growth with Python floats: each level holds the best children of the whole level above."""
    found, level = {}, {(): 0.0}
    for width in shape:
        children = {}
        for path, score in level.items():
            logits = draft.logits(path).double().tolist()
            norm = math.log(sum(math.exp(each) for each in logits))
            children |= {(*path, token): score + each - norm for token, each in enumerate(logits)}
        level = dict(sorted(children.items(), key=lambda child: -child[1])[:width])
        found |= level
    return found


@pytest.mark.parametrize("shape", [(4, 16, 16, 16), (1, 1, 1, 1, 1), (8,), (2, 3, 9, 4), (50, 2)], ids=str)
def test_a_shape_says_how_many_nodes_a_level_has(shape):
    draft = TableDraft(vocab=9, seed=3)
    plan = Plan(1 + sum(shape), len(shape) - 1, max(shape), shape=shape)
    tree = draft.grow(plan)
    expected = best_of_levels(TableDraft(vocab=9, seed=3), shape)
    found = {path_tokens(tree, node): tree.scores[node].item() for node in range(1, len(tree))}
    assert found.keys() == expected.keys()
    assert all(found[path] == pytest.approx(expected[path], abs=1e-4) for path in expected)
    assert draft.calls == [min(each, 9) for each in shape[:1]][: len(shape) - 1] + list(shape[1:-1])
    fed = [row for row in tree.rows.tolist() if row >= 0]
    assert sorted(fed) == list(range(sum(draft.calls)))  # every node but the last level's is fed
    cut = plan.within(3)
    assert (cut.shape, cut.depth) == (shape[:2], min(2, len(shape)) - 1)
    assert plan.within(1).nodes == 1


def test_the_last_drafted_level_takes_part():
    """A draft that is sure of itself fills every level, the one after the last call too."""
    tree = TableDraft(vocab=6, seed=0, style="peaked").grow(Plan(nodes=6, depth=4, beam=2))
    assert tree.depths.tolist() == [0, 1, 2, 3, 4, 5]
    assert tree.parents.tolist() == [-1, 0, 1, 2, 3, 4]


def test_all_levels_compete_for_the_nodes():
    """A sure first level with flat levels below: its own siblings lose to no deeper node that is less likely."""
    flat = torch.zeros(4)
    root = torch.tensor([2.0, 1.9, 1.8, -20.0])
    tree = grow(0, root, lambda tokens, mask, level: flat.expand(len(tokens), 4), Plan(4, 3, 3))
    assert tree.depths.tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize(("nodes", "expected"), [(2, 2), (3, 3), (4, 4), (200, 13)])
def test_number_of_nodes(nodes, expected):
    # 3 children, then 3 nodes with 3 children each: 12 candidates and the root
    tree = TableDraft(vocab=9, seed=1).grow(Plan(nodes, 1, 3))
    assert len(tree) == expected


def test_depth_zero_never_calls_the_draft():
    draft = TableDraft(vocab=9, seed=1)
    growth = draft.grow(Plan(10, 0, 4))
    assert draft.calls == []
    assert growth.depths.tolist() == [0, 1, 1, 1, 1]
    assert growth.rows.tolist() == [-1] * 5


def test_nodes_one_keeps_only_the_root():
    growth = TableDraft(vocab=9, seed=1).grow(Plan(1, 2, 3))
    assert growth.tokens.tolist() == [7]
    assert growth.rows.tolist() == [-1]


@pytest.mark.parametrize("beam", [3, 64])
def test_beam_is_cut_to_the_vocabulary(beam):
    draft = TableDraft(vocab=3, seed=1)
    tree = draft.grow(Plan(100, 2, beam))
    assert draft.calls == [3, 3]
    assert len(tree) == 1 + 3 + 9 + 9


def test_beam_one_drafts_a_chain():
    draft = TableDraft(vocab=9, seed=1)
    tree = draft.grow(Plan(50, 5, 1))
    assert tree.parents.tolist() == [-1, 0, 1, 2, 3, 4, 5]
    assert draft.calls == [1] * 5


def test_low_precision_logits_are_summed_in_float32():
    draft = TableDraft(vocab=9, seed=1)
    tree = grow(0, draft.logits(()).bfloat16(), lambda *a: draft.expand(*a).bfloat16(), Plan(20, 3, 3))
    assert tree.scores.dtype == torch.float32


def test_threshold_stops_early():
    plan = Plan(nodes=16, depth=6, beam=3)
    long, short, none = (TableDraft(vocab=50, seed=2, style="flat") for _ in range(3))
    long.grow(plan)
    tree = short.grow(Plan(16, 6, 3, threshold=0.01))
    none.grow(Plan(16, 6, 3, threshold=0.0))
    assert len(long.calls) == 6
    assert len(short.calls) < 6
    assert len(none.calls) == 6
    assert len(tree) > 1


def test_threshold_goes_on_while_a_level_pays():
    draft = TableDraft(vocab=50, seed=2, style="peaked")
    draft.grow(Plan(16, 6, 3, threshold=0.5))  # each level of a sure draft adds about one token
    assert len(draft.calls) == 6


@pytest.mark.parametrize(
    ("remaining", "expected"),
    [(1, Plan(1, 0, 1)), (2, Plan(16, 0, 4)), (3, Plan(16, 1, 4)), (6, Plan(16, 4, 4)), (100, Plan(16, 4, 4))],
    ids=["1", "2", "3", "6", "100"],
)
def test_plan_within_the_remaining_tokens(remaining, expected):
    assert Plan(16, 4, 4).within(remaining) == expected


@pytest.mark.parametrize(("nodes", "depth"), [(2, 0), (3, 1), (5, 3), (6, 4), (7, 4)])
def test_plan_has_no_level_that_no_kept_node_can_lie_on(nodes, depth):
    assert Plan(nodes, 4, 4).within(50) == Plan(nodes, depth, 4)


def test_plan_without_draft_stays_without():
    assert Plan(1, 4, 4).within(50) == Plan(1, 0, 1)
    assert Plan(8, 4, 4, 0.1).within(50).threshold == 0.1
