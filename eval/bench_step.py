"""Times of the parts of one step at a given context: verify, a draft level and tree, retrieval; and of the whole loop.

Each part runs alone between two synchronisations, so that nothing of one is counted in another.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from specx.acceptance import Walk
from specx.adapters.classic import ClassicModel
from specx.api import SpeculativeModel
from specx.config import DRAFT_ALONE
from specx.cuda import synchronize
from specx.data.prompts import demo_prompt
from specx.decoding import decode
from specx.eval.bench import Row, median_ms, tree_mask
from specx.generation import Generation
from specx.hf import HFModel
from specx.hf_config import positions_of
from specx.retrieval import CachePolicy
from specx.target import Target
from specx.tree import DraftTree, Plan

MOST_NODES = 64
_SPARE = 256  # rows of the caches for what is generated


class SyncedGeneration(Generation):
    """Waits for the device at the borders of every part: the split among them is true, the whole is slower."""

    @contextmanager
    def clock(self, part: str) -> Iterator[None]:
        """Add the seconds spent inside to `part`."""
        _wait()
        with Generation.clock(self, part):
            yield
            _wait()


def _wait() -> None:
    """Wait for every device that holds something."""
    for number in range(torch.cuda.device_count()):
        if torch.cuda.memory_allocated(number):
            torch.cuda.synchronize(number)


def weight_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of weights that one step reads: all but an embedding table that is no LM head as well."""
    table = model.get_input_embeddings().weight  # type: ignore[operator]
    head = model.get_output_embeddings().weight  # type: ignore[operator]
    every = sum(weight.nbytes for weight in model.parameters())
    return every - (0 if table.data_ptr() == head.data_ptr() else table.nbytes)


def cache_bytes(config: Any, length: int, dtype: torch.dtype) -> int:
    """Return the bytes of keys and values of `length` tokens in all layers."""
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * length * config.num_hidden_layers * groups * dim * dtype.itemsize


def binary_tree(nodes: int, token: int, device: torch.device) -> DraftTree:
    """Return a tree in which node i hangs below node (i - 1) // 2, all of one token."""
    ids = torch.arange(nodes)
    depths = tree_mask(nodes).sum(1) - 1
    parents = (ids - 1) // 2  # -1 for the root
    return DraftTree(torch.full_like(ids, token), parents, depths, torch.zeros(nodes)).to(device)


def graph_trouble(engine: HFModel) -> str | None:
    """Return why steps are not captured as CUDA graphs, or were found not to be; None if they are."""
    if engine.no_graphs:
        return engine.no_graphs
    steps = [*engine._steps.values(), *([engine._spare[1]] if engine._spare else [])]
    return next((each.trouble for each in steps if each.trouble), None)


def context_of(model: SpeculativeModel, tokens: int) -> Tensor:
    """Return a context of held-out text (random ids without a tokenizer), int64 [L] on the model's device.

    Raises:
        ValueError: If the target has fewer positions than that and a few more.
    """
    most = positions_of(model.engine.config)
    if most is not None and tokens + MOST_NODES > most:
        raise ValueError(f"a context of {tokens} tokens and a tree exceed the target's {most} positions; lower it")
    if model.tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, model.engine.vocab_size, (tokens,), generator=generator).to(model.engine.device)
    _, ids = demo_prompt(model.tokenizer, tokens)
    return torch.tensor(ids, device=model.engine.device).repeat(-(-tokens // len(ids)))[:tokens]


class StepBench:
    """A target with a long context, and its draft.

    Args:
        model: With a classic draft, or none: then only `verify` is measured.
        ids: The longest context, int64 [L] on the model's device. It is computed once; shorter ones are its beginnings
            and must be measured after longer ones.
        repeats: Measurements a median is taken of.

    Raises:
        ValueError: If the draft is of another kind.
    """

    def __init__(self, model: SpeculativeModel, ids: Tensor, repeats: int) -> None:
        if model.draft is not None and not isinstance(model.draft, ClassicModel):
            raise ValueError(
                f"steps are measured with a classic draft or none; got {type(model.draft).__name__}: "
                "python -m specx.eval.drafts times drafts of every kind"
            )
        self.model, self.engine, self.ids, self.repeats = model, model.engine, ids, repeats
        self.device, self.token = model.engine.device, int(ids[0])  # any token serves as a tree's
        self.target = Target(self.engine, len(ids) + _SPARE, self.engine.score_layer())
        self.target.prefill(ids)

    def verify(self, length: int, nodes: int, bandwidth: float) -> Row:
        """Time the target's forward over a tree of `nodes` nodes behind `length` tokens.

        Returns:
            ms; bytes: of weights and of the prefix's keys and values; ms_bytes: what copying as many takes; ratio.
        """
        self._at(length)
        tree = binary_tree(nodes, self.token, self.device)

        def run() -> None:
            self.target.verify(tree)
            self.target.cache.rollback()

        ms = median_ms(run, self.device, self.repeats)
        nbytes = weight_bytes(self.engine.model) + cache_bytes(self.engine.config, length + nodes, self.engine.dtype)
        ms_bytes = 1000 * nbytes / bandwidth
        return {"nodes": nodes, "ms": ms, "bytes": nbytes, "ms_bytes": ms_bytes, "ratio": ms / ms_bytes}

    def drafting(self, length: int) -> Row:
        """Time the draft behind `length` tokens, its cache bounded by retrieval.

        Returns:
            ms_level: one forward of a level's nodes; ms_tree: a whole tree; ms_scores, ms_select, ms_refresh: the parts
            of a retrieval; draft_kv_tokens: its cache's tokens.
        """
        if not isinstance(self.model.draft, ClassicModel):
            raise ValueError("this model has no draft to measure; give one")
        self._at(length)
        settings, small = self.model.settings, self.model.draft
        shape, cache = settings.tree, settings.cache
        policy = CachePolicy.plan("retrieval", cache, shape, cache.draft_context or small.draft_context)
        # a row of the target's attention, as a step leaves it
        self.target.verify(DraftTree.single(self.token, self.device))
        self.target.keep([])
        scores = self.target.chunk_scores(0, cache.chunk_size, cache.score_heads)
        keeps = [policy.select(each, length).indices for each in (scores, None if scores is None else scores.flip(0))]
        draft = small.start(min(length + _SPARE, policy.limit), shape.beam * shape.depth, length + _SPARE, cache)
        draft.prefill(self.ids[:length], keeps[0])
        draft.begin(self.token)
        draft.propose(Plan(2, 0, 1))  # feeds the root
        draft.accept(Walk((0,), (self.token,), 0))
        positions = torch.full((shape.beam,), draft.cache.committed, device=self.device)
        eye = torch.eye(shape.beam, dtype=torch.bool, device=self.device)

        def level() -> None:
            small.model.forward(self.ids[: shape.beam], positions, draft.cache, mask=eye, tail_positions=positions)
            draft.cache.rollback()

        def tree() -> None:
            draft.propose(plan)
            draft.accept(Walk((0,), (self.token,), 0))

        def refresh() -> None:
            keeps.reverse()  # the same tokens once more would cost nothing
            draft.refresh(keeps[0])

        plan, repeats = Plan(shape.nodes, shape.depth, shape.beam), min(self.repeats, 20)
        return {
            "ms_level": median_ms(level, self.device, self.repeats),
            "ms_tree": median_ms(tree, self.device, repeats),
            "ms_scores": median_ms(lambda: self.target.chunk_scores(0, cache.chunk_size), self.device, self.repeats),
            "ms_select": median_ms(lambda: policy.select(scores, length), self.device, self.repeats),
            "ms_refresh": median_ms(refresh, self.device, repeats),
            "draft_kv_tokens": draft.cached, "refill": draft.refill, "level_nodes": shape.beam,
            "tree_nodes": shape.nodes,
        }  # fmt: skip

    def loop(self, length: int, new: int, policy: str = "auto") -> Row:
        """Decode `new` tokens behind `length` and return a step's milliseconds by part, with waits in between."""
        synchronize(self.device)
        ids = self.ids if length == len(self.ids) else self.ids[:length]
        settings = self.model.settings.override(policy=policy, max_new_tokens=new, temperature=0.0, **DRAFT_ALONE)
        out = SyncedGeneration(length)
        for _ in decode(self.engine, self.model.draft, ids, settings, out, lambda _: False, target=self.target):
            pass
        steps, stats = max(1, out.steps), out.stats
        parts = {part: stats[part] / steps for part in ("ms_draft", "ms_verify", "ms_retrieval", "ms_other")}
        whole = sum(parts.values())
        return {"ms": whole, **parts, "tau": stats["tau"], "share_draft": parts["ms_draft"] / whole if whole else None}

    def _at(self, length: int) -> None:
        if not 1 <= length <= self.target.cache.committed:
            raise ValueError(
                f"the context is {self.target.cache.committed} tokens long; {length} cannot be measured after that"
            )
        self.target.cache.truncate(length)
