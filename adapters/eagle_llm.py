"""The released `eagle-llm` 1.2.1 under transformers 5: it loads there, and computes what it computes under 4.

It is never imported unless asked for, and patched only inside a `with`. Three things changed under its feet. A config's
`rope_scaling` is never None any more, and says "rope_type" where it said "type". Tied weights are named in pairs. And
models are made without memory, so that buffers which no checkpoint holds, here the tables of the rotary embedding, are
whatever lay there.
"""

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from specx.adapters.checkpoints import quiet

_TIED = {"lm_head.weight": "model.embed_tokens.weight"}  # transformers 4 had a list of the keys alone
INSTALL = "pip install --no-deps eagle-llm==1.2.1"


def installed() -> bool:
    """Say whether `eagle-llm` can be imported."""
    try:
        return importlib.util.find_spec("eagle.model.ea_model") is not None
    except ModuleNotFoundError:
        return False


def load(target: str, head: str, device: str = "cpu", **options: Any) -> Any:
    """Load the package's own `EaModel`, in eval mode.

    Args:
        target: Directory of a Llama or Mixtral.
        head: Directory of an EAGLE-1 head: config.json, and pytorch_model.bin with its own embed_tokens.
        device: Where all of it shall lie.
        options: What its `from_pretrained` passes on to transformers, such as dtype.

    Raises:
        RuntimeError: The package is not installed, or cannot load these; the message has its own words.
    """
    with compatible() as package, quiet():  # transformers would complain of tables that no checkpoint holds
        try:
            model = package.EaModel.from_pretrained(base_model_path=target, ea_model_path=head, **options)
        except Exception as error:  # whatever it raises: it checks nothing beforehand
            words = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise RuntimeError(f"eagle-llm cannot load {target} with {head}: {words}") from error
    model.to(device)
    model.ea_layer.init_tree()  # its buffers are no module's
    return model.eval()


def follow_rope_theta(model: Any) -> None:
    """Let the object's target rotate by the base that its config names, which the package ignores."""
    config = model.base_model.config
    rope = getattr(config, "rope_parameters", None) or {}
    theta = rope.get("rope_theta") or getattr(config, "rope_theta", None)
    for module in model.base_model.modules():
        if theta is not None and hasattr(module, "_set_cos_sin_cache"):
            module.base = float(theta)
            _rebuild(module, model.base_model.lm_head.weight.device)


@contextmanager
def compatible() -> Iterator[ModuleType]:
    """Let `eagle-llm` load models inside; yield its module `eagle.model.ea_model`. Afterwards it is as it was.

    What was loaded inside goes on working outside.

    Raises:
        RuntimeError: The package is not installed.
    """
    if not installed():
        raise RuntimeError(f"eagle-llm is not installed: {INSTALL} (its own pins would downgrade this environment)")
    with warnings.catch_warnings(), ExitStack() as patches:
        warnings.simplefilter("ignore")  # of its docstrings' escapes and of old names that it uses
        package = importlib.import_module("eagle.model.ea_model")
        llama = importlib.import_module("eagle.model.modeling_llama_kv")
        heads = importlib.import_module("eagle.model.cnets")
        mixtral = importlib.import_module("eagle.model.modeling_mixtral_kv")
        for attention in (llama.LlamaAttention, heads.LlamaAttention):
            patches.enter_context(_replaced(attention, "_init_rope", _with_old_config(attention._init_rope)))
        for model in (llama.LlamaForCausalLM, mixtral.MixtralForCausalLM):
            loader = classmethod(_with_tables(model.from_pretrained.__func__))
            patches.enter_context(_replaced(model, "from_pretrained", loader))
            patches.enter_context(_replaced(model, "_tied_weights_keys", _TIED))
        yield package


@contextmanager
def _replaced(owner: type, name: str, new: Any) -> Iterator[None]:
    own, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:  # inherited
            delattr(owner, name)


def _with_old_config(make_rope: Callable[[Any], None]) -> Callable[[Any], None]:
    """Show an attention layer its config's rotation as transformers 4 spelled it, while it makes its embedding."""

    def wrapped(layer: Any) -> None:
        config, layer.config = layer.config, SimpleNamespace(rope_scaling=_old_scaling(layer.config))
        try:
            make_rope(layer)
        finally:
            layer.config = config

    return wrapped


def _old_scaling(config: Any) -> dict[str, Any] | None:
    rope = getattr(config, "rope_parameters", None) or config.rope_scaling or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    return None if kind == "default" else {"type": kind, "factor": rope.get("factor")}


def _with_tables(from_pretrained: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(cls: type, *args: Any, **options: Any) -> Any:
        model = from_pretrained(cls, *args, **options)
        for module in model.modules():
            if hasattr(module, "_set_cos_sin_cache"):
                _rebuild(module, model.lm_head.weight.device)
        return model

    return wrapped


def _rebuild(rope: nn.Module, device: torch.device) -> None:
    """Compute the tables of one rotary embedding as its constructor does."""
    made: Any = rope
    exponents = torch.arange(0, made.dim, 2, dtype=torch.float32, device=device) / made.dim
    made.inv_freq = 1.0 / made.base**exponents
    made._set_cos_sin_cache(seq_len=made.max_position_embeddings, device=device, dtype=torch.float32)
