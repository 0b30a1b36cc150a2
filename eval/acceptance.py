"""tau against context length, on nested prompts: the same place and the same continuation, ever more context before it.

The engine walks along the document's own text, so that every method and every context length decodes the very same
tokens. At each round the target verifies the draft's tree; `emitted` counts what the target itself (greedy) would have
taken from it plus its bonus token, `emitted_text` what the document takes. Only then the walk goes on, along the text.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from specx.acceptance import walk
from specx.api import SpeculativeModel
from specx.decoding import decode
from specx.eval.hits import WatchedTarget, hit_rates, mean_hit, policy_of, watched_chunk
from specx.eval.methods import Spec, options_of
from specx.eval.spans import Span
from specx.generation import Generation
from specx.hf_config import logits_processors
from specx.sampling import TokenChooser
from specx.tree import DraftTree

BUCKET = 512  # tokens of a long span that are counted together


class AlongText:
    """A chooser that takes every token from a given text and notes what the target would have taken.

    Args:
        text: Prompt and continuation, int64 [n].
        own: Says what the target would have taken.

    Attributes:
        emitted: One count a round: tokens that the target, greedy, takes from the tree, plus one.
    """

    mode = "text"

    def __init__(self, text: Tensor, own: TokenChooser) -> None:
        self.text, self.own, self.emitted = text, own, list[int]()

    def choose(self, logits: Tensor, tree: DraftTree, ids: Tensor) -> Tensor:
        """Return the text's token after each node; -1 beyond its end."""
        self.emitted.append(len(walk(tree, self.own.choose(logits, tree, ids)).tokens))
        first = len(ids) + 1
        following = self.text[first : first + int(tree.depths.max()) + 1].tolist()
        taken = [following[depth] if depth < len(following) else -1 for depth in tree.depths.tolist()]
        return torch.tensor(taken, device=logits.device)


def measure(
    model: SpeculativeModel, spans: list[Span], contexts: list[int], specs: list[Spec]
) -> Iterator[dict[str, Any]]:
    """Yield a row for every span, context length and method of ours.

    One prefill of the target serves all methods that score the same layer.
    """
    settings = {spec.text: model.settings.override(**options_of(spec)) for spec in specs if spec.drafts}
    default = model.engine.score_layer()
    layers = {
        text: default if each.cache.score_layer is None else each.cache.score_layer for text, each in settings.items()
    }
    for span in spans:
        for context in contexts:
            ids = span.prompt(context).to(model.engine.device)
            for layer in dict.fromkeys(layers.values()):
                taps = model.draft.taps if model.draft else ()
                target = WatchedTarget(model.engine, context + span.length + 256, layer, taps, record=bool(taps))
                for text, each in settings.items():
                    if layers[text] == layer:
                        yield place(span, context, text) | along(model, target, ids, span, each)


def place(span: Span, context: int, method: str) -> dict[str, Any]:
    """Return what a row says of where it was measured."""
    return {
        "measure": "tau", "kind": span.kind, "document": span.document, "position": span.position,
        "recurrence": round(span.recurrence, 4), "context": context, "method": method,
    }  # fmt: skip


def along(model: SpeculativeModel, target: WatchedTarget, ids: Tensor, span: Span, settings: Any) -> dict[str, Any]:
    """Walk along a span after `ids`, its prompt; the same tensor with the same target is prefilled once."""
    text = torch.cat([ids, span.continuation.to(ids.device)])
    settings = settings.override(max_new_tokens=span.length, temperature=0.0)
    processors = logits_processors(model.target, settings.sampling, ids, span.length)
    chooser = AlongText(text, TokenChooser(processors, settings.sampling, model.engine.device))
    target.watch(watched_chunk(settings))
    out = Generation(len(ids), trace=[])
    levels = settings.tree.depth + 2
    steps = decode(model.engine, model.draft, ids, settings, out, lambda _: False, target=target, chooser=chooser)
    starts: list[int] = []  # tokens generated before each round
    for _ in steps:
        starts.append(len(out.tokens))
        if len(out.tokens) + levels > span.length:  # the last trees would be cut to the tokens still wanted
            break
    steps.close()
    own = chooser.emitted[1:]  # the first is the prefill's token
    hits = hit_rates(target.log, out.trace or [], policy_of(model, settings, out.facts["policy"]))
    return {
        "emitted": sum(own), "emitted_text": out.emitted, "steps": len(own), "draft_kv_tokens": out.draft_kv_tokens,
        "policy": out.facts["policy"], "refill": out.facts["refill"], "hit_rate": mean_hit(hits),
        "accepted_histogram": {str(n - 1): own.count(n) for n in sorted(set(own))},
    } | _by_position(starts, own, span.length)  # fmt: skip


def _by_position(starts: list[int], emitted: list[int], length: int) -> dict[str, Any]:
    """Return [emitted, steps] for every `BUCKET` tokens of a long span."""
    if length < 2 * BUCKET:
        return {}
    parts = [[0, 0] for _ in range(-(-length // BUCKET))]
    for start, count in zip(starts, emitted, strict=False):
        parts[start // BUCKET][0] += count
        parts[start // BUCKET][1] += 1
    return {"by_position": parts}
