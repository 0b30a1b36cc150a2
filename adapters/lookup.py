"""Drafting from the context: continuations of earlier occurrences of the newest tokens. No draft model at all.

The idea is prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding); several continuations make a tree
instead of a chain, and each node's probability is the measured acceptance of matches as long as its own.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from specx.acceptance import Walk
from specx.config import CacheConfig
from specx.draft import DraftModel
from specx.hf import Output
from specx.tree import DraftTree, Plan

_ORDER = 2  # tokens that a match has at least: one alone matches everywhere
_LONGEST = 16  # tokens that are compared; a longer match is no better
_CANDIDATES = 32  # occurrences looked at, newest first
_WEIGHT = 16.0  # of the first guess below, in rounds


class LookupIndex:
    """Where each pair of tokens has occurred. Constant time and memory a token."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = {}

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens."""
        for token in tokens:
            self.tokens.append(token)
            end = len(self.tokens)
            if end > _ORDER:  # the newest pair gets its entry when something follows it
                self._ends.setdefault(tuple(self.tokens[end - _ORDER - 1 : end - 1]), []).append(end - 1)

    def matches(self) -> list[tuple[int, int]]:
        """Return (place, length) of earlier occurrences of the newest tokens: longest first, then newest first.

        `place` is the index of the token that follows the occurrence.
        """
        newest = len(self.tokens)
        ends = self._ends.get(tuple(self.tokens[-_ORDER:]), [])[-_CANDIDATES:] if newest >= _ORDER else []
        found = [(end, self._length(end, newest)) for end in reversed(ends)]
        return sorted(found, key=lambda match: -match[1])  # stable: the newest of equal ones first

    def _length(self, first: int, second: int) -> int:
        length = _ORDER
        while length < min(_LONGEST, first) and self.tokens[first - length - 1] == self.tokens[second - length - 1]:
            length += 1
        return length


class MatchRates:
    """How often a token after a match of some length is the right one, measured while decoding."""

    def __init__(self) -> None:
        guesses = [1 - 0.7 * 0.75 ** (length - _ORDER) for length in range(_ORDER, _LONGEST + 1)]
        self._right = [_WEIGHT * guess for guess in guesses]
        self._tried = [_WEIGHT] * len(guesses)

    def of(self, length: int) -> float:
        """Return the share that was right; 0 < share < 1."""
        place = min(length, _LONGEST) - _ORDER
        return min(self._right[place] / self._tried[place], 0.99)

    def count(self, length: int, right: bool) -> None:
        """Take note of one try; old ones fade."""
        place = min(length, _LONGEST) - _ORDER
        fade = 1 - 1 / (8 * _WEIGHT)
        self._right[place] = self._right[place] * fade + right
        self._tried[place] = self._tried[place] * fade + 1


class LookupModel(DraftModel):
    """Lookup as a draft: it knows no positions and holds no keys."""

    name = "lookup"
    draft_context = 1 << 30
    context_source = "it has no model and no limit"
    max_positions: int | None = None
    taps: Sequence[int] = ()
    about: Sequence[str] = ("it drafts what followed earlier occurrences of the newest tokens",)

    def start(self, capacity: int, tree_rows: int, tokens: int, config: CacheConfig) -> "LookupDraft":
        """Start a request; see `draft.DraftModel`."""
        return LookupDraft()


class LookupDraft:
    """One request's lookup; see `draft.Draft` for the contract. Its tree is as deep as its nodes allow."""

    refill = "none"

    def __init__(self) -> None:
        self.index, self.rates = LookupIndex(), MatchRates()
        self._device: torch.device = torch.device("cpu")
        self._tried: dict[int, tuple[int, int]] = {}  # node -> (its best child, length of the match that proposed it)

    @property
    def cached(self) -> int:
        """Tokens in the index; there is no cache."""
        return 0

    @property
    def waiting(self) -> int:
        """Nothing has to be fed."""
        return 1

    def observe(self, ids: Tensor, chunk: Output) -> None:
        """Features of the target are of no use here."""

    def prefill(self, ids: Tensor, keep: Tensor | None) -> None:
        """Index the prompt."""
        self._device = ids.device
        self.index.extend(ids.tolist())

    def begin(self, root: int) -> None:
        """Take the first chosen token."""
        self.index.extend([root])

    def refresh(self, keep: Tensor) -> None:
        """Nothing is cached."""

    def propose(self, plan: Plan) -> DraftTree:
        """Merge the continuations into a tree and keep the nodes that are most likely to be accepted."""
        tokens, parents, lengths, scores = self._continuations(plan.nodes)
        kept = sorted(sorted(range(1, len(tokens)), key=lambda node: -scores[node])[: plan.nodes - 1])
        place = {0: 0} | {node: number for number, node in enumerate(kept, 1)}
        self._tried, depths = {}, [0]
        for node in kept:
            parent = place[parents[node]]
            depths.append(depths[parent] + 1)
            best = self._tried.get(parent)
            if best is None or scores[node] > scores[kept[best[0] - 1]]:
                self._tried[parent] = place[node], lengths[node]
        nodes = [0, *kept]
        order = torch.tensor([[tokens[node], place.get(parents[node], -1)] for node in nodes]).T
        return DraftTree(
            tokens=order[0].to(self._device),
            parents=order[1].to(self._device),
            depths=torch.tensor(depths, device=self._device),
            scores=torch.tensor([scores[node] for node in nodes], dtype=torch.float32, device=self._device),
        )

    def accept(self, walk: Walk, step: Output | None = None) -> None:
        """Learn from the walk, and index what it emitted."""
        after = dict(zip(walk.path, (*walk.path[1:], -1), strict=True))
        for node, taken in after.items():
            if node in self._tried:
                child, length = self._tried[node]
                self.rates.count(length, taken == child)
        self._tried = {}
        self.index.extend(walk.tokens)

    def _continuations(self, nodes: int) -> tuple[list[int], list[int], list[int], list[float]]:
        """Return tokens, parents, match lengths and log-probabilities of a tree of all continuations, root first."""
        known = self.index.tokens
        tokens, parents, lengths, scores = [known[-1]], [-1], [0], [0.0]
        children: dict[tuple[int, int], int] = {}
        share: list[float] = [1.0]  # of each node's probability that its children have not taken yet
        for first, length in self.index.matches():
            node = 0
            for depth, token in enumerate(known[first : first + nodes - 1]):
                child = children.get((node, token))
                if child is None:
                    chance = share[node] * self.rates.of(length + depth)
                    share[node] -= chance
                    if scores[node] + math.log(max(chance, 1e-9)) < -9:  # nobody would keep it
                        break
                    child = children[node, token] = len(tokens)
                    tokens.append(token)
                    parents.append(node)
                    lengths.append(length + depth)
                    scores.append(scores[node] + math.log(chance))
                    share.append(1.0)
                node = child
        return tokens, parents, lengths, scores
