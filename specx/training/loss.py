"""Losses over large vocabularies: logits exist for a slice of the rows at a time."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

Head = Callable[[Tensor], Tensor]
_ELEMENTS = 1 << 25  # logits that exist at once


def cross_entropy(hidden: Tensor, head: Head, wanted: Tensor, columns: int, teacher: Head | None = None) -> Tensor:
    """Return the mean cross entropy in nats of `head(hidden)`, a scalar; gradients flow to `hidden` and into `head`.

    Args:
        hidden: What the head reads, [N, hidden].
        head: Gives logits [n, V].
        wanted: Token ids, int64 [N]; -100 does not count. With a teacher: what it reads, [N, its hidden].
        columns: V.
        teacher: Gives the logits whose distribution is learnt; no gradient flows there.
    """

    def part(hidden: Tensor, wanted: Tensor) -> Tensor:
        logits = head(hidden).float()
        if teacher is None:
            return F.cross_entropy(logits, wanted, reduction="sum")
        with torch.no_grad():
            law = teacher(wanted).float().softmax(-1)
        return F.cross_entropy(logits, law, reduction="sum")

    rows = max(1, _ELEMENTS // columns)
    total = hidden.new_zeros((), dtype=torch.float32)
    for some, own in zip(hidden.split(rows), wanted.split(rows), strict=True):
        many = len(hidden) > rows  # then logits are computed twice rather than kept
        total = total + (checkpoint(part, some, own, use_reentrant=False) if many else part(some, own))
    count = len(hidden) if teacher is not None else (wanted != -100).sum()
    return total / count


def target_head(model: PreTrainedModel) -> Head:
    """Return a model's LM head as a function of what it reads, of any dtype; its softcap, where it has one, applied."""
    head: Any = model.get_output_embeddings()
    cap = getattr(model.config.get_text_config(decoder=True), "final_logit_softcapping", None)

    def logits(hidden: Tensor) -> Tensor:
        found = head(hidden.to(head.weight.dtype))
        return found if cap is None else torch.tanh(found / cap) * cap

    return logits
