"""The target: the model whose output is wanted, seen as prefill, verify, keep."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from specx.hf import HFModel, Output
from specx.tree import DraftTree

PREFILL_CHUNK = 2048


class Target:
    """One request's view of an unmodified model; its cache dies with it.

    Args:
        model: The enhanced model.
        capacity: Rows of the cache: prompt, new tokens and the nodes of one tree.
        score_layer: Layer whose attention scores the context; None: no scores.
        taps: Decoder layers whose outputs a draft wants (`Output.features`).
        record: Keep those of the prompt, in host memory, so that several runs after one prompt can stream them again.
    """

    def __init__(
        self,
        model: HFModel,
        capacity: int,
        score_layer: int | None = None,
        taps: Sequence[int] = (),
        record: bool = False,
    ) -> None:
        self.model, self.score_layer, self.taps = model, score_layer, tuple(taps)
        self.cache = model.new_cache(capacity)
        self._last: Output | None = None
        self._prompt: tuple[Tensor, Output] | None = None
        self._recorded: list[Output] | None = [] if record else None

    def prefill(self, ids: Tensor, on_chunk: Callable[[Output], None] | None = None) -> Output:
        """Run the prompt in chunks and return the output of the last one: logits [1, V] of its last row.

        The same tensor once more only goes back to its end: several runs after one prompt pay for it once. With
        `on_chunk` they do if this target records, and run the prompt again if not.

        Args:
            ids: int64 [L].
            on_chunk: Called with every chunk's output, for drafts that stream features.
        """
        if self._prompt is not None and self._prompt[0] is ids and (on_chunk is None or self._recorded is not None):
            self.cache.truncate(len(ids))
            self._last = self._prompt[1]
            if on_chunk is not None:
                for each in self._recorded or ():
                    on_chunk(each)
            return self._last
        self.cache.truncate(0)
        self._prompt = None
        if self._recorded is not None:
            self._recorded.clear()
        for first in range(0, len(ids), PREFILL_CHUNK):
            chunk = ids[first : first + PREFILL_CHUNK]
            positions = torch.arange(first, first + len(chunk), device=ids.device)
            self._last = self.model.forward(
                chunk,
                positions,
                self.cache,
                keep_logits=1,
                taps=self.taps,
                score_layer=self.score_layer,
                context=len(ids),
            )
            self.cache.commit(range(len(chunk)))
            if self._recorded is not None:
                host = {layer: features.cpu() for layer, features in self._last.features.items()}
                self._recorded.append(replace(self._last, features=host, scored=None))
            if on_chunk is not None:
                on_chunk(self._last)
        assert self._last is not None
        self._prompt = ids, self._last
        return self._last

    def verify(self, tree: DraftTree) -> Output:
        """Run all nodes of a tree in one forward; logits [T, V]. The nodes stay pending until `keep`."""
        mask = None if len(tree) == 1 else tree.mask()
        positions = tree.depths + self.cache.committed
        self._last = self.model.forward(
            tree.tokens, positions, self.cache, mask=mask, taps=self.taps, score_layer=self.score_layer
        )
        return self._last

    def keep(self, path: Sequence[int]) -> None:
        """Keep the nodes of an accepted path, root first, and drop the rest of the tree."""
        self.cache.commit(path)

    def last_layer(self) -> tuple[Tensor, Tensor]:
        """Return the last layer's committed keys, rotated, and values: views [1, G, L, D], to be read after `keep`."""
        return self.cache.layer(self.model.config.num_hidden_layers - 1)

    def chunk_scores(self, node: int, chunk_size: int, heads: Literal["mean", "max"] = "mean") -> Tensor | None:
        """Score the committed context by what `node` of the last forward attended to. Call it after `keep`.

        Returns:
            float32 [C], or None if there is no score layer.
        """
        if self.score_layer is None or self._last is None or self._last.scored is None:
            return None
        return self.model.chunk_scores(self.cache, self.score_layer, self._last.scored, node, chunk_size, heads)
