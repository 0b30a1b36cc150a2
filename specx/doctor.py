"""What `specx doctor` says: one line a finding, each with a verdict."""

import math
import platform
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import specx
from specx.adapters.checkpoints import check_files, compare_tokenizers, load_tokenizer
from specx.adapters.classic import ClassicModel
from specx.adapters.eagle_checkpoints import read_head
from specx.adapters.hub import fetch
from specx.adapters.longspec_checkpoints import read_block
from specx.adapters.names import LOOKUP, known_draft, locate
from specx.adapters.weights import kind_of
from specx.api import SpeculativeModel, load
from specx.config import DRAFT_ALONE
from specx.data.prompts import demo_prompt
from specx.hf import HFModel
from specx.hf_config import positions_of

Finding = tuple[str, bool]
_PROBE, _NEW = 384, 48  # tokens of the probe's prompt, and after it
_GUESSING = 0.9  # a loss above this share of a uniform guess's is no knowledge of text


def report(target: str | None, draft: str | None, specextend: bool, options: dict[str, Any]) -> Iterator[Finding]:
    """Yield (line, whether it is fine) from the machine up to a short probe of the pair."""
    yield _line("versions", _versions()), True
    count = torch.cuda.device_count()
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(count)) or "no CUDA"
    yield _line("devices", f"cpu ({torch.get_num_threads()} threads), {names}"), True
    if target is None and draft is not None and known_draft(draft) is None:
        alone = list(_draft_alone(draft))
        yield from alone
        if alone:
            return
    try:
        model = load(target, draft, specextend=specextend, **options)
    except (ValueError, RuntimeError) as error:
        yield _line("load", f"FAILED: {error}"), False
        return
    engine = model.engine
    layers, positions = engine.config.num_hidden_layers, positions_of(engine.config)
    yield (
        _line("target", f"{type(model.target).__name__}, {layers} layers, {engine.dtype}, {positions} positions"),
        True,
    )
    yield _line("backend", f"{engine.backend}: {engine.backend_reason}"), True
    yield _line("self-check", "passed: a tree's logits equal the model's own"), True
    layer = engine.score_layer()
    scored = layer if layer is not None else "none: every layer slides, retrieval becomes window"
    yield _line("score layer", str(scored)), True
    if model.draft is None:
        yield _line("draft", "none: plain decoding"), True
        return
    yield _line("draft", model.draft.name), True
    for line in model.draft.about:
        yield _line("head" if draft != LOOKUP else "", line), True
    if draft != LOOKUP:
        yield _line("context", f"draft_context {model.draft.draft_context}, from {model.draft.context_source}"), True
    yield _line("profile", _profile(model)), not model.profile.ignored
    yield _tokenizers(model, draft or "demo", bool(options.get("trust_remote_code")))
    yield _probe(model)


def _draft_alone(draft: str) -> Iterator[Finding]:
    """Say what a draft that is no model of its own is; nothing where it is one, or is not there."""
    try:
        directory = fetch(locate(draft, "draft"), "draft")
        check_files(directory, "draft")
        kind = kind_of(directory)
        if kind == "classic":
            return
        about = read_head(directory)[0].about() if kind == "eagle" else read_block(directory)[0].about()
    except (ValueError, RuntimeError) as error:
        yield _line("draft", f"FAILED: {error}"), False
        return
    yield _line("draft", draft), True
    for line in about:
        yield _line("head", line), True
    yield _line("target", "not named, and this draft is not among the known names: --target checks the pair"), True


def _line(subject: str, text: str) -> str:
    return f"{subject:<12}{text}"


def _versions() -> str:
    found = [f"specx {specx.__version__}", f"Python {platform.python_version()}"]
    for name in ("torch", "transformers", "triton", "flash-attn", "eagle-llm"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


def _profile(model: SpeculativeModel) -> str:
    """Say what `specx tune` has measured of this pair, and what is chosen by it."""
    costs = model.profile.costs
    if costs is None:
        hint = "" if model.profile.ignored else "; specx tune measures what steps cost here, and trees are chosen by it"
        return model.profile.about + hint
    trees = ", ".join(f"{t.nodes}/{t.depth}/{t.beam} after {n}" for n in costs.contexts for t in [costs.best_tree(n)])
    return f"{model.profile.about}; nodes/depth/beam {trees} tokens"


def _tokenizers(model: SpeculativeModel, draft: str, trust_remote_code: bool) -> Finding:
    if draft == LOOKUP:
        return _line("tokenizers", "not compared: the draft has none"), True
    own = load_tokenizer(fetch(locate(draft, "draft"), "draft"), trust_remote_code)
    if model.tokenizer is None or own is None:
        lacking = "target" if model.tokenizer is None else "draft"
        return _line("tokenizers", f"not compared: the {lacking} brings none"), True
    shared, wrong = compare_tokenizers(model.tokenizer, own)
    return _line("tokenizers", "; ".join(wrong) or f"{shared} shared ids mean the same token"), not wrong


def _probe(model: SpeculativeModel) -> Finding:
    if model.tokenizer is None:
        return _line("probe", "skipped: no tokenizer"), True
    room = (positions_of(model.engine.config) or _PROBE + _NEW) - _NEW
    if room < 1:
        return _line("probe", f"skipped: the target has fewer than {_NEW} positions"), True
    _, ids = demo_prompt(model.tokenizer, min(_PROBE, room))
    alone = DRAFT_ALONE if model.draft and model.draft.name != LOOKUP else {}
    out = model.generate(ids, max_new_tokens=_NEW, **alone)
    tau = out.stats["tau"]
    if tau is None:
        return _line("probe", "the target ended at once; no step was drafted"), True
    if tau > 1.0:
        return _line("probe", f"tau {tau:.2f} over {out.steps} steps"), True
    return _line("probe", f"tau 1.00, no drafted token was accepted: {_mismatch(model, ids)}"), False


def _mismatch(model: SpeculativeModel, ids: list[int]) -> str:
    """Say what does not match: specx and the target, the target or the draft and text, or the two models."""
    itself = ClassicModel("itself", model.engine, model.engine.vocab_size, _PROBE + _NEW, "the probe")
    out = SpeculativeModel(model.engine, itself, None, model.settings).generate(ids, max_new_tokens=_NEW, **DRAFT_ALONE)
    if out.stats["tau"] == 1.0:
        return (
            "and neither when the target drafts for itself. This is a defect of specx with this model or backend: "
            "compare --backend reference, and please report it"
        )
    for role, engine in (("target", model.engine), ("draft", getattr(model.draft, "model", None))):
        if isinstance(engine, HFModel):
            loss, guess = _loss(engine, ids), math.log(engine.vocab_size)
            if not loss <= _GUESSING * guess:
                return (
                    f"the {role} does not know text (loss {loss:.1f}, guessing gives {guess:.1f}). Its weights are "
                    "random or damaged, do not belong to its config.json, or its tokenizer is another model's"
                )
    return (
        "target and draft each know text, but never agree. The draft was made for another target or for another chat "
        "template, or its ids mean other tokens"
    )


def _loss(engine: HFModel, ids: list[int]) -> float:
    """Return a model's mean loss on the probe's text in nats a token, by its own plain forward."""
    tokens: Tensor = torch.tensor(ids, device=engine.device).clamp(max=engine.vocab_size - 1)
    with torch.no_grad():
        logits = engine.model(input_ids=tokens[None], use_cache=False).logits[0].float()
    return F.cross_entropy(logits[:-1], tokens[1:].to(logits.device)).item()
