"""The cache against plain Python lists: what was committed is there, in order, and nothing else."""

import random

import pytest
import torch

from specx.cache import TreeCache

SAME = [(2, 8, 8)] * 3
MIXED = [(2, 8, 8), (1, 16, 8), (2, 8, 8), (4, 8, 12)]  # groups, key dim, value dim of each layer
SHAPES = pytest.mark.parametrize("shapes", [SAME, MIXED, [(2, 8, 8)]], ids=["equal", "mixed", "one layer"])


class Naive:
    """A cache that keeps one list of rows a layer, and hands out copies."""

    def __init__(self, shapes, capacity, one_block=True):
        self.shapes, self.made = shapes, 0
        self.cache = TreeCache(len(shapes), capacity, one_block)
        self.committed = [[] for _ in shapes]
        self.pending = [[] for _ in shapes]

    def rows(self, layer, count):
        """New rows that no other call has made: (key, value) pairs of [1, G, count, D] filled with a counter."""
        groups, key_dim, value_dim = self.shapes[layer]
        values = torch.arange(self.made, self.made + count, dtype=torch.float32)
        self.made += count
        key = values[:, None].expand(1, groups, count, key_dim) + torch.arange(key_dim) / 100
        return key, -values[:, None].expand(1, groups, count, value_dim) - torch.arange(groups)[:, None, None] / 10

    def forward(self, count, order=None):
        """One forward of `count` tokens through all layers, checked layer by layer."""
        for layer in order or range(len(self.shapes)):
            key, value = self.rows(layer, count)
            self.pending[layer] += [(key[:, :, i], value[:, :, i]) for i in range(count)]
            found = self.cache.update(key, value, layer)
            self.check(layer, found)
        self.cache.advance(count)

    def check(self, layer, found):
        expected = self.committed[layer] + self.pending[layer]
        for part in (0, 1):
            stacked = torch.stack([row[part] for row in expected], dim=2)
            assert found[part].equal(stacked)

    def commit(self, rows):
        self.cache.commit(rows)
        for layer in range(len(self.shapes)):
            self.committed[layer] += [self.pending[layer][row] for row in rows]
        self.drop()

    def rollback(self):
        self.cache.rollback()
        self.drop()

    def drop(self):
        self.pending = [[] for _ in self.shapes]
        assert self.cache.pending == 0
        assert self.cache.committed == len(self.committed[0])
        self.check_keys()

    def check_keys(self):
        for layer, rows in enumerate(self.committed):
            if rows:
                assert self.cache.keys(layer).equal(torch.stack([key for key, _ in rows], dim=2))


@SHAPES
@pytest.mark.parametrize("one_block", [True, False], ids=["one block", "a block a layer"])
@pytest.mark.parametrize("seed", range(8))
def test_random_rounds_equal_naive_lists(seed, one_block, shapes):
    """Prefill, then rounds of one or several forwards (as a draft's levels) with an ordered or any path kept."""
    rng = random.Random(seed)
    naive = Naive(shapes, capacity=rng.choice([1, 4, 40, 400]), one_block=one_block)
    naive.forward(rng.randint(1, 9))
    naive.commit(range(naive.cache.pending))
    for _ in range(12):
        for _ in range(rng.randint(1, 3)):
            naive.forward(rng.randint(1, 8))
        pending = naive.cache.pending
        path = sorted(rng.sample(range(pending), rng.randint(0, pending)))
        if rng.random() < 0.3:
            rng.shuffle(path)
        if rng.random() < 0.2:
            naive.rollback()
        else:
            naive.commit(path)


@SHAPES
def test_growth_keeps_the_content(shapes):
    """Committed rows, and those of an unfinished round, survive any number of reallocations."""
    naive = Naive(shapes, capacity=2)
    for _ in range(5):
        naive.forward(3)
        naive.forward(4)  # pending rows move as well
        naive.commit([0, 4, 6])
    assert naive.cache.capacity >= 12 + 7


def test_layers_may_come_in_any_order():
    naive = Naive(MIXED, capacity=8)
    naive.forward(3, order=[3, 1, 0, 2])
    naive.commit([0, 2])
    naive.forward(2, order=[2, 0, 3, 1])
    naive.commit([1])


def test_reserve_moves_and_never_shrinks():
    naive = Naive(MIXED, capacity=8)
    naive.forward(5)
    naive.commit([0, 1, 2])
    naive.cache.reserve(100)
    naive.check_keys()
    assert naive.cache.capacity == 100
    naive.cache.reserve(2)
    naive.check_keys()
    assert naive.cache.capacity == 100


def test_update_before_advance_does_not_count():
    """A forward that died half-way leaves no trace: its rows are written over."""
    naive = Naive(SAME, capacity=4)
    naive.forward(3)
    naive.commit([0, 1, 2])
    key, value = naive.rows(0, 6)
    naive.cache.update(key, value, 0)  # also grows the cache
    assert (naive.cache.committed, naive.cache.pending) == (3, 0)
    naive.check_keys()
    naive.forward(2)
    naive.commit([1])


@pytest.mark.parametrize("rows", [[3], [-1], [0, 3], [0, 1, 2, 3]], ids=str)
def test_commit_of_a_row_that_is_not_pending(rows):
    naive = Naive(SAME, capacity=8)
    naive.forward(3)
    with pytest.raises(ValueError, match="must be among the 3 pending ones"):
        naive.cache.commit(rows)
    assert (naive.cache.committed, naive.cache.pending) == (0, 3)


def test_empty_commit_and_rollback_drop_all_pending():
    naive = Naive(SAME, capacity=8)
    naive.forward(2)
    naive.commit([0])
    naive.forward(4)
    naive.commit([])
    naive.forward(4)
    naive.rollback()
    naive.rollback()
    assert naive.cache.committed == 1


def test_reset_keeps_the_memory():
    naive = Naive(SAME, capacity=8)
    naive.forward(6)
    naive.commit([0, 1, 2, 3])
    size = naive.cache.nbytes()
    naive.cache.truncate(0)
    naive.committed = [[] for _ in SAME]
    assert (naive.cache.committed, naive.cache.pending, naive.cache.nbytes()) == (0, 0, size)
    naive.forward(5)
    naive.commit([0, 3])


def test_bytes_of_equal_layers_are_exactly_their_rows():
    naive = Naive(SAME, capacity=10)
    naive.forward(1)
    assert naive.cache.nbytes() == 3 * 2 * (2 * 10 * 8) * 4  # layers, key and value, groups x rows x dim, float32


def test_rows_are_written_in_place():
    """The views of one round are windows on the same memory as those of the next: nothing is copied per step."""
    naive = Naive(SAME, capacity=50)
    naive.forward(3)
    naive.commit([0, 2])
    first = naive.cache.keys(1).data_ptr()
    naive.forward(9)
    naive.commit([0, 5])
    assert naive.cache.keys(1).data_ptr() == first


def test_a_second_cache_sees_nothing_of_the_first():
    one, two = Naive(SAME, capacity=8), Naive(SAME, capacity=8)
    one.forward(3)
    one.commit([0, 1])
    two.made = 1000
    two.forward(3)
    two.commit([0])
    one.check_keys()
    two.check_keys()


def test_what_transformers_asks():
    naive = Naive(SAME, capacity=8)
    naive.forward(3)
    naive.commit([0, 1])
    naive.forward(2)
    cache = naive.cache
    assert cache.get_seq_length() == cache.get_query_offset() == 4
    assert cache.get_mask_sizes(3) == (7, 0)
    assert len(cache) == 3
