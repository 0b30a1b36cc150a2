"""The loop: draft a tree, verify it in one forward of the target, keep what the target would have said itself."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from specx.acceptance import Walk, walk
from specx.config import Settings
from specx.controller import FixedController
from specx.draft import Draft, DraftModel
from specx.hf import HFModel
from specx.hf_config import end_ids, logits_processors
from specx.retrieval import CachePolicy
from specx.sampling import TokenChooser
from specx.target import Target
from specx.tree import DraftTree

StopCheck = Callable[[int], bool]


@dataclass(slots=True)
class Generation:
    """What came out of one generation, and what it cost; grows while it runs.

    Attributes:
        tokens: New token ids, the end-of-text token included where it ended.
        text: Their text, set by `specx.api` where there is a tokenizer.
        finish_reason: "eos", "stop", "length" or, after Ctrl-C or an abandoned stream, "interrupted".
        trace: One record a verification step, if asked for: the tree's tokens, parents (-1: root) and scores, the
            accepted path, and the chunks kept by a retrieval before that step (None: no retrieval).
        notes: What differs from what was asked for, and why.
    """

    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = "interrupted"
    trace: list[dict[str, Any]] | None = None
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    accepted: Counter[int] = field(default_factory=Counter)
    emitted: int = 0
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    draft_kv_tokens: int = 0

    @property
    def steps(self) -> int:
        """Verification steps."""
        return self.accepted.total()

    @property
    def stats(self) -> dict[str, Any]:
        """Figures of this generation, ready for JSON.

        tau is the tokens emitted by verification steps over their number, bonus tokens included; the token that the
        prefill gives counts in neither. Decode figures leave the prefills (target's and draft's) out; both are in
        ttft_seconds. accepted_histogram[n] counts the steps that emitted n drafted tokens.
        """
        parts = ("draft", "verify", "retrieval")
        decode = self.seconds["decode"]
        return {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": len(self.tokens),
            "finish_reason": self.finish_reason,
            "tau": self.emitted / self.steps if self.steps else None,
            "steps": self.steps,
            "accepted_histogram": {str(n): self.accepted[n] for n in sorted(self.accepted)},
            "ttft_seconds": self.seconds["first"],
            "decode_seconds": decode,
            "decode_tokens_per_second": self.emitted / decode if decode else None,
            **{f"ms_{part}": 1000 * self.seconds[part] for part in parts},
            "ms_other": 1000 * max(0.0, decode - sum(self.seconds[part] for part in parts)),
            "draft_kv_tokens": self.draft_kv_tokens,
            "notes": self.notes,
            **self.facts,
        }

    @contextmanager
    def clock(self, part: str) -> Iterator[None]:
        """Add the seconds spent inside to `part`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - began


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens that one step emitted; the first `drafted` of them were proposed by the draft."""

    tokens: tuple[int, ...]
    drafted: int


def decode(
    model: HFModel, draft_model: DraftModel | None, ids: Tensor, settings: Settings, out: Generation, stop: StopCheck
) -> Generator[Piece]:
    """Generate after `ids`, yielding what each step emits; everything else goes into `out`.

    The target's output is unchanged: greedy in float32 it is `model.generate`'s, sampled it has the same law.

    Args:
        ids: Prompt, int64 [L] on the target's device.
        draft_model: None decodes plainly.
        stop: Told every emitted token; True ends the generation behind it.

    Raises:
        ValueError: At once, if `settings` do not fit the models.
    """
    return _steps(_Request(model, draft_model, ids, settings, out, stop), ids)


def _steps(request: "_Request", ids: Tensor) -> Generator[Piece]:
    target, draft, out, settings = request.target, request.draft, request.out, request.settings
    with out.clock("first"):
        step = target.prefill(ids)
        root = request.chooser.choose(step.logits, DraftTree.single(int(ids[-1]), ids.device), ids[:-1])[0]
        done = request.emit(request.cut(Walk((0,), (root,), 0)))
        if not done:
            request.prefill_draft(root)
    yield Piece((root,), 0)
    while not done:
        began = time.perf_counter()
        kept = request.refresh_if_due()
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
                draft.accept(found)
        request.last_node = found.path[-1]
        done = request.emit(found)
        request.record(tree, found, kept)
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
    ) -> None:
        self.out, self.settings, self.stop = out, settings, stop
        tree, wanted = settings.tree, settings.stopping.max_new_tokens
        self.policy = self._policy(model, draft_model, len(ids) + wanted) if draft_model else None
        scored = self.policy is not None and self.policy.top_chunks > 0
        layer = settings.cache.score_layer if settings.cache.score_layer is not None else model.score_layer()
        self.target = Target(
            model, len(ids) + wanted + tree.nodes, layer if scored else None, draft_model.taps if draft_model else ()
        )
        self.draft: Draft | None = None
        if draft_model and self.policy:
            rows = len(ids) + wanted
            rows = rows if self.policy.name == "full" else min(rows, self.policy.limit)
            self.draft = draft_model.start(rows, tree.beam * tree.depth)
        self.controller = FixedController(tree if draft_model else None)
        processors = logits_processors(model.model, settings.sampling, ids, wanted)
        self.chooser = TokenChooser(processors, settings.sampling, model.device)
        self.end_ids = end_ids(model.model)
        self._buffer = torch.cat([ids, ids.new_zeros(wanted)])
        self.steps_since, self.last_node = 0, -1
        out.facts |= {
            "policy": self.policy.name if self.policy else "none",
            "draft": draft_model.name if draft_model else None,
            "draft_context": draft_model.draft_context if draft_model else None,
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

    def prefill_draft(self, root: int) -> None:
        """Give the draft the prompt (all of it while it fits, else what the policy keeps), then the root."""
        if self.draft is None or self.policy is None:
            return
        ids, keep = self.ids[: self.out.prompt_tokens], None
        if not self.policy.fits(len(ids) + 1):
            keep = self.policy.select(self.target.chunk_scores(-1, self.policy.chunk_size), len(ids)).indices
        self.draft.prefill(ids, keep)
        self.draft.begin(root)

    def refresh_if_due(self) -> tuple[int, ...] | None:
        """Rebuild the draft's cache if the policy says so; return the retrieved chunks."""
        if self.draft is None or self.policy is None:
            return None
        length = self.target.cache.committed
        if not self.policy.due(length, self.draft.cached, self.draft.waiting, self.steps_since):
            self.steps_since += 1
            return None
        with self.out.clock("retrieval"):
            kept = self.policy.select(self.target.chunk_scores(self.last_node, self.policy.chunk_size), length)
            self.draft.refresh(kept.indices)
        self.steps_since = 1
        return kept.chunks

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

    def record(self, tree: DraftTree, found: Walk, kept: tuple[int, ...] | None) -> None:
        """Count a verification step."""
        self.out.emitted += len(found.tokens)
        self.out.accepted[found.drafted] += 1
        self.out.draft_kv_tokens = self.draft.cached if self.draft else 0
        if self.out.trace is not None:
            self.out.trace.append(
                {
                    "tokens": tree.tokens.tolist(),
                    "parents": tree.parents.tolist(),
                    "scores": tree.scores.tolist(),
                    "path": list(found.path),
                    "kept_chunks": None if kept is None else list(kept),
                }
            )
