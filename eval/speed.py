"""Decode speed, time to first token and exactness: all methods on each prompt in turn, in one process."""

import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from specx.api import SpeculativeModel
from specx.eval.chosen import Prompt
from specx.eval.methods import Method, Run, huggingface
from specx.eval.metrics import distinct_ngrams, first_divergence
from specx.eval.quality import judged


def measure(
    model: SpeculativeModel, prompts: list[Prompt], methods: dict[str, Method], new: int
) -> Iterator[dict[str, Any]]:
    """Yield a row for every prompt and method: `warm`, then `one` for each prompt."""
    warm(prompts[0], methods, model)
    for number, prompt in enumerate(prompts):
        yield from one(model, prompt, methods, new, number)


def warm(prompt: Prompt, methods: dict[str, Method], model: SpeculativeModel) -> None:
    """Run every method once on a short prompt: for long enough that what is compiled, and what is measured, is."""
    for method in methods.values():
        method(prompt.ids[-64:].to(model.engine.device), 64)


def one(
    model: SpeculativeModel, prompt: Prompt, methods: dict[str, Method], new: int, turn: int
) -> Iterator[dict[str, Any]]:
    """Yield a row for every method on one prompt; plain greedy decoding by Hugging Face is the truth for exactness.

    On CUDA each run follows one like it that does not count: what is compiled or captured for this length, which
    another method's run may have thrown away, is there again. What the controller knows of texts is put back.

    Where a method fails or is interrupted, the rows of the prompt's earlier ones come first.

    Args:
        turn: The order of the methods turns with it, so that none profits from its place.
    """
    greedy, device = model.settings.sampling.temperature == 0, model.engine.device
    names = list(methods)
    turned = names[turn % len(names) :] + names[: turn % len(names)]
    runs, loads = dict[str, Run](), dict[str, float]()
    truth, failure = None, None
    try:
        for name in turned:
            if device.type == "cuda":
                before = copy.deepcopy(model.experience)
                methods[name](prompt.ids.to(device), new)
                before.costs, model.experience = model.experience.costs, before
            runs[name], loads[name] = methods[name](prompt.ids.to(device), new), os.getloadavg()[0]
        truth = truth_of(model, prompt.ids, new, runs) if greedy else None
    except (Exception, KeyboardInterrupt) as error:
        failure = error
    for name in [name for name in names if name in loads]:
        row = {
            "measure": "speed", "prompt": prompt.name, "context": prompt.context, "tokens": len(prompt.ids),
            "method": name, "load": round(loads[name], 2), "new": len(runs[name].tokens), **runs[name].figures,
            "distinct_4grams": round(distinct_ngrams(runs[name].tokens), 4), **_judged(model, prompt, runs[name]),
        }  # fmt: skip
        yield row | (compared(model, prompt.ids, runs[name].tokens, truth) if truth is not None else {})
    if failure is not None:
        raise failure


def _judged(model: SpeculativeModel, prompt: Prompt, run: Run) -> dict[str, float]:
    if not prompt.answers or model.tokenizer is None:
        return {}
    text = model.tokenizer.decode(run.tokens, skip_special_tokens=True)
    return judged(text, prompt.answers, prompt.score)


def truth_of(model: SpeculativeModel, ids: Tensor, new: int, runs: dict[str, Run]) -> list[int]:
    """Return what the target generates greedily by itself."""
    if "ar" in runs:
        return runs["ar"].tokens
    return huggingface(model, {})(ids.to(model.engine.device), new).tokens


def compared(model: SpeculativeModel, ids: Tensor, ours: list[int], theirs: list[int]) -> dict[str, Any]:
    """Return whether outputs are equal; else where they part, and the target's top-1/top-2 logit margin there."""
    place = first_divergence(ours, theirs)
    if place is None:
        return {"same": True, "divergence": None, "margin": None}
    before = torch.cat([ids, ids.new_tensor(theirs[:place])]).to(model.engine.device)
    with torch.no_grad():
        logits = model.target(before[None], use_cache=False, logits_to_keep=1).logits[0, -1].float()
    best = logits.topk(2).values
    return {"same": False, "divergence": place, "margin": round((best[0] - best[1]).item(), 6)}
