"""What is measured of several drafts of one target: tau, work, speed and the bytes of their caches."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from specx.eval.methods import Method, Spec, build, options_of, parse_methods  # first: it sets HF's best setting

# isort: split
from torch import Tensor

from specx.adapters.classic import ClassicModel
from specx.adapters.eagle import EagleModel
from specx.adapters.hub import fetch
from specx.adapters.loader import load_draft
from specx.adapters.longspec import LongSpecModel
from specx.adapters.names import locate
from specx.api import SpeculativeModel
from specx.config import LoadConfig
from specx.decoding import decode
from specx.draft import DraftModel
from specx.eval import acceptance, speed
from specx.eval.bench_step import cache_bytes
from specx.eval.chosen import Prompt
from specx.eval.hits import WatchedTarget
from specx.eval.spans import Span
from specx.generation import Generation

Row = dict[str, Any]
_SPARE = 256  # rows of the target's cache for trees


@dataclass(frozen=True, slots=True)
class Entry:
    """A draft with a method; `label` stands for both in rows and tables."""

    label: str
    model: SpeculativeModel
    spec: Spec

    @property
    def forwards(self) -> int:
        """Forwards of the draft for one tree: the root's, and one a level that is expanded."""
        tree = self.model.settings.override(**self.spec.options).tree
        return 1 + min(tree.depth, tree.nodes - 2)


def parse_entry(text: str) -> tuple[str, str, Spec]:
    """Read [LABEL=]DRAFT,METHOD as (label, draft, method).

    Raises:
        ValueError: If it is none, or the method no policy.
    """
    draft, comma, method = text.partition(",")
    label, equals, given = draft.partition("=")
    draft = given if equals else draft
    if not comma or not draft or not label:
        raise ValueError(f"an entry is [LABEL=]DRAFT,METHOD, such as demo-eagle3,full; got {text!r}")
    specs = parse_methods(method)
    if len(specs) > 1 or not specs[0].drafts:
        raise ValueError(f"entry {text!r} needs one method with a draft: full, window, retrieval or auto")
    return label if equals else f"{draft} {method}", draft, specs[0]


def entries_of(texts: Sequence[str], target: SpeculativeModel) -> list[Entry]:
    """Load the drafts, each once, for a target.

    Raises:
        ValueError: An entry that is none, a draft that is unknown or does not fit, a label twice.
    """
    parsed = [parse_entry(text) for text in texts]
    labels = [label for label, _, _ in parsed]
    if len(set(labels)) < len(labels):
        raise ValueError(f"a label is given twice: {', '.join(labels)}")
    config = LoadConfig(device=str(target.engine.device))
    drafts = {
        name: load_draft(name, fetch(locate(name, "draft"), "draft"), target.engine, None, config)
        for name in dict.fromkeys(draft for _, draft, _ in parsed)
    }
    return [
        Entry(label, SpeculativeModel(target.engine, drafts[draft], target.tokenizer, target.settings), spec)
        for label, draft, spec in parsed
    ]


def token_bytes(draft: DraftModel) -> int:
    """Return the bytes of keys and values that a draft's own cache holds for a token.

    Raises:
        ValueError: A draft that has no such cache.
    """
    if isinstance(draft, ClassicModel):
        return cache_bytes(draft.model.config, 1, draft.model.dtype)
    if isinstance(draft, EagleModel):
        head = draft.head.head
        return 2 * head.layers * head.kv_heads * head.head_dim * draft.head.fc.weight.dtype.itemsize
    if isinstance(draft, LongSpecModel):
        weight: Any = draft.block.self_attn["k_proj"].weight
        return 2 * int(weight.shape[0]) * weight.dtype.itemsize
    raise ValueError(f"draft {draft.name} has no keys and values of its own")


def taus(entries: Sequence[Entry], spans: list[Span], contexts: list[int]) -> Iterator[Row]:
    """Yield a row for every span, context and entry."""
    for span in spans:
        for context in contexts:
            ids, target = _prompted(entries, span.prompt(context), span.length)
            for each in entries:
                settings = each.model.settings.override(**options_of(each.spec))
                found = acceptance.along(each.model, target, ids, span, settings)
                yield acceptance.place(span, context, each.label) | found


def _prompted(entries: Sequence[Entry], prompt: Tensor, new: int) -> tuple[Tensor, WatchedTarget]:
    """Return a prompt on the target's device, and a target that all entries can share after it."""
    engine = entries[0].model.engine
    taps = tuple(dict.fromkeys(tap for each in entries for tap in (each.model.draft.taps if each.model.draft else ())))
    target = WatchedTarget(engine, len(prompt) + new + _SPARE, engine.score_layer(), taps, record=True)
    return prompt.to(engine.device), target


class WorkedGeneration(Generation):
    """Counts the time that this thread worked, not the time that went by."""

    @contextmanager
    def clock(self, part: str) -> Iterator[None]:
        """Add the seconds of work inside to `part`."""
        began = time.thread_time()
        try:
            yield
        finally:
            self.seconds[part] += time.thread_time() - began


def worked(entries: Sequence[Entry], prompts: list[Prompt], new: int) -> Iterator[Row]:
    """Yield a row for every prompt and entry: milliseconds of one thread's work in a forward of the draft."""
    for prompt in prompts:
        ids, target = _prompted(entries, prompt.ids, new)
        for each in entries:
            assert each.model.draft is not None
            settings = each.model.settings.override(max_new_tokens=new, temperature=0.0, **options_of(each.spec))
            for _ in range(2):  # the first one warms up
                out = WorkedGeneration(len(ids))
                steps = decode(each.model.engine, each.model.draft, ids, settings, out, lambda _: False, target=target)
                for _ in steps:
                    pass
            yield {
                "measure": "cpu", "prompt": prompt.name, "context": prompt.context, "method": each.label,
                "steps": out.steps, "draft_kv_tokens": out.draft_kv_tokens,
                "draft_kv_bytes": out.draft_kv_tokens * token_bytes(each.model.draft),
                "ms_forward": 1000 * out.seconds["draft"] / max(1, out.steps) / each.forwards,
                "ms_verify": 1000 * out.seconds["verify"] / max(1, out.steps),
            }  # fmt: skip


def speeds(entries: Sequence[Entry], prompts: list[Prompt], new: int) -> Iterator[Row]:
    """Yield a row for every prompt and entry, and two for plain decoding, one a cache."""
    methods: dict[str, Method] = build(parse_methods("ar"), entries[0].model)
    methods |= {each.label: build([each.spec], each.model)[each.spec.text] for each in entries}
    by_label = {each.label: each for each in entries}
    for row in speed.measure(entries[0].model, prompts, methods, new):
        each = by_label.get(row["method"])
        if each is None or not row["steps"]:
            yield row
            continue
        assert each.model.draft is not None
        yield row | {
            "draft_kv_bytes": row["draft_kv_tokens"] * token_bytes(each.model.draft),
            "ms_forward": row["ms_draft"] / row["steps"] / each.forwards,
        }
