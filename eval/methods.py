"""The methods that are compared: Hugging Face's own with the best settings they have, and specx under each policy.

A method is written NAME[:option=value ...], for example `retrieval:recent=256:refill=gather`; the options are those of
the draft's cache and tree. `all` is every one, with the ablation of ours. `ar` is Hugging Face's plain decoding, with
its dynamic and with its static cache: the faster one counts.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

if not torch.cuda.is_available():  # there, with a mask, it means torch's slowest kernel
    os.environ.setdefault("TRANSFORMERS_SDPA_FORCE_GQA", "1")  # HF's best setting on a CPU; read when it loads

from transformers.generation.streamers import BaseStreamer

from specx.adapters.lookup import LookupModel
from specx.api import SpeculativeModel
from specx.config import DRAFT_ALONE, CacheConfig, RoundConfig, TreeConfig, nearest

HF_METHODS: dict[str, dict[str, Any]] = {
    "ar": {},
    "ar-static": {"cache_implementation": "static"},
    "hf-assisted": {},
    "hf-lookup": {"prompt_lookup_num_tokens": 8},
}
POLICIES = ("full", "window", "retrieval", "auto")
# Ordinary tree speculation, and the three parts of ours each alone: (policy, hybrid attention, flash prefill). `full`
# has both kinds of attention without retrieval, `auto` all three.
ABLATION = {
    "tree": ("full", False, False),
    "tree+flash": ("full", False, True),
    "tree+hybrid": ("full", True, False),
    "tree+retrieval": ("auto", False, False),
}
KNOWN = ("ar", "hf-assisted", "hf-lookup", "plain", "lookup", *ABLATION, *POLICIES, "specx")
ALL = "all"
# What a method may set for itself; sampling and length are the same for all, or outputs could not be compared.
OPTIONS = tuple(
    each.name for config in (CacheConfig, TreeConfig, RoundConfig) for each in fields(config) if each.name != "policy"
)

# A policy by itself is the draft alone with its whole tree in every round; options add to it. specx is what a user
# gets: the context drafts as well, and the controller chooses. lookup is the context alone, in every round.
_HOW: dict[str, dict[str, Any]] = {
    **{name: {"policy": name} | DRAFT_ALONE for name in POLICIES},
    **{name: {"policy": part[0]} | DRAFT_ALONE for name, part in ABLATION.items()},
    "plain": {"plain": True},
    "lookup": {"lookup": True, "controller": "off"},
    "specx": {"lookup": True, "controller": "auto"},
}


@dataclass(frozen=True, slots=True)
class Run:
    """One generation: its tokens, and the figures of `Generation.stats` that exist for it."""

    tokens: list[int]
    figures: dict[str, Any]


Method = Callable[[Tensor, int], Run]


@dataclass(frozen=True, slots=True)
class Spec:
    """A method as the user wrote it: a name of `KNOWN`, and options of specx."""

    text: str
    name: str
    options: dict[str, Any]

    @property
    def ours(self) -> bool:
        """Whether specx runs it."""
        return self.name not in HF_METHODS

    @property
    def drafts(self) -> bool:
        """Whether it has a draft cache of ours, and so a policy; tau of the ablation's methods is their policy's."""
        return self.name in POLICIES

    @property
    def takes_options(self) -> bool:
        """Whether its tree and cache can be set."""
        return self.name in (*POLICIES, *ABLATION, "specx")


def parse_methods(text: str) -> list[Spec]:
    """Read a comma-separated list of methods; "all" is every known one.

    Raises:
        ValueError: An unknown name, an option that is none, or a method twice.
    """
    parts = KNOWN if text.strip() == ALL else text.split(",")
    specs = [_parse(part.strip()) for part in parts if part.strip()]
    if not specs:
        raise ValueError(f"no method given; known: {', '.join(KNOWN)}")
    for number, spec in enumerate(specs):
        if (spec.name, spec.options) in [(other.name, other.options) for other in specs[:number]]:
            raise ValueError(f"method {spec.text} is given twice")
    return specs


def _parse(text: str) -> Spec:
    name, *parts = text.split(":")
    if name not in KNOWN:
        raise ValueError(f"unknown method {name!r}{nearest(name, list(KNOWN))} Known: {', '.join(KNOWN)}, or all")
    if parts and name not in (*POLICIES, *ABLATION, "specx"):
        raise ValueError(f"method {name!r} takes no options; {', '.join(POLICIES)} and specx do")
    options: dict[str, Any] = {}
    for part in parts:
        key, equals, value = (each.strip() for each in part.partition("="))
        key = key.replace("-", "_")
        if not equals:
            raise ValueError(f"method {text!r}: options are written name=value, separated by colons; got {part!r}")
        if key not in OPTIONS:
            close = nearest(key, list(OPTIONS))
            raise ValueError(f"method {text!r} has no option {key!r}{close} It may set: {', '.join(OPTIONS)}")
        if key in options:
            raise ValueError(f"method {text!r} sets {key} twice")
        options[key] = _value(value)
    return Spec(text, name, options)


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return None if text == "none" else text


def check_draft(specs: list[Spec], given: bool) -> None:
    """Raise ValueError if a method needs a draft and none is given."""
    needy = [spec.text for spec in specs if spec.takes_options or spec.name == "hf-assisted"]
    if needy and not given:
        raise ValueError(f"method {needy[0]} needs a draft: give --draft, or only ar, hf-lookup, plain and lookup")


def fitting(specs: list[Spec], model: SpeculativeModel) -> list[Spec]:
    """Return those methods that these models can run: without a draft the plain ones, and hf-assisted with an LM."""
    own = model.draft is not None
    assists = own and hasattr(model.draft, "model")
    return [each for each in specs if assists or each.name != "hf-assisted" if own or not each.takes_options]


def build(specs: list[Spec], model: SpeculativeModel) -> dict[str, Method]:
    """Return a function for every method; `ar` gives two, one a cache.

    Raises:
        ValueError: If a method needs a draft and there is none, or an option has no such value.
    """
    check_draft(specs, model.draft is not None)
    methods: dict[str, Method] = {}
    for spec in specs:
        if spec.ours:
            methods[spec.text] = _specx(model, spec)
            continue
        for name in ("ar", "ar-static") if spec.name == "ar" else (spec.name,):
            methods[name] = huggingface(model, HF_METHODS[name], _small(model) if name == "hf-assisted" else None)
    return methods


def options_of(spec: Spec) -> dict[str, Any]:
    """Return what `generate` takes to run a method of ours."""
    return _HOW[spec.name] | spec.options


def _small(model: SpeculativeModel) -> Any:
    """Return the draft as a Hugging Face model of its own."""
    small = getattr(model.draft, "model", None)
    if small is None:
        raise ValueError("method hf-assisted needs a draft that is a language model by itself; leave it out")
    return small.model


def _specx(model: SpeculativeModel, spec: Spec) -> Method:
    options = options_of(spec)
    if spec.name == "lookup":
        model = SpeculativeModel(model.engine, LookupModel(), model.tokenizer, model.settings)
    try:
        model.settings.override(**spec.options)
    except ValueError as error:
        raise ValueError(f"method {spec.text}: {error}") from error

    if spec.name in ABLATION:
        _, hybrid, flash = ABLATION[spec.name]
        engine = model.engine.with_parts(hybrid, flash)
        model = SpeculativeModel(engine, model.draft, model.tokenizer, model.settings)

    def run(ids: Tensor, new: int) -> Run:
        out = model.generate(ids, max_new_tokens=new, **options)
        stats = out.stats
        return Run(out.tokens, {key: stats[key] for key in FIGURES} | {"emitted": out.emitted})

    return run


FIGURES = (
    "steps", "accepted_histogram", "ttft_seconds", "decode_seconds", "decode_tokens_per_second", "ms_draft",
    "ms_verify", "ms_retrieval", "ms_other", "draft_kv_tokens", "policy", "refill",
    "tokens_by_source", "rounds_by_mode",
)  # fmt: skip


class Stopwatch(BaseStreamer):
    """Notes when the first new tokens came, and how many tokens came after them."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.first = self.last = 0.0
        self.after = self.puts = 0

    def put(self, value: Tensor) -> None:
        """Take the prompt, then the tokens of each step."""
        self.last = time.perf_counter()
        if self.puts == 1:
            self.first = self.last
        elif self.puts > 1:
            self.after += value.numel()
        self.puts += 1

    def end(self) -> None:
        """Nothing to flush."""


def huggingface(model: SpeculativeModel, options: dict[str, Any], draft: Any = None) -> Method:
    """Return a method that runs `model.generate` of transformers."""
    sampling = model.settings.sampling
    how: dict[str, Any] = {"do_sample": False}
    if sampling.temperature:
        how = {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k or 0}
        how["top_p"] = 1.0 if sampling.top_p is None else sampling.top_p
    if sampling.repetition_penalty is not None:
        how["repetition_penalty"] = sampling.repetition_penalty
    if draft is not None:
        how["assistant_model"] = draft

    def run(ids: Tensor, new: int) -> Run:
        torch.manual_seed(sampling.seed)
        watch = Stopwatch()
        tokens = model.target.generate(
            ids[None], max_new_tokens=new, streamer=watch, attention_mask=torch.ones_like(ids)[None], **how, **options
        )
        elapsed = watch.last - watch.first
        rate = watch.after / elapsed if watch.after else None
        figures = {
            "ttft_seconds": watch.first - watch.began,
            "decode_seconds": elapsed,
            "decode_tokens_per_second": rate,
        }
        return Run(tokens[0, len(ids) :].tolist(), figures)

    return run
