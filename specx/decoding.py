"""The loop: draft a tree, verify it in one forward of the target, keep what the target would have said itself."""

import time
from collections.abc import Callable, Generator
from typing import Protocol

import torch
from torch import Tensor

from specx.acceptance import Walk, walk
from specx.config import Settings
from specx.controller import FixedController
from specx.draft import Draft, DraftModel, ReadsTarget
from specx.generation import Generation, Piece
from specx.hf import HFModel, Output
from specx.hf_config import end_ids, logits_processors
from specx.retrieval import CachePolicy, Kept
from specx.sampling import TokenChooser
from specx.target import Target
from specx.tree import DraftTree

StopCheck = Callable[[int], bool]
_WHY_NOT = {
    "gather": "this draft's keys cannot be moved to other positions",
    "recompute": "what this draft computes its keys from is not kept",
}


class Chooser(Protocol):
    """Says what the target's token after each node is; `sampling.TokenChooser` asks the target itself."""

    mode: str

    def choose(self, logits: Tensor, tree: DraftTree, ids: Tensor) -> Tensor:
        """Return token ids, int64 [T]; logits [T, V], `ids` all tokens before the root, int64 [L]."""
        ...


def decode(
    model: HFModel,
    draft_model: DraftModel | None,
    ids: Tensor,
    settings: Settings,
    out: Generation,
    stop: StopCheck,
    *,
    target: Target | None = None,
    chooser: Chooser | None = None,
) -> Generator[Piece]:
    """Generate after `ids`, yielding what each step emits; everything else goes into `out`.

    The target's output is unchanged: greedy in float32 it is `model.generate`'s, sampled it has the same law.

    Args:
        ids: Prompt, int64 [L] on the target's device.
        draft_model: None decodes plainly.
        stop: Told every emitted token; True ends the generation behind it.
        target: A target with room for the request, to share one prefill among several; None makes one.
        chooser: Chooses the tokens instead of the target, for measurements along a given text.

    Raises:
        ValueError: At once, if `settings` do not fit the models.
    """
    return _steps(_Request(model, draft_model, ids, settings, out, stop, target, chooser), ids)


def _steps(request: "_Request", ids: Tensor) -> Generator[Piece]:
    target, draft, out, settings = request.target, request.draft, request.out, request.settings
    with out.clock("first"):
        step = target.prefill(ids, request.observe if request.taps else None)
        root = int(request.chooser.choose(step.logits, DraftTree.single(int(ids[-1]), ids.device), ids[:-1])[0])
        done = request.emit(request.cut(Walk((0,), (root,), 0)))
        if not done:
            request.prefill_draft(root)
    yield Piece((root,), 0)
    while not done:
        began = time.perf_counter()
        request.refresh_if_due()
        plan = request.controller.plan(settings.stopping.max_new_tokens - len(out.tokens))
        with out.clock("draft"):
            tree = draft.propose(plan).to(ids.device) if draft and plan.nodes > 1 else request.root_alone()
        with out.clock("verify"):
            step = target.verify(tree)
            chosen = request.chooser.choose(step.logits, tree, request.ids[: target.cache.committed])
        found = request.cut(walk(tree, chosen))
        target.keep(found.path)
        if draft:
            with out.clock("draft"):
                draft.accept(found, step)
        request.last_node = found.path[-1]
        done = request.emit(found)
        request.record(tree, found)
        out.seconds["decode"] += time.perf_counter() - began
        yield Piece(found.tokens, found.drafted)


class _Request:
    """The state of one generation besides the two caches. Dies with the call."""

    def __init__(
        self,
        model: HFModel,
        draft_model: DraftModel | None,
        ids: Tensor,
        settings: Settings,
        out: Generation,
        stop: StopCheck,
        target: Target | None,
        chooser: Chooser | None,
    ) -> None:
        self.out, self.settings, self.stop = out, settings, stop
        tree, wanted = settings.tree, settings.stopping.max_new_tokens
        self.policy = self._policy(model, draft_model, len(ids) + wanted) if draft_model else None
        scored = self.policy is not None and self.policy.top_chunks > 0
        layer = settings.cache.score_layer if settings.cache.score_layer is not None else model.score_layer()
        self.taps = tuple(draft_model.taps) if draft_model else ()
        if target and not set(self.taps) <= set(target.taps):
            raise ValueError(f"the draft reads layers {self.taps} of the target, which was made to give {target.taps}")
        self.target = target or Target(model, len(ids) + wanted + tree.nodes, layer if scored else None, self.taps)
        self.draft: Draft | None = None
        if draft_model and self.policy:
            tokens = len(ids) + wanted
            rows = tokens if self.policy.name == "full" else min(tokens, self.policy.limit)
            drops = not self.policy.fits(tokens)
            self.draft = draft_model.start(rows, tree.beam * tree.depth, tokens if drops else 0, settings.cache)
            if isinstance(self.draft, ReadsTarget):
                self.draft.attach(self.target.last_layer)
            asked, refill = settings.cache.refill, self.draft.refill
            if drops and asked and asked != refill:
                out.notes.append(f"refill {asked} became {refill}: {_WHY_NOT[asked]}")
        self.controller = FixedController(tree if draft_model else None)
        processors = logits_processors(model.model, settings.sampling, ids, wanted)
        self.chooser: Chooser = chooser or TokenChooser(processors, settings.sampling, model.device)
        self.end_ids = end_ids(model.model)
        self._buffer = torch.cat([ids, ids.new_zeros(wanted)])
        self.steps_since, self.last_node = 0, -1
        self.kept: tuple[int, ...] | None = None  # chunks chosen since the last step
        out.facts |= {
            "policy": self.policy.name if self.policy else "none",
            "draft": draft_model.name if draft_model else None,
            "draft_context": draft_model.draft_context if draft_model else None,
            "refill": self.draft.refill if self.draft else None,
            "backend": model.backend,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "processors": self.chooser.mode,
        }

    @property
    def ids(self) -> Tensor:
        """All tokens so far, int64."""
        return self._buffer[: self.out.prompt_tokens + len(self.out.tokens)]

    def root_alone(self) -> DraftTree:
        """Return the tree of a round without a draft."""
        return DraftTree.single(self.out.tokens[-1], self._buffer.device)

    def _policy(self, model: HFModel, draft: DraftModel, length: int) -> CachePolicy:
        name, config = self.settings.policy, self.settings.cache
        context = config.draft_context or draft.draft_context
        if draft.max_positions is not None:
            context = min(context, draft.max_positions)
            if name == "full" and length + self.settings.tree.depth > draft.max_positions:
                name = "window"
                self.out.notes.append(f"policy full became window: the draft has {draft.max_positions} positions")
        layers = model.config.num_hidden_layers
        if config.score_layer is not None and config.score_layer >= layers:
            raise ValueError(f"score_layer must be below {layers}, the target's layers; got {config.score_layer}")
        if name in ("retrieval", "auto") and config.score_layer is None and model.score_layer() is None:
            name = "window"
            self.out.notes.append("retrieval became window: every layer of the target slides, none sees the context")
        return CachePolicy.plan(name, config, self.settings.tree, context)

    def observe(self, chunk: Output) -> None:
        """Pass on what the target's layers give while it prefills."""
        if self.draft:
            self.draft.observe(self.ids[: self.out.prompt_tokens], chunk)

    def prefill_draft(self, root: int) -> None:
        """Give the draft the prompt (all of it while it fits, else what the policy keeps), then the root."""
        if self.draft is None or self.policy is None:
            return
        ids, keep = self.ids[: self.out.prompt_tokens], None
        if not self.policy.fits(len(ids) + 1):
            kept = self._select(self.policy, -1, len(ids))
            keep, self.kept = kept.indices, kept.chunks
        self.draft.prefill(ids, keep)
        self.draft.begin(root)

    def _select(self, policy: CachePolicy, node: int, length: int) -> Kept:
        config = self.settings.cache
        return policy.select(self.target.chunk_scores(node, config.chunk_size, config.score_heads), length)

    def refresh_if_due(self) -> None:
        """Rebuild the draft's cache if the policy says so."""
        if self.draft is None or self.policy is None:
            return
        length = self.target.cache.committed
        if not self.policy.due(length, self.draft.cached, self.draft.waiting, self.steps_since):
            self.steps_since += 1
            return
        with self.out.clock("retrieval"):
            kept = self._select(self.policy, self.last_node, length)
            self.draft.refresh(kept.indices)
        self.steps_since, self.kept = 1, kept.chunks

    def cut(self, found: Walk) -> Walk:
        """Cut a step behind the token that ends the generation and say why it ends."""
        left = self.settings.stopping.max_new_tokens - len(self.out.tokens)
        for count, token in enumerate(found.tokens[:left], 1):
            stopped = self.stop(token)
            if token in self.end_ids or stopped:
                self.out.finish_reason = "eos" if token in self.end_ids else "stop"
                return found.cut(count)
        if len(found.tokens) >= left:
            self.out.finish_reason = "length"
        return found.cut(left)

    def emit(self, found: Walk) -> bool:
        """Count the tokens of a step as generated; return whether the generation is over."""
        first = self.out.prompt_tokens + len(self.out.tokens)
        self._buffer[first : first + len(found.tokens)] = torch.tensor(found.tokens, device=self._buffer.device)
        self.out.tokens += found.tokens
        return self.out.finish_reason != "interrupted"

    def record(self, tree: DraftTree, found: Walk) -> None:
        """Count a verification step."""
        self.out.emitted += len(found.tokens)
        self.out.accepted[found.drafted] += 1
        draft = self.draft
        self.out.draft_kv_tokens = draft.kv_rows if isinstance(draft, ReadsTarget) else draft.cached if draft else 0
        if self.out.trace is not None:
            self.out.trace.append(
                {
                    "tokens": tree.tokens.tolist(),
                    "parents": tree.parents.tolist(),
                    "scores": tree.scores.tolist(),
                    "path": list(found.path),
                    "kept_chunks": None if self.kept is None else list(self.kept),
                }
            )
        self.kept = None
