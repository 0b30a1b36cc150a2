"""What came out of one generation, and what it cost."""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

MODES = ("plain", "lookup", "chain", "tree", "probe")
SOURCES = ("draft", "context", "both", "target")


@dataclass(slots=True)
class Generation:
    """What came out of one generation, and what it cost; grows while it runs.

    Attributes:
        tokens: New token ids, the end-of-text token included where it ended.
        text: Their text, set by `specx.api` where there is a tokenizer.
        finish_reason: "eos", "stop", "length" or, after Ctrl-C or an abandoned stream, "interrupted".
        trace: One record a verification step, if asked for: the tree's tokens, parents (-1: root) and scores, the
            accepted path, where each emitted token came from (`sources`), and the chunks that retrieval chose before
            that step (None: the cache was not rebuilt); with a tokenizer also the text that each of them starts with,
            `kept_texts`.
        decisions: The controller's, in words, each time it turns to another mode, if asked for.
        notes: What differs from what was asked for, and why.
    """

    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = "interrupted"
    trace: list[dict[str, Any]] | None = None
    decisions: list[str] | None = None
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    accepted: Counter[int] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
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
        ttft_seconds. accepted_histogram[n] counts the steps that emitted n drafted tokens; tokens_by_source
        says who proposed them: the draft, the context, both, or nobody (the target's own); divided by the steps they
        add up to tau. rounds_by_mode counts the steps by what drafted: nothing (plain), the context (lookup), the draft
        model and the context (chain, tree), or the draft to see whether it pays (probe).
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
            "tokens_by_source": {source: self.sources[source] for source in SOURCES},
            "rounds_by_mode": {mode: self.modes[mode] for mode in MODES},
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
    """Tokens that one step emitted, and who proposed each of them (`SOURCES`)."""

    tokens: tuple[int, ...]
    sources: tuple[str, ...]

    @property
    def drafted(self) -> int:
        """How many of the tokens anybody but the target proposed; they come first."""
        return len(self.tokens) - self.sources.count("target")
