"""Drafting from the context: continuations of earlier occurrences of the newest tokens. No draft model at all.

The idea is prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding); several continuations make a tree
instead of a chain, and each node's probability is the measured acceptance of matches as long as its own.
"""

from collections.abc import Sequence

from specx.branches import Branches, key_of

_ORDER = 2  # tokens that a match has at least: one alone matches everywhere
_LONGEST = 16  # tokens that are compared; a longer match is no better
_CANDIDATES = 24  # occurrences looked at, newest first
_AGREED = 3  # of these that say nothing new, one after the other, while a passage is being copied: then all agree
_WEIGHT = 8.0  # of the first guess below, in rounds
_LEAST = 1e-3  # probability below which nobody would keep a node
_ENOUGH = 3  # times the nodes wanted, and no more matches are looked at
_BITS = (1 << 64) - 1


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
    """How often a token after a match of some length is the right one, measured while decoding.

    Args:
        usual: What was seen in earlier texts, which goes on learning with this one; None: nothing.
    """

    def __init__(self, usual: "MatchRates | None" = None) -> None:
        self._usual, lengths = usual, range(_ORDER, _LONGEST + 1)
        guesses = [1 - 0.7 * 0.75 ** (length - _ORDER) if usual is None else usual.of(length) for length in lengths]
        self._right = [_WEIGHT * guess for guess in guesses]
        self._tried = [_WEIGHT] * len(guesses)

    def of(self, length: int) -> float:
        """Return the share that was right; 0 < share < 1."""
        place = min(length, _LONGEST) - _ORDER
        return min(self._right[place] / self._tried[place], 0.99)

    def count(self, length: int, right: bool) -> None:
        """Take note of one try; old ones fade."""
        if self._usual is not None:
            self._usual.count(length, right)
        place = min(length, _LONGEST) - _ORDER
        fade = 1 - 1 / (16 * _WEIGHT)
        self._right[place] = self._right[place] * fade + right
        self._tried[place] = self._tried[place] * fade + 1


class Lookup:
    """One request's lookup: all its tokens, and how well matches did so far.

    Args:
        usual: How well they did in earlier requests.
    """

    def __init__(self, usual: MatchRates | None = None) -> None:
        self.index, self.rates = LookupIndex(), MatchRates(usual)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens."""
        self.index.extend(tokens)

    def branches(self, limit: int, depth: int, copying: int = 0) -> Branches:
        """Return the at most `limit` continuations most likely to be accepted, none deeper than `depth`.

        The longest match proposes first; what others propose beside it shares what it leaves of the probability.

        Args:
            copying: The limit, where that is more, behind a match so long that a passage is being copied.
        """
        matches = self.index.matches() if limit > 0 and depth > 0 else []
        agreed, enough = 0, _CANDIDATES
        if copying > limit and matches and matches[0][1] == _LONGEST:
            limit, enough = copying, _AGREED
        known, reach = self.index.tokens, min(limit, depth)
        rates = [self.rates.of(length) for length in range(_LONGEST + 1)] if matches else []
        nodes: list[tuple[int, int, int, float, int, bool]] = []  # token, parent, depth, chance, length, first
        paths, share = [1.0], [1.0]  # of the root and the nodes; share: what their children left
        children: dict[tuple[int, int], int] = {}
        for place, length in matches:
            if len(nodes) >= _ENOUGH * limit or agreed == enough:
                break
            node, before = 0, len(nodes)
            for at, token in enumerate(known[place : place + reach], 1):
                child = children.get((node, token))
                if child is None:
                    match = min(length + at - 1, _LONGEST)
                    chance = share[node] * rates[match]
                    path = paths[node] * chance
                    if path < _LEAST:
                        break
                    nodes.append((token, node, at, chance, match, share[node] == 1.0))
                    paths.append(path)
                    share[node] -= chance
                    share.append(1.0)
                    child = children[node, token] = len(nodes)
                node = child
            agreed = agreed + 1 if len(nodes) == before else 0
        return _ranked(nodes, paths, limit)

    def learn(self, offer: Branches, tokens: Sequence[int]) -> None:
        """Count what would have been right, whether or not it was verified.

        So that what the context offers is known to be worth trying again without trying it.

        Args:
            offer: What was offered before these tokens.
            tokens: That were emitted.
        """
        children: dict[int, list[int]] = {}
        for number, parent in enumerate(offer.parents, 1):
            children.setdefault(parent, []).append(number)
        node = 0
        for token in tokens:
            after = 0
            for child in children.get(node, ()):
                right = offer.tokens[child - 1] == token
                if offer.firsts[child - 1]:
                    self.rates.count(offer.lengths[child - 1], right)
                if right:
                    after = child
            if not after:
                return
            node = after


def _ranked(nodes: list[tuple[int, int, int, float, int, bool]], paths: list[float], limit: int) -> Branches:
    """Return the most likely nodes in the order of their probability, in which parents come first."""
    order = sorted(range(1, len(paths)), key=paths.__getitem__, reverse=True)[:limit]
    place = {0: 0} | {node: number for number, node in enumerate(order, 1)}
    kept = [nodes[node - 1] for node in order]
    keys = [0]
    for token, parent, depth, *_ in kept:
        keys.append(keys[place[parent]] + key_of(token, depth))
    columns = list(map(list, zip(*kept, strict=True))) if kept else [[] for _ in range(6)]
    tokens, parents, depths, chances, lengths, firsts = columns
    parents = [place[parent] for parent in parents]
    signed = [_signed(key) for key in keys[1:]]
    return Branches(tokens, parents, depths, chances, [paths[node] for node in order], lengths, firsts, signed)


def _signed(key: int) -> int:
    key &= _BITS
    return key - (_BITS + 1) if key >> 63 else key
