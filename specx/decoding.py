"""The loop: draft a tree, verify it in one forward of the target, keep what the target would have said itself."""

import time
from collections.abc import Callable, Generator
from typing import Protocol

import torch
from torch import Tensor

from specx.acceptance import Walk, walk
from specx.auto_controller import AutoController
from specx.branches import source_of
from specx.config import Settings
from specx.controller import Controller, FixedController, Round
from specx.cuda import GraphPool, sent, synchronize
from specx.draft import Draft, DraftModel, ReadsTarget
from specx.draft_cache import policy_of, started
from specx.experience import Experience
from specx.generation import Generation, Piece
from specx.hf import HFModel, Output
from specx.hf_config import end_ids, logits_processors
from specx.lookup import Lookup
from specx.retrieval import CachePolicy, Kept
from specx.sampling import TokenChooser
from specx.sources import Sources
from specx.target import Target
from specx.tree import DraftTree, Plan

StopCheck = Callable[[int], bool]


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
    experience: Experience | None = None,
) -> Generator[Piece]:
    """Generate after `ids`, yielding what each step emits; everything else goes into `out`.

    The target's output is unchanged: greedy in float32 it is `model.generate`'s, sampled it has the same law.

    Args:
        ids: Prompt, int64 [L] on the target's device.
        draft_model: None decodes plainly.
        stop: Told every emitted token; True ends the generation behind it.
        target: A target with room for the request, to share one prefill among several; None makes one.
        chooser: Chooses the tokens instead of the target, for measurements along a given text.
        experience: With these models, which grows; None: there is none.

    Raises:
        ValueError: At once, if `settings` do not fit the models.
    """
    return _steps(_Request(model, draft_model, ids, settings, out, stop, target, chooser, experience), ids)


def _steps(request: "_Request", ids: Tensor) -> Generator[Piece]:
    target, sources, out = request.target, request.sources, request.out
    with out.clock("first"):
        step = target.prefill(ids, request.observe if request.taps else None)
        root = int(request.chooser.choose(step.logits, DraftTree.single(int(ids[-1]), ids.device), ids[:-1])[0])
        done = request.emit(request.cut(Walk((0,), (root,), 0)))
        if not done:
            request.prefill_sources(root)
        synchronize(ids.device)  # or the first round would wait for the draft's prefill
    yield Piece((root,), ("target",))
    while not done:
        began, capturing = time.perf_counter(), GraphPool.seconds
        plan, waiting = request.plan(), sources.waiting
        refreshed = request.refresh_if_due(plan)
        with out.clock("draft"):
            tree = sources.propose(plan).to(ids.device)
        with out.clock("verify"):
            step = target.verify(tree)
            chosen = request.chooser.choose(step.logits, tree, request.ids[: target.cache.committed])
            whole = walk(tree, chosen)
        found = request.cut(whole)
        target.keep(found.path)
        with out.clock("draft"):
            sources.accept(found, step)
        request.last_node = found.path[-1]
        done = request.emit(found)
        origins = request.record(tree, whole, found)
        spent = time.perf_counter() - began - (GraphPool.seconds - capturing)
        request.learn(plan, tree, whole, spent - refreshed, refreshed, waiting)
        out.seconds["decode"] += time.perf_counter() - began
        yield Piece(found.tokens, origins)


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
        experience: Experience | None,
    ) -> None:
        self.out, self.settings, self.stop = out, settings, stop
        wanted = settings.stopping.max_new_tokens
        self.policy = policy_of(model, draft_model, settings, len(ids) + wanted, out.notes) if draft_model else None
        scored = self.policy is not None and self.policy.top_chunks > 0
        layer = settings.cache.score_layer if settings.cache.score_layer is not None else model.score_layer()
        self.taps = tuple(draft_model.taps) if draft_model else ()
        if target and not set(self.taps) <= set(target.taps):
            raise ValueError(f"the draft reads layers {self.taps} of the target, which was made to give {target.taps}")
        self.target = target or Target(
            model, len(ids) + wanted + settings.largest_tree, layer if scored else None, self.taps
        )
        self.draft: Draft | None = None
        if draft_model and self.policy:
            self.draft = started(draft_model, self.policy, settings, len(ids) + wanted, out.notes)
            if isinstance(self.draft, ReadsTarget):
                self.draft.attach(self.target.last_layer)
        looks = draft_model is not None and (settings.lookup or not self.draft)
        if draft_model and not self.draft and settings.rounds.lookup is False:
            raise ValueError(f"draft {draft_model.name} drafts from the context only: leave --no-lookup away")
        usual = (experience or Experience()) if settings.controlled else None
        lookup = Lookup(usual.matches if usual else None) if looks else None
        self.sources = Sources(self.draft, lookup, model.device)
        self.controller = self._controller(usual)
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

    def observe(self, chunk: Output) -> None:
        """Pass on what the target's layers give while it prefills."""
        if self.draft:
            self.draft.observe(self.ids[: self.out.prompt_tokens], chunk)

    def prefill_sources(self, root: int) -> None:
        """Give the draft the prompt (all of it while it fits, else what the policy keeps), then the root."""
        ids, keep = self.ids[: self.out.prompt_tokens], None
        if self.draft and self.policy and not self.policy.fits(len(ids) + 1):
            kept = self._select(self.policy, -1, len(ids))
            keep, self.kept = kept.indices, kept.chunks
        self.sources.prefill(ids, keep, root)

    def _controller(self, usual: Experience | None) -> Controller:
        tree, sources = self.settings.tree, self.sources
        if not sources.draft and not sources.lookup:
            return FixedController(None)
        if usual is None:
            return FixedController(tree, sources.scale if sources.lookup else None)
        most = self.settings.largest_tree
        return AutoController(tree, sources.scale, usual, bool(sources.draft), self.out.decisions, most)

    def plan(self) -> Plan:
        """Return what the next round may spend."""
        remaining, context = self.settings.stopping.max_new_tokens - len(self.out.tokens), len(self.ids)
        offer = self.sources.offer(self.settings.tree.nodes, remaining - 1, self.settings.largest_tree)
        return self.controller.plan(remaining, offer, context, self.sources.waiting)

    def learn(self, plan: Plan, tree: DraftTree, whole: Walk, seconds: float, refreshed: float, waiting: int) -> None:
        """Let the controller know what came of a round."""
        codes, emitted = tree.lists()[3], len(whole.tokens)
        path, context = [codes[node] for node in whole.path[1:]], len(self.ids) - emitted
        done = Round(
            plan, len(tree), path, emitted, 1000 * seconds, 1000 * refreshed, context, waiting,
            bool(self.draft), self.sources.foreseen,
        )  # fmt: skip
        self.out.modes[self.controller.learn(done)] += 1

    def _select(self, policy: CachePolicy, node: int, length: int) -> Kept:
        config = self.settings.cache
        return policy.select(self.target.chunk_scores(node, config.chunk_size, config.score_heads), length)

    def refresh_if_due(self, plan: Plan) -> float:
        """Rebuild the draft's cache if the policy says so and the draft is asked; return the seconds that took."""
        length = self.target.cache.committed
        asked = self.draft is not None and plan.draft and plan.nodes > 1
        if not asked or not self.draft or not self.policy:
            self.steps_since += 1
            return 0.0
        if not self.policy.due(length, self.draft.cached, self.draft.waiting, self.steps_since):
            self.steps_since += 1
            return 0.0
        before = self.out.seconds["retrieval"] - GraphPool.seconds
        with self.out.clock("retrieval"):
            kept = self._select(self.policy, self.last_node, length)
            self.draft.refresh(kept.indices)
        self.steps_since, self.kept = 1, kept.chunks
        return self.out.seconds["retrieval"] - GraphPool.seconds - before

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
        self._buffer[first : first + len(found.tokens)] = sent(found.tokens, self._buffer.device)
        self.out.tokens += found.tokens
        return self.out.finish_reason != "interrupted"

    def record(self, tree: DraftTree, whole: Walk, found: Walk) -> tuple[str, ...]:
        """Count a verification step, a walk and what was taken of it; return who proposed each emitted token."""
        codes = tree.lists()[3]
        origins = (*(source_of(codes[node]) for node in whole.path[1:]), "target")[: len(found.tokens)]
        self.out.emitted += len(found.tokens)
        self.out.accepted[found.drafted] += 1
        self.out.sources.update(origins)
        self.out.draft_kv_tokens = self.sources.cached
        if self.out.trace is not None:
            self.out.trace.append(
                {
                    "tokens": tree.tokens.tolist(),
                    "parents": tree.parents.tolist(),
                    "scores": tree.scores.tolist(),
                    "path": list(found.path),
                    "sources": list(origins),
                    "kept_chunks": None if self.kept is None else list(self.kept),
                }
            )
        self.kept = None
        return origins
