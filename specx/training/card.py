"""What a trained pair can do, on text it never saw: the numbers of the model cards."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from specx.data import stdlib

SPAN = 512


def held_out_spans(tokenizer: Any, context: int, per_file: int = 2) -> list[Tensor]:
    """Return spans of 512 tokens with `context` tokens before them, int64 [context + 512], spread over each file."""
    spans = []
    for _, path in stdlib.held_out_files():
        ids = tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"]
        last = len(ids) - SPAN
        if last < context:
            continue
        for end in np.linspace(context, last, per_file).astype(int):
            spans.append(torch.tensor(ids[end - context : end + SPAN]))
    return spans


@torch.no_grad()
def span_loss(model: PreTrainedModel, window: Tensor) -> float:
    """Return the mean loss in nats of the last 512 tokens of `window`, int64 [n + 512]."""
    keep = min(SPAN, len(window) - 1)
    logits = model(input_ids=window[None, :-1], use_cache=False, logits_to_keep=keep).logits[0]
    return F.cross_entropy(logits.float(), window[-keep:]).item()


def loss_by_context(model: PreTrainedModel, spans: list[Tensor], contexts: list[int]) -> dict[int, float]:
    """Return the loss on the same spans behind ever more of what precedes them."""
    return {
        context: float(np.mean([span_loss(model, span[len(span) - SPAN - context :]) for span in spans]))
        for context in contexts
    }


@torch.no_grad()
def copy_accuracy(model: PreTrainedModel, spans: list[Tensor], length: int = 64, distance: int = 256) -> float:
    """Return how often the model's first guess is right inside the second copy of a span, `distance` tokens later."""
    right = []
    for span in spans:
        ids = span[-SPAN:].clone()
        ids[distance : distance + length] = ids[:length]
        guesses = model(input_ids=ids[None, : distance + length], use_cache=False).logits[0].argmax(-1)
        again = slice(distance + 8, distance + length)  # the first tokens cannot know yet that a copy has begun
        right.append((guesses[distance + 7 : distance + length - 1] == ids[again]).float().mean().item())
    return float(np.mean(right))


def card(name: str, model: PreTrainedModel, tokenizer: Any, runs: list[dict[str, Any]], command: str) -> str:
    """Return the model card in Markdown, measured now.

    Args:
        name: "target" or "draft".
        runs: The recipes, in the order in which they were trained.
        command: That made it.
    """
    far = 12288 if name == "target" else 4096
    spans = held_out_spans(tokenizer, far)
    contexts = [c for c in (0, 512, 1536, 4096, 12288) if c <= far]
    losses = loss_by_context(model, spans, contexts)
    rows = "\n".join(f"| {context} | {loss:.3f} |" for context, loss in losses.items())
    tokens = sum(run["tokens"] + run["long_tail"] * run["long_length"] for run in runs)
    shape = ", ".join(f"{key} {value}" for key, value in runs[0]["model"].items())
    return f"""---
license: apache-2.0
---
# specx demo-{name}

A small Llama ({sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters) that ships with specx so that it can
be tried without a download. It completes Python; it knows nothing else.

- Data: the standard library of Python 3.11 (PSF licence), {tokens:,} tokens drawn from it, without the
  modules of `specx.data.stdlib.HELD_OUT` and their tests.
- Command: `{command}`
- Shape: {shape}
- Licence: Apache-2.0.

Loss in nats a token on the same {len(spans)} held-out spans of 512 tokens, by the tokens of context before them (bf16):

| context | loss |
|---|---|
{rows}

First guess right inside the second copy of a 64-token span, 256 tokens later: {copy_accuracy(model, spans):.2f}
"""
