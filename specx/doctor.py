"""What `specx doctor` says: one line a finding, each with a verdict."""

import platform
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch

import specx
from specx.adapters.checkpoints import compare_tokenizers, load_tokenizer
from specx.adapters.names import locate
from specx.api import SpeculativeModel, load
from specx.data import stdlib

Finding = tuple[str, bool]


def report(target: str | None, draft: str | None, specextend: bool, options: dict[str, Any]) -> Iterator[Finding]:
    """Yield (line, whether it is fine) from the machine up to a short probe of the pair."""
    yield _versions(), True
    count = torch.cuda.device_count()
    yield f"devices     cpu ({torch.get_num_threads()} threads)" + (f", {count} CUDA" if count else ", no CUDA"), True
    try:
        model = load(target, draft, specextend=specextend, **options)
    except (ValueError, RuntimeError) as error:
        yield f"load        FAILED: {error}", False
        return
    engine = model.engine
    yield f"target      {type(model.target).__name__}, {engine.config.num_hidden_layers} layers, {engine.dtype}", True
    yield f"backend     {engine.backend}: {engine.backend_reason}", True
    yield "self-check  passed: a tree's logits equal the model's own", True
    layer = engine.score_layer()
    yield f"score layer {layer if layer is not None else 'none: every layer slides, retrieval becomes window'}", True
    if model.draft is None:
        yield "draft       none: plain decoding", True
        return
    yield f"draft       {model.draft.name}", True
    yield f"context     draft_context {model.draft.draft_context}, from {model.draft.context_source}", True
    yield from _tokenizers(model, draft)
    yield from _probe(model)


def _versions() -> str:
    names = ("torch", "transformers", "triton", "flash-attn", "eagle-llm")
    found = []
    for name in names:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    return f"versions    specx {specx.__version__}, Python {platform.python_version()}, {', '.join(found)}"


def _tokenizers(model: SpeculativeModel, draft: str | None) -> Iterator[Finding]:
    own = load_tokenizer(locate(draft or "demo", "draft"))
    if model.tokenizer is None or own is None:
        yield (
            "tokenizers  not compared: " + ("the target" if model.tokenizer is None else "the draft") + " brings none",
            True,
        )
        return
    shared, wrong = compare_tokenizers(model.tokenizer, own)
    yield (
        f"tokenizers  {shared} shared ids mean the same token" if not wrong else f"tokenizers  {'; '.join(wrong)}",
        not wrong,
    )


def _probe(model: SpeculativeModel) -> Iterator[Finding]:
    if model.tokenizer is None:
        yield "probe       skipped: no tokenizer", True
        return
    text = stdlib.held_out_files()[0][1].read_text(encoding="utf-8")[:1500]
    out = model.generate(text, max_new_tokens=48)
    tau = out.stats["tau"]
    if tau is None:
        yield "probe       the target ended at once; no step was drafted", True
    elif tau == 1.0:
        yield (
            "probe       tau 1.00: the draft never agrees with the target. Most likely it was made for another target "
            "or chat template, or its weights are not what its config says",
            False,
        )
    else:
        yield f"probe       tau {tau:.2f} over {out.steps} steps", True
