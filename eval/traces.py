"""One generation a length and method to look at: which tokens the draft proposed, which chunks retrieval kept when.

These runs are not timed.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from specx.api import SpeculativeModel
from specx.config import Settings
from specx.decoding import decode
from specx.eval.chosen import Prompt
from specx.eval.hits import WatchedTarget, hit_rates, mean_hit, policy_of, watched_chunk
from specx.eval.methods import Spec, options_of
from specx.generation import Generation
from specx.text import TextStream

SHOWN = 600  # characters of the prompt's end that are shown before a generation


def measure(model: SpeculativeModel, prompt: Prompt, specs: list[Spec], new: int) -> Iterator[dict[str, Any]]:
    """Yield a row for every method with a draft cache; one prefill of the target serves those of one score layer."""
    ids = prompt.ids.to(model.engine.device)
    default, targets = model.engine.score_layer(), dict[int | None, WatchedTarget]()
    taps = model.draft.taps if model.draft else ()
    for spec in specs:
        if spec.drafts:
            settings = model.settings.override(**options_of(spec), max_new_tokens=new)
            layer = default if settings.cache.score_layer is None else settings.cache.score_layer
            if layer not in targets:
                targets[layer] = WatchedTarget(model.engine, len(ids) + new + 256, layer, taps, record=bool(taps))
            place = {"measure": "trace", "prompt": prompt.name, "context": prompt.context, "method": spec.text}
            yield place | {"tokens": len(ids)} | _traced(model, targets[layer], ids, settings)


def _traced(model: SpeculativeModel, target: WatchedTarget, ids: Tensor, settings: Settings) -> dict[str, Any]:
    target.watch(watched_chunk(settings))
    out, stream = Generation(len(ids), trace=[]), TextStream(model.tokenizer) if model.tokenizer else None
    pieces: list[list[tuple[str, bool]]] = []
    for piece in decode(model.engine, model.draft, ids, settings, out, lambda _: False, target=target):
        texts = [stream.push(token) if stream else f" {token}" for token in piece.tokens]
        pieces.append([(text, number < piece.drafted) for number, text in enumerate(texts)])
    if stream:
        pieces.append([(stream.flush(), False)])
    trace = out.trace or []
    kept = [(step, record["kept_chunks"]) for step, record in enumerate(trace) if record["kept_chunks"] is not None]
    policy = policy_of(model, settings, out.facts["policy"])
    rates = hit_rates(target.log, trace, policy) if target.chunk_size else []
    shown = model.tokenizer.decode(ids[-SHOWN:].tolist())[-SHOWN:] if model.tokenizer else ""
    return {
        "policy": out.facts["policy"], "chunk_size": policy.chunk_size, "sinks": policy.sinks, "recent": policy.recent,
        "prompt_end": shown, "pieces": pieces, "emitted": [len(record["path"]) for record in trace], "kept": kept,
        "hits": [None if rate is None else round(rate, 4) for rate in rates], "hit_rate": mean_hit(rates),
    }  # fmt: skip
