"""The target's processed distribution at every node of a tree, and one token from each."""

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from specx.config import SamplingConfig
from specx.cuda import sent
from specx.tree import DraftTree

# Processors that never look at the running ids: one call for all nodes.
_ID_FREE = {
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "SuppressTokensLogitsProcessor",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
}
# Stateless ones that do: one call a tree level, whose nodes all have running ids of one length.
_LEVEL_WISE = {
    "RepetitionPenaltyLogitsProcessor",
    "EncoderRepetitionPenaltyLogitsProcessor",
    "NoRepeatNGramLogitsProcessor",
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor",
    "SuppressTokensAtBeginLogitsProcessor",
    "SequenceBiasLogitsProcessor",
    "NoBadWordsLogitsProcessor",
}


_BLOCK = 512  # random numbers made at once


class TokenChooser:
    """Takes the target's token at each node: the argmax at temperature 0, else a seeded draw.

    A draw's random number belongs to the position of the token in the text. A walk visits one node a depth, so that its
    draws are independent, and the same seed gives the same text whatever trees were verified on the way.

    Args:
        processors: The target's, from `hf_config.logits_processors`.
        sampling: Temperature and seed.
        device: Of the logits.

    Attributes:
        mode: "batch", "level" or "walk": how the processors are called (anything unknown or stateful: along the walk).
    """

    def __init__(self, processors: LogitsProcessorList, sampling: SamplingConfig, device: torch.device) -> None:
        self.processors, self.greedy = processors, sampling.temperature == 0
        self.generator = torch.Generator(device=device).manual_seed(sampling.seed)
        self._numbers, self._first = torch.empty(0, device=device), -1  # of the positions from `_first` on
        names = {type(each).__name__ for each in processors}
        if names <= _ID_FREE:
            self.mode = "batch"
        else:
            self.mode = "level" if names <= _ID_FREE | _LEVEL_WISE else "walk"

    def choose(self, logits: Tensor, tree: DraftTree, ids: Tensor) -> Tensor:
        """Return the target's token after each node, on the logits' device.

        Args:
            logits: [T, V].
            tree: T nodes.
            ids: All tokens before the root, int64 [L].

        Returns:
            int64 [T]; -1 at nodes that a walk cannot reach, in mode "walk".
        """
        self._reserve(len(ids), len(ids) + len(tree))
        if self.mode == "batch":
            return self._take(self.processors(ids[None], logits.float()), len(ids) + tree.depths)
        if self.mode == "walk":
            return torch.tensor(self._along_the_walk(logits, tree, ids), device=logits.device)
        processed = torch.empty_like(logits, dtype=torch.float32)
        for level in _levels(tree):
            nodes, paths = sent(list(level), logits.device), sent(list(level.values()), logits.device)
            running = torch.cat([ids.expand(len(nodes), -1), paths], dim=1)
            processed[nodes] = self.processors(running, logits[nodes].float())
        return self._take(processed, len(ids) + tree.depths)

    def _take(self, scores: Tensor, positions: Tensor) -> Tensor:
        """Return a token for each row of `scores`, [n, V]; `positions`, int64 [n], are those of the nodes."""
        if self.greedy:
            return scores.argmax(-1)
        fine = torch.float64 if scores.device.type != "mps" else torch.float32
        sums = torch.softmax(scores.to(fine), -1).cumsum(-1)
        drawn = self._numbers_at(positions.to(scores.device)).to(fine)[:, None] * sums[:, -1:]
        return torch.searchsorted(sums, drawn, right=True).squeeze(1).clamp(max=scores.shape[1] - 1)

    def _numbers_at(self, positions: Tensor) -> Tensor:
        return self._numbers[positions - self._first]

    def _reserve(self, first: int, last: int) -> None:
        """Make random numbers for the positions from `first`, and up to `last`."""
        if self._first < 0:
            self._first = first
        while self._first + len(self._numbers) <= last:
            more = torch.rand(_BLOCK, generator=self.generator, device=self._numbers.device, dtype=self._numbers.dtype)
            self._numbers = torch.cat([self._numbers, more])

    def _along_the_walk(self, logits: Tensor, tree: DraftTree, ids: Tensor) -> list[int]:
        chosen, node, running = [-1] * len(tree), 0, ids
        while True:
            running = torch.cat([running, tree.tokens[node : node + 1]])
            scores = self.processors(running[None], logits[node : node + 1].float())
            chosen[node] = int(self._take(scores, tree.depths[node : node + 1] + len(ids)))
            match = ((tree.parents == node) & (tree.tokens == chosen[node])).nonzero().flatten()
            if len(match) == 0:
                return chosen
            node = int(match[0])


def _levels(tree: DraftTree) -> list[dict[int, list[int]]]:
    """Return for each depth its nodes with the tokens from the root to each; read at once, not depth by depth."""
    paths: list[list[int]] = []
    for token, parent in zip(*tree.lists()[:2], strict=True):
        paths.append([*(paths[parent] if parent >= 0 else []), token])
    levels: list[dict[int, list[int]]] = [{} for _ in range(max(map(len, paths)))]
    for node, path in enumerate(paths):
        levels[len(path) - 1][node] = path
    return levels
