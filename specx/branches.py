"""What the context offers a tree, and the one scale on which its nodes and a draft's are compared."""

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

from specx.cuda import sent

# A node's origin is one integer, so that it travels with the tree's tokens: who proposed it, how sure, and its rank.
_DRAFT, _DRAFT_FIRST = 0x1F, 0x20  # 1 + bucket of the draft's probability (0: not the draft's); best of its siblings
_MATCH, _MATCH_FIRST = 0x7C0, 0x800  # length of the match (0: not from the context); best of its siblings
_MATCH_SHIFT, _RANK_SHIFT = 6, 12
_BITS = 64
_Codes = TypeVar("_Codes", int, Tensor)


def key_of(token: int, depth: int) -> int:
    """Return what a token at a depth adds to the key of a path, an int64; equal keys are taken for equal paths."""
    return _wrapped((token + 1) * _FACTORS[depth])


def _wrapped(number: int) -> int:
    half = 1 << (_BITS - 1)
    return (number + half) % (1 << _BITS) - half


_FACTORS = [_wrapped(pow(0x9E3779B97F4A7C15, depth + 3, 1 << _BITS)) for depth in range(300)]
_factors: dict[torch.device, Tensor] = {}


def keys_of(tokens: Tensor, depths: Tensor) -> Tensor:
    """Return `key_of` each token, int64 [N], products wrapping around as there."""
    if tokens.device not in _factors:
        _factors[tokens.device] = torch.tensor(_FACTORS, device=tokens.device)
    return (tokens + 1) * _factors[tokens.device][depths]


@dataclass(frozen=True, slots=True)
class Origin:
    """Who proposed a node.

    Attributes:
        bucket: Of the draft's probability, see `Calibration`; None: the draft did not propose it.
        draft_first: Whether the draft ranked it before its siblings.
        match: Length of the match that it continues, 0: the context did not propose it.
        match_first: Whether it was the context's best among its siblings.
        rank: Place among all nodes of its tree by estimated acceptance, from 1.
    """

    bucket: int | None
    draft_first: bool
    match: int
    match_first: bool
    rank: int

    @classmethod
    def read(cls, code: int) -> "Origin":
        """Read what `code_of`, or a tree's growth, has written; 0: proposed by a draft about which nothing is noted."""
        match = (code & _MATCH) >> _MATCH_SHIFT
        return cls(bucket_in(code), bool(code & _DRAFT_FIRST), match, bool(code & _MATCH_FIRST), code >> _RANK_SHIFT)


def bucket_in(code: int) -> int | None:
    """Return the bucket of the draft's probability in an origin; None: the draft did not propose the node."""
    return (code & _DRAFT) - 1 if code & _DRAFT else None


def source_of(code: int) -> str:
    """Say who proposed a node: "draft", "context", or "both"."""
    if not code & _MATCH:
        return "draft"
    return "both" if code & _DRAFT else "context"


def match_code(length: int, first: bool) -> int:
    """Return the origin of a node from the context."""
    return length << _MATCH_SHIFT | (_MATCH_FIRST if first else 0)


def draft_codes(buckets: Tensor, parents: Tensor) -> Tensor:
    """Return the origins of a draft's candidates, int64 [N], of whose siblings the best come first."""
    place = torch.arange(len(parents), device=parents.device)
    earliest = torch.full((len(parents) + 1,), len(parents), device=parents.device)
    first = earliest.scatter_reduce(0, parents, place, "amin")[parents] == place
    return buckets + 1 + first * _DRAFT_FIRST


def with_ranks(codes: _Codes, ranks: _Codes) -> _Codes:
    """Return origins, one or int64 [N], with the rank of each node, from 0."""
    return codes + ((ranks + 1) << _RANK_SHIFT)


@dataclass(frozen=True, slots=True)
class Branches:
    """Continuations from the context as a tree without its root, most likely nodes first, so that any number of first
    ones is a tree. Lists, because they are known before the device has anything to do.

    Attributes:
        tokens: Token ids.
        parents: 1 + place of the parent in these lists; 0: the root.
        depths: Distance from the root.
        chances: Probability that a node is accepted if its parent was.
        paths: The same given nothing: the product along the path.
        lengths: Of the match that each node continues.
        firsts: Whether it is the best among its siblings.
        keys: `key_of` the path's tokens, summed up.
    """

    tokens: list[int]
    parents: list[int]
    depths: list[int]
    chances: list[float]
    paths: list[float]
    lengths: list[int]
    firsts: list[bool]
    keys: list[int]

    def __len__(self) -> int:
        return len(self.tokens)

    def best(self, count: int) -> "Branches":
        """Return the `count` most likely nodes."""
        if count >= len(self):
            return self
        fields = (getattr(self, name)[: max(0, count)] for name in self.__slots__)
        return Branches(*fields)

    def origins(self) -> list[int]:
        """Return each node's origin, without its rank."""
        return [match_code(*each) for each in zip(self.lengths, self.firsts, strict=True)]

    def expected(self) -> list[float]:
        """Return the expected number of accepted nodes of the best n, for n from 0 to all."""
        return [0.0, *accumulate(self.paths)]

    def leading(self) -> float:
        """Return the probability that the first token is accepted."""
        return sum(chance for chance, depth in zip(self.paths, self.depths, strict=True) if depth == 1)


class Calibration:
    """How often nodes to which a draft gives some probability are accepted, measured while decoding.

    Drafts are over-confident, the more the longer the context. Per bucket of probability one correction is learned;
    it starts at none. `MatchRates` of `specx.lookup` is the same for the context, by length of match.
    """

    EDGES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
    _MIDS = (0.01, 0.035, 0.075, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.935, 0.985)
    _WEIGHT, _FADE = 8.0, 1 - 1 / 128  # of the start, in tries; of old tries

    def __init__(self) -> None:
        self._right = [self._WEIGHT * middle for middle in self._MIDS]
        self._tried = [self._WEIGHT] * len(self._MIDS)
        self._edges: Tensor | None = None

    def rates(self) -> list[float]:
        """Return the measured acceptance of each bucket."""
        return [right / tried for right, tried in zip(self._right, self._tried, strict=True)]

    def count(self, bucket: int, right: bool) -> None:
        """Take note of one try; old ones fade."""
        self._right[bucket] = self._right[bucket] * self._FADE + right
        self._tried[bucket] = self._tried[bucket] * self._FADE + 1

    def apply(self, odds: Tensor) -> tuple[Tensor, Tensor]:
        """Correct a draft's log-probabilities of nodes given their parents.

        Returns:
            Corrected log-probabilities below 0, float32 [N], and buckets, int64 [N].
        """
        if self._edges is None or self._edges.device != odds.device:
            self._edges = torch.tensor(self.EDGES, device=odds.device).log()
        buckets = torch.bucketize(odds, self._edges)
        pairs = zip(self.rates(), self._MIDS, strict=True)
        shifts = sent([math.log(max(rate, 1e-3) / middle) for rate, middle in pairs], odds.device)
        return (odds + shifts[buckets]).clamp(max=-0.005), buckets
