"""A target that several processes hold together, by the tensor-parallel plan that its transformers model brings.

Each rank holds some heads of every layer and their keys and values, so that hybrid tree attention, the tree's cache and
the scores of chunks are those of the local heads; the model's own all-reduces make one hidden state of them.
"""

import copy
import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from specx.cache import TreeCache
from specx.hf import HFModel, Output
from specx.hf_attention import ScoredRows
from specx.ranks import Ranks


@dataclass(frozen=True, slots=True)
class _Order:
    """What followers are to do: a forward, or, with `score`, the scores of one row of the cache's newest one.

    Attributes:
        cache, capacity: Number of the cache, and its size if it is new.
        changes: What became of its pending rows since the last order: method and argument.
        gone: Numbers of caches that are no more.
        tensors: Arguments of the forward, on the CPU.
        options: The others, or those of `HFModel.chunk_scores`.
    """

    cache: int
    capacity: int
    changes: list[tuple[str, Any]]
    gone: list[int]
    tensors: dict[str, Tensor | None] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    score: bool = False


class _LedCache(TreeCache):
    """The leader's part of a cache; remembers what its followers have yet to do with theirs."""

    number, changes = -1, list[tuple[str, Any]]()

    def commit(self, rows: Sequence[int]) -> None:
        super().commit(rows)
        self.changes.append(("commit", rows))

    def truncate(self, rows: int) -> None:
        super().truncate(rows)
        self.changes.append(("truncate", rows))

    def rollback(self) -> None:
        super().rollback()
        self.changes.append(("truncate", self.committed))


class SplitModel(HFModel):
    """A part of a target. Made in all processes; the first leads, and uses it as any model, the others `follow`.

    Args:
        ranks: The processes.
        whole_head: Give the leader whole copies of embedding and LM head, for drafts that read them.
        options: As `HFModel`; without static shapes.

    Raises:
        ValueError: If the model cannot be enhanced.
    """

    def __init__(self, model: Any, ranks: Ranks, whole_head: bool = False, **options: Any) -> None:
        self._ranks, self._leads, self._whole = ranks, False, dict[str, Any]()
        self._scored = weakref.WeakKeyDictionary[TreeCache, ScoredRows | None]()  # of each cache's newest forward
        self._gone, self._numbers = list[int](), itertools.count()
        with ranks.together():
            super().__init__(model, graphs=False, **options)
            if whole_head:
                whole = {"embedding": _whole(super().embedding), "lm_head": _whole(super().lm_head)}
                self._whole = whole if ranks.rank == 0 else {}

    @property
    def embedding(self) -> nn.Embedding:
        """The input embeddings; see `whole_head`."""
        return self._whole.get("embedding", super().embedding)

    @property
    def lm_head(self) -> nn.Linear:
        """The LM head; see `whole_head`."""
        return self._whole.get("lm_head", super().lm_head)

    def lead_if_first(self) -> bool:
        """In the first process, let all forwards from now on be those of all; return whether this is the first."""
        self._leads = self._ranks.whole = self._ranks.rank == 0
        return self._leads

    def new_cache(self, capacity: int) -> TreeCache:
        """Return an empty cache for the local heads, with room for `capacity` rows."""
        if not self._leads:
            return super().new_cache(capacity)
        cache = _LedCache(self.config.num_hidden_layers, capacity)
        cache.number, cache.changes = next(self._numbers), []
        weakref.finalize(cache, self._gone.append, cache.number).atexit = False
        return cache

    def forward(self, ids: Tensor, positions: Tensor, cache: TreeCache, **options: Any) -> Output:
        """Run T tokens in all processes; see `HFModel.forward`. Taps and logits are whole, scored rows local."""
        if not isinstance(cache, _LedCache):
            return super().forward(ids, positions, cache, **options)
        names = ("mask", "tail_positions")
        tensors = {"ids": ids, "positions": positions} | {name: options.get(name) for name in names}
        others = {name: value for name, value in options.items() if name not in (*names, "taps")}
        host = {name: None if each is None else each.cpu() for name, each in tensors.items()}
        with self._ranks.together():
            self._tell(cache, tensors=host, options=others)
            out = super().forward(ids, positions, cache, **options)
        self._scored[cache] = out.scored
        return out

    def chunk_scores(
        self,
        cache: TreeCache,
        layer: int,
        scored: ScoredRows,
        node: int,
        chunk_size: int,
        heads: Literal["mean", "max"] = "mean",
    ) -> Tensor:
        """Score chunks by the heads of all processes; see `HFModel.chunk_scores`. Only of a cache's newest forward."""
        if not isinstance(cache, _LedCache):
            return self._ranks.combine(super().chunk_scores(cache, layer, scored, node, chunk_size, heads), heads)
        if scored is not self._scored.get(cache):
            raise RuntimeError("a target that several processes hold scores a cache's newest forward only")
        options = {"layer": layer, "node": node, "chunk_size": chunk_size, "heads": heads}
        with self._ranks.together():
            self._tell(cache, options=options, score=True)
            return self._ranks.combine(super().chunk_scores(cache, layer, scored, node, chunk_size, heads), heads)

    def follow(self) -> None:
        """Do what the leader says until it lets this process go."""
        caches: dict[int, TreeCache] = {}
        with self._ranks.together():
            while (order := self._ranks.hear()) is not None:
                self._obey(order, caches)

    def _obey(self, order: _Order, caches: dict[int, TreeCache]) -> None:
        for number in order.gone:
            caches.pop(number, None)
        if order.cache not in caches:
            caches[order.cache] = self.new_cache(order.capacity)
        cache = caches[order.cache]
        for change, argument in order.changes:
            getattr(cache, change)(argument)
        if order.score:
            scored = self._scored[cache]
            assert scored is not None
            self.chunk_scores(cache, scored=scored, **order.options)
            return
        moved: dict[str, Any] = {
            name: None if each is None else each.to(self.device) for name, each in order.tensors.items()
        }
        self._scored[cache] = self.forward(cache=cache, **moved, **order.options).scored

    def _tell(self, cache: _LedCache, **what: Any) -> None:
        self._ranks.tell(_Order(cache.number, cache.capacity, cache.changes, self._gone.copy(), **what))
        cache.changes = []
        self._gone.clear()


def _whole(module: Any) -> Any:
    """Return a module with all rows of its weight, computing without the other processes. All of them call this."""
    twin = copy.copy(module)
    twin.__dict__.pop("forward", None)  # which the plan has put there
    twin._parameters = {
        name: nn.Parameter(getattr(each, "full_tensor", lambda own=each: own)().detach(), requires_grad=False)
        for name, each in module._parameters.items()
        if each is not None
    } | {name: None for name, each in module._parameters.items() if each is None}
    return twin
