"""GPU suite, end to end: whole generations of a pair grown to large shapes, ours and Hugging Face's.

What speculation must beat is plain decoding by the same engine, with static shapes and graphs: Hugging Face's own loop
waits for launches, and a ratio to it would count what that saves as speculation's.
"""

import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor

from specx.api import SpeculativeModel
from specx.config import DRAFT_ALONE
from specx.decoding import decode
from specx.eval.bench_step import SyncedGeneration, graph_trouble
from specx.eval.gpu_setup import Row, Setup, Task, free
from specx.eval.growth import PairShape, grown_pair
from specx.eval.methods import HF_METHODS, huggingface
from specx.eval.metrics import efficiency, first_divergence
from specx.generation import Generation
from specx.target import Target

PLAIN = "plain"
OURS = (PLAIN, "auto", "window", "full")
_TIMES = 3
_SPARE = 64


class Bed:
    """A grown pair, and for each length a target that has its prompt already; made when first needed."""

    def __init__(self, setup: Setup, pair: PairShape) -> None:
        self.setup, self.pair = setup, pair
        self.rates: dict[tuple[int, str], float] = {}
        self.tokens: dict[tuple[int, str], list[int]] = {}
        self._model: SpeculativeModel | None = None
        self._target: tuple[int, Tensor, Target] | None = None

    @property
    def pending(self) -> float:
        """Seconds that making what is missing may take."""
        return 0.0 if self._model else self.setup.load_seconds

    def model(self) -> SpeculativeModel:
        """Return the pair."""
        if self._model is None:
            free(self.setup.device)
            graphs = True if self.setup.dry else None
            small = self.setup.bundled(self.setup.dtype, graphs)
            self._model = grown_pair(small, self.pair, self.setup.device, self.setup.dtype, graphs=graphs)
        return self._model

    def target(self, length: int) -> tuple[Tensor, Target]:
        """Return a prompt, int64 [length], and a target of which one prefill serves all methods."""
        model = self.model()
        if self._target is None or self._target[0] != length:
            self.release()
            ids = self.setup.prompt(model.tokenizer, length)
            target = Target(model.engine, length + self.setup.new + _SPARE, model.engine.score_layer())
            self._target = length, ids, target
        return self._target[1], self._target[2]

    def release(self) -> None:
        """Give the caches back, and what was captured over them."""
        self._target = None
        if self._model:
            self._model.release()
        free(self.setup.device)

    def unload(self) -> None:
        """Give the models back too; what was measured stays."""
        self._target = self._model = None
        free(self.setup.device)


def tasks(setup: Setup) -> Iterator[Task]:
    """Yield the methods at every length; Hugging Face's static cache compiles for a minute, so that it comes last."""
    beds = [Bed(setup, pair) for pair in setup.pairs]
    for bed in beds:
        pair = bed.pair
        for length in reversed(setup.lengths):
            for name in OURS:
                run = partial(_ours, bed, length, name)
                yield Task(f"{name} {pair.name} L{length}", run, "ours", about=8.0, extra=bed.pending)
            run = partial(_theirs, bed, length, "ar")
            yield Task(f"hf {pair.name} L{length}", run, "hf", about=12.0, extra=bed.pending)
        bed.unload()
    for bed in beds:
        for length in setup.lengths:
            run = partial(_theirs, bed, length, "ar-static")
            yield Task(f"hf static {bed.pair.name} L{length}", run, "hf static", about=90.0, extra=bed.pending)
        bed.unload()


def _ours(bed: Bed, length: int, name: str) -> Row:
    ids, target = bed.target(length)
    model, new = bed.model(), bed.setup.new
    _generate(model, target, ids, name, max(4, new // 2), Generation(length))  # captures what is captured
    rates, out = [], Generation(length)
    for _ in range(1 if bed.setup.dry else _TIMES):
        out = _generate(model, target, ids, name, new, Generation(length))
        rates.append(out.stats["decode_tokens_per_second"])
    split = _generate(model, target, ids, name, new, SyncedGeneration(length))
    stats, rate = out.stats, statistics.median(rates)
    steps = max(1, split.steps)
    parts = {part: split.stats[part] / steps for part in ("ms_draft", "ms_verify", "ms_retrieval", "ms_other")}
    figures = {"tau": stats["tau"], "steps": out.steps, "draft_kv_tokens": out.draft_kv_tokens, **parts}
    figures["share_draft"] = parts["ms_draft"] / (sum(parts.values()) or 1.0)
    row = _compared(bed, length, name, rate, out.tokens) | figures
    ratio, tau = row["speed_up"], stats["tau"]
    return row | {
        "efficiency": efficiency(ratio, tau) if ratio and tau else None, "notes": out.notes,
        "refill": stats["refill"], "score_layer": target.score_layer,
    }  # fmt: skip


def _generate(model: SpeculativeModel, target: Target, ids: Tensor, name: str, new: int, out: Generation) -> Generation:
    options: dict[str, Any] = {} if name == PLAIN else {"policy": name}
    settings = model.settings.override(max_new_tokens=new, temperature=0.0, **DRAFT_ALONE | options)
    draft = None if name == PLAIN else model.draft
    for _ in decode(model.engine, draft, ids, settings, out, lambda _: False, target=target):
        pass
    return out


def _theirs(bed: Bed, length: int, name: str) -> Row:
    model = bed.model()
    bed.release()  # its own cache needs the memory
    ids = bed.setup.prompt(model.tokenizer, length)
    method = huggingface(model, HF_METHODS[name])
    # a static cache is compiled for its length, which the number of new tokens is part of
    method(ids, bed.setup.new if name == "ar-static" else 4)
    run = method(ids, bed.setup.new)
    row = _compared(bed, length, name, run.figures["decode_tokens_per_second"], run.tokens)
    free(bed.setup.device)
    return row | {"ttft_seconds": run.figures["ttft_seconds"], "tau": None}


def _compared(bed: Bed, length: int, name: str, rate: float, tokens: list[int]) -> Row:
    """Return a row with the ratio to plain decoding by our engine, and where the output first differs from its."""
    bed.rates[length, name], bed.tokens[length, name] = rate, tokens
    base, truth = bed.rates.get((length, PLAIN)), bed.tokens.get((length, PLAIN))
    model = bed.model()
    engine, small = model.engine, model.draft.model  # type: ignore[union-attr]
    return {
        "pair": bed.pair.name, "length": length, "method": name, "new": len(tokens), "tokens_per_second": rate,
        "speed_up": rate / base if base else None,
        "differs_at": first_divergence(tokens, truth) if truth is not None else None,
        "backend": engine.backend, "backend_reason": engine.backend_reason, "no_graphs": graph_trouble(engine),
        "draft_no_graphs": graph_trouble(small),
    }  # fmt: skip
