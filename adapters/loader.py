"""A named or live draft becomes a `DraftModel`; which adapter serves it is decided by what its files hold."""

from typing import Any

import torch
from torch import Tensor

from specx.adapters.checkpoints import load_model
from specx.adapters.classic import ClassicModel
from specx.adapters.eagle import EagleModel
from specx.adapters.eagle_checkpoints import read_head
from specx.adapters.eagle_format import HeadFormat
from specx.adapters.eagle_head import EagleHead
from specx.adapters.longspec_loader import load_longspec
from specx.adapters.lookup import LookupModel
from specx.adapters.names import LOOKUP, known_draft
from specx.adapters.weights import kind_of
from specx.config import LoadConfig
from specx.draft import DraftModel
from specx.hf import HFModel

_EAGLE_CONTEXT = 4096  # many heads claim their target's positions; none is known that was trained on longer texts


def load_draft(
    draft: Any,
    directory: str | None,
    target: HFModel,
    asked: int | None,
    config: LoadConfig,
    tokens: Tensor | None = None,
) -> DraftModel:
    """Load a draft for `target`.

    Args:
        draft: What the user gave: a name, a directory, a hub id or a live model.
        directory: Its local directory; None for a live model.
        asked: The draft_context that was asked for.
        tokens: The only ones to draft, ascending ids; for heads that use the target's LM head.

    Raises:
        RuntimeError: A checkpoint that cannot be loaded.
        ValueError: A draft that does not fit the target.
    """
    name = draft if isinstance(draft, str) else type(draft).__name__
    if tokens is not None and target.lm_head.weight.is_meta:
        raise ValueError("draft_vocab needs the target's LM head in memory; accelerate has put it elsewhere")
    if name == LOOKUP:
        return LookupModel()
    kind = "classic" if directory is None else kind_of(directory)
    if directory is not None and kind == "eagle":
        return load_eagle(name, directory, target, asked, tokens)
    if directory is not None and kind == "longspec":
        known = known_draft(name)
        source = "asked for" if asked else "the table of known names"
        trained = asked or (known.draft_context if known else None)
        return load_longspec(name, directory, target, trained, source, config.window_alignment, tokens)
    if tokens is not None:
        raise ValueError(f"draft {name} has an LM head of its own; draft_vocab is for EAGLE heads that have none")
    model = draft if directory is None else load_model(directory, config, "draft")
    wrapped = HFModel(model, config.backend, target.hybrid, target.flash_prefill, config.pack_weights, config.graphs)
    claimed = wrapped.max_positions or 2048, "its config's max_position_embeddings"
    return ClassicModel(name, wrapped, target.vocab_size, *_context(name, asked, *claimed))


def _context(name: str, asked: int | None, claimed: int, source: str) -> tuple[int, str]:
    """Return the positions that a draft was trained for, and where that is known from."""
    if asked:
        return asked, "asked for"
    known = known_draft(name)
    if known and known.draft_context:
        return known.draft_context, "the table of known names"
    return claimed, source


def load_eagle(
    name: str, directory: str, target: HFModel, asked: int | None = None, tokens: Tensor | None = None
) -> EagleModel:
    """Load an EAGLE head for `target`, on its device and in its dtype; see `load_draft`.

    Raises:
        RuntimeError: A head that cannot be read.
        ValueError: A head that was made for another target.
    """
    return build_eagle(name, *read_head(directory), target, asked, tokens)


def build_eagle(
    name: str,
    head: HeadFormat,
    tensors: dict[str, Tensor],
    target: HFModel,
    asked: int | None = None,
    tokens: Tensor | None = None,
) -> EagleModel:
    """Build an EAGLE head from tensors, which are shared where they lie on the target's device in its dtype.

    Raises:
        ValueError: A head that was made for another target.
    """
    _check_fit(name, head, target)
    tensors = {
        key: tensor.to(target.device, torch.long if key == "d2t" else target.dtype) for key, tensor in tensors.items()
    }
    for key, module in (("embed_tokens.weight", target.embedding), ("lm_head.weight", target.lm_head)):
        own = tensors.get(key)  # a frozen copy of the target's need not be held twice
        there = own is not None and own.shape == module.weight.shape and not module.weight.is_meta
        if own is not None and there and torch.equal(own, module.weight.to(own.device)):
            del tensors[key]
    if "embed_tokens.weight" not in tensors and target.embedding.weight.shape[1] != head.hidden:
        raise ValueError(f"draft {name} lacks embed_tokens.weight; the target's embeddings are not {head.hidden} wide")
    vocabulary = _vocabulary(name, tensors, target.vocab_size)
    if tokens is not None:
        vocabulary = _prune(name, tensors, target, tokens)
    built = EagleHead(head, tensors, target.embedding, target.lm_head)
    claimed = head.max_positions or _EAGLE_CONTEXT
    source = "its config's max_position_embeddings"
    if claimed > _EAGLE_CONTEXT:
        source = f"the {_EAGLE_CONTEXT} that EAGLE heads are trained for at most (its config claims {claimed})"
    context = _context(name, asked, min(claimed, _EAGLE_CONTEXT), source)
    layers = target.config.num_hidden_layers
    named = ", ".join(map(str, head.taps(layers)))
    read = f"the outputs of the target's layers {named} (of 0 to {layers - 1})"
    about = [
        *head.about(),
        *_odd_layers(head, layers),
        f"it reads {read if head.is_eagle3 else 'what the target gives its LM head'}",
    ]
    if tokens is not None and vocabulary is not None:
        about.append(f"it drafts {len(vocabulary)} of the target's {target.vocab_size} tokens, as asked for")
    return EagleModel(name, built, target, vocabulary, *context, about)


def _check_fit(name: str, head: HeadFormat, target: HFModel) -> None:
    hidden = target.config.hidden_size
    if head.target_hidden != hidden:
        raise ValueError(
            f"draft {name} was made for a target of hidden size {head.target_hidden}; this target's is {hidden}"
        )
    try:
        head.taps(target.config.num_hidden_layers)
    except ValueError as error:
        raise ValueError(f"draft {name}: {error}") from error


def _odd_layers(head: HeadFormat, layers: int) -> list[str]:
    if not head.ids_are_inputs or head.taps(layers) != head.layer_ids:
        return []
    return [f"its config names layers {list(head.layer_ids)} where ids mean inputs; as in SpecForge, they mean outputs"]


def _vocabulary(name: str, tensors: dict[str, Tensor], vocab: int) -> Tensor | None:
    """Return the token id of each row of the head's LM head; drop rows of ids that the target does not know.

    `d2t` holds offsets: row i means token i + d2t[i].
    """
    table, weight = tensors.pop("d2t", None), tensors.get("lm_head.weight")
    if weight is None:
        return None
    ids = torch.arange(len(weight), device=weight.device)
    if table is not None:
        ids = ids + table
    if len(ids.unique()) != len(ids) or int(ids.min()) < 0:
        raise ValueError(f"draft {name}: d2t maps two rows to one token, or one to a negative id")
    known = ids < vocab
    for key in ("lm_head.weight", "lm_head.bias"):
        if key in tensors and not bool(known.all()):
            tensors[key] = tensors[key][known]
    return None if table is None and bool(known.all()) else ids[known]


def _prune(name: str, tensors: dict[str, Tensor], target: HFModel, tokens: Tensor) -> Tensor:
    """Give a head rows of the target's LM head as its own; return the token id of each."""
    if "lm_head.weight" in tensors:
        raise ValueError(f"draft {name} has an LM head of its own; draft_vocab is for heads that use the target's")
    weight, bias = target.lm_head.weight, target.lm_head.bias
    if not weight.is_floating_point():
        raise ValueError("draft_vocab needs a target whose LM head is not quantized")
    ids = tokens[tokens < min(target.vocab_size, len(weight))].to(weight.device)
    if not len(ids):
        raise ValueError(f"draft_vocab names no token that the target knows; its ids are below {target.vocab_size}")
    tensors["lm_head.weight"] = weight.detach()[ids].to(target.device)
    if bias is not None:
        tensors["lm_head.bias"] = bias.detach()[ids].to(target.device)
    return ids.to(target.device)
