"""Retrofitting a live `EaModel`: its own calls, now through specx; and back.

Only two names in the object's `__dict__` change: `eagenerate` and `ea_generate`. `naivegenerate` and `naive_generate`
stay the object's own. Differences from EAGLE's calls, all on purpose: the output ends at max_new_tokens and at the end
of text, not a few tokens later; without `max_length` the target's positions are the limit, not 2048; with temperature
the tokens have exactly the target's distribution.
"""

import logging
from dataclasses import fields
from typing import Any, Self

from specx.adapters.eagle import EagleModel
from specx.adapters.live import check_live, ignored_rotation, live_head, shared_target
from specx.adapters.loader import build_eagle
from specx.adapters.retrofit_calls import Calls, OfficialCalls, ReleasedCalls
from specx.config import CacheConfig, RoundConfig, Settings, TreeConfig, nearest
from specx.generation import Generation
from specx.hf import HFModel

_ENGINE = ("backend", "hybrid_attention", "flash_prefill", "pack_weights", "graphs")
_REPLACED = ("eagenerate", "ea_generate")


def retrofit(ea_model: Any, specextend: bool = True, **options: Any) -> "Retrofit":
    """Let a live `EaModel` generate through specx until the returned handle's `remove`.

    Weights are shared and nothing is read from disk. Do not move or cast the object meanwhile: remove first.

    Args:
        ea_model: Of the released `eagle-llm` or shaped like the one of EAGLE's repository (EAGLE-1, 2 or 3).
        specextend: Hybrid tree attention and a bounded draft cache; False is ordinary tree speculation.
        options: Of the draft's cache and tree (`specx.config`), and backend, hybrid_attention, flash_prefill,
            pack_weights (off: it copies), graphs. The tree's size is the object's own unless given.

    Raises:
        ValueError: No EaModel, one already retrofitted, on several devices, or whose target cannot be enhanced.
        RuntimeError: A head that specx does not know.
    """
    check_live(ea_model)
    if isinstance(getattr(vars(ea_model).get("eagenerate"), "__self__", None), Calls):
        raise ValueError("this EaModel is already retrofitted; call its handle's remove() first")
    own = {name: options.pop(name) for name in _ENGINE if name in options}
    known = [each.name for config in (CacheConfig, TreeConfig, RoundConfig) for each in fields(config)]
    for name in options:
        if name not in known:
            close = nearest(name, [*known, *_ENGINE])
            raise ValueError(f"retrofit takes no option {name!r}{close} Known: {', '.join([*known, *_ENGINE])}.")
    settings = Settings(use_specextend=specextend).override(**options)
    engine = HFModel(
        shared_target(ea_model.base_model),
        own.get("backend", "auto"),
        own.get("hybrid_attention", specextend),
        own.get("flash_prefill", specextend),
        own.get("pack_weights", False),
        own.get("graphs"),
    )
    draft = build_eagle("the live head", *live_head(ea_model.ea_layer), engine, settings.cache.draft_context)
    kind = OfficialCalls if hasattr(ea_model, "use_eagle3") else ReleasedCalls
    return Retrofit(ea_model, engine, draft, kind(ea_model, engine, draft, settings, frozenset(options)))


class Retrofit:
    """A handle on a retrofitted object; as a context manager it removes itself at the end.

    Attributes:
        ea_model: The object.
        engine, draft: What generates now.
        notes: What the object itself computes differently, in words.
    """

    def __init__(self, ea_model: Any, engine: HFModel, draft: EagleModel, calls: OfficialCalls | ReleasedCalls) -> None:
        self.ea_model, self.engine, self.draft = ea_model, engine, draft
        note = ignored_rotation(ea_model.base_model)
        self.notes = [note] if note else []
        for each in self.notes:
            logging.getLogger("specx").warning(each)
        self._calls = calls
        self._before = {name: vars(ea_model)[name] for name in _REPLACED if name in vars(ea_model)}
        self.active = True
        for name in _REPLACED:
            setattr(ea_model, name, getattr(calls, name))

    @property
    def last(self) -> Generation | None:
        """What the last call gave, whose `stats` say what it cost; None before the first."""
        return self._calls.last

    def remove(self) -> None:
        """Give the object back its own calls. A second time it does nothing."""
        if not self.active:
            return
        for name in _REPLACED:
            vars(self.ea_model).pop(name, None)
        for name, call in self._before.items():
            setattr(self.ea_model, name, call)
        self.active = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()
