"""What `specx tune` measures: the draft in the loop itself, and verifications of several sizes, at a few contexts."""

import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from itertools import accumulate
from typing import Any

from torch import Tensor

from specx.api import SpeculativeModel
from specx.config import DRAFT_ALONE
from specx.costs import Costs
from specx.cuda import synchronize
from specx.data.prompts import held_out_prompt
from specx.decoding import decode
from specx.eval.bench_step import MOST_NODES, SyncedGeneration, binary_tree, context_of
from specx.hf_config import positions_of
from specx.target import Target

NODES = (1, 2, 8, 16, 32, MOST_NODES)  # 2, because the step from one row to several is a large one
BUSY = 0.5  # load average a core above which timings are not to be trusted
_NEW = 192  # tokens that the loop may generate while it is measured
_WARM = 2  # rounds that are not counted
_TEXTS, _TEXT, _TEXT_NEW = 6, 512, 64  # texts that tau is measured on, tokens of each, and tokens after it
_SPARE = _NEW + MOST_NODES


def fitting(model: SpeculativeModel, contexts: list[int]) -> tuple[list[int], list[str]]:
    """Return the contexts that the target has positions for, and in words what is left out or shortened.

    Raises:
        ValueError: If it has them for none.
    """
    most = positions_of(model.engine.config)
    if most is None:
        return contexts, []
    room, kept, notes = most - _SPARE, set[int](), list[str]()
    for context in contexts:
        if context > most:
            notes.append(f"a context of {context} tokens is left out: the target has {most} positions")
        elif context > room > 0:
            notes.append(f"instead of {context} tokens of context {room} are measured: steps need positions as well")
        if context <= most and room > 0:
            kept.add(min(context, room))
    if not kept:
        advice = f"give --contexts of at most {room} tokens" if room > 0 else f"measuring takes more than {_SPARE}"
        raise ValueError(f"no context fits the target's {most} positions: {advice}")
    return sorted(kept), notes


class CostBench:
    """A target and its draft, measured with the tree of the model's settings.

    Args:
        model: With a draft of any kind.
        contexts: Tokens before the measured steps, ascending, all `fitting`.
        repeats: Measurements a median is taken of.

    Attributes:
        pieces: How often `measure` reports that something is done.

    Raises:
        ValueError: If there is no draft.
    """

    def __init__(self, model: SpeculativeModel, contexts: list[int], repeats: int) -> None:
        if model.draft is None:
            raise ValueError("without a draft there is nothing to choose: give --draft")
        self.model, self.contexts, self.repeats = model, contexts, repeats
        self.pieces = 1 + len(contexts) * (1 + _WARM + repeats)
        self.device = model.engine.device
        self._drafting: dict[int, list[float]] = {}
        self._resting: list[float] = []

    def measure(self, did: Callable[[], Any]) -> Costs:
        """Measure everything.

        Raises:
            RuntimeError: If the target ends its text before a single round.
        """
        ids = context_of(self.model, self.contexts[-1])
        engine, taps = self.model.engine, tuple(self.model.draft.taps) if self.model.draft else ()
        target = Target(engine, len(ids) + _SPARE, engine.score_layer(), taps)
        shape = self.model.settings.tree
        tau = self._tau()
        did()
        for context in self.contexts:
            self._decode(target, ids[:context])
            did()
        times = self._verify(target, int(ids[0]), did)
        verify = [[statistics.median(times[context, nodes]) for nodes in NODES] for context in self.contexts]
        level = [statistics.median(self._drafting[each]) / (shape.depth + 1) for each in self.contexts]
        return Costs(
            contexts=tuple(self.contexts),
            nodes=NODES,
            verify=rising(verify),
            level=tuple(accumulate(reversed(level), min))[::-1],
            beam=shape.beam,
            rest=statistics.median(self._resting),
            tau=tau,
            tree=(shape.nodes, shape.depth, shape.beam),
        )

    def _tau(self) -> float | None:
        """Return the tokens a round after the beginnings of several held-out texts; None without a tokenizer."""
        emitted = steps = 0
        for number in range(_TEXTS if self.model.tokenizer is not None else 0):
            try:
                ids = held_out_prompt(self.model.tokenizer, min(_TEXT, self.contexts[0]), number)
            except RuntimeError:  # no more of them
                break
            out = self.model.generate(ids, max_new_tokens=_TEXT_NEW, temperature=0.0, **DRAFT_ALONE)
            emitted, steps = emitted + out.emitted, steps + out.steps
        return emitted / steps if steps else None

    def _decode(self, target: Target, ids: Tensor) -> None:
        """Take the times of the loop's rounds after `ids`."""
        settings = self.model.settings.override(max_new_tokens=_NEW, temperature=0.0, **DRAFT_ALONE)
        out = SyncedGeneration(len(ids))
        rounds: list[tuple[float, float]] = []
        before = 0.0, 0.0
        with closing(
            decode(self.model.engine, self.model.draft, ids, settings, out, lambda _: False, target=target)
        ) as steps:
            for _ in steps:
                done = out.seconds["draft"], out.seconds["decode"] - out.seconds["draft"] - out.seconds["verify"]
                if out.steps:  # the first piece is the prefill's
                    rounds.append((done[0] - before[0], done[1] - before[1]))
                before = done
                if len(rounds) == _WARM + self.repeats:
                    break
        if not rounds:
            raise RuntimeError(f"the target ends its text after {len(ids)} tokens at once: no round can be measured")
        counted = rounds[_WARM:] or rounds
        self._drafting[len(ids)] = [1000 * drafting for drafting, _ in counted]
        self._resting += [1000 * max(0.0, rest) for _, rest in counted]

    def _verify(self, target: Target, token: int, did: Callable[[], Any]) -> dict[tuple[int, int], list[float]]:
        """Verify trees of all sizes behind all contexts in turn: a busy moment of the machine hits them alike."""
        longest, times = self.contexts[-1], defaultdict(list)
        trees = {nodes: binary_tree(nodes, token, self.device) for nodes in NODES}
        for number in range(_WARM + self.repeats):
            for context in self.contexts:
                for nodes, tree in trees.items():
                    target.cache.truncate(0)
                    target.cache.extend(context)  # what was written there stays there; what it says takes no time
                    synchronize(self.device)
                    began = time.perf_counter()
                    target.verify(tree)
                    synchronize(self.device)
                    if number >= _WARM:
                        times[context, nodes].append(1000 * (time.perf_counter() - began))
                did()
        target.cache.truncate(0)
        target.cache.extend(longest)
        return times


def rising(times: list[list[float]]) -> tuple[tuple[float, ...], ...]:
    """Return times that fall along neither axis: what took longer than something larger was held up.

    Args:
        times: By context, then by nodes, both ascending.
    """
    rows = [tuple(accumulate(reversed(row), min))[::-1] for row in times]
    smallest = accumulate(reversed(rows), lambda longer, row: tuple(map(min, longer, row)))
    return tuple(smallest)[::-1]


def busy() -> str:
    """Return a warning if others use this machine, or nothing."""
    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    return f"load average {load:.1f} on {cores} cores: timings will be off" if load > BUSY * cores else ""
