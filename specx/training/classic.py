"""Training classic drafts: a small Llama on the target's tokenizer, from text or from the target's distribution."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from specx.hf import HFModel
from specx.training.features import directly
from specx.training.loss import cross_entropy, target_head
from specx.training.options import ClassicConfig


def fresh_model(config: ClassicConfig, target: HFModel, length: int) -> LlamaForCausalLM:
    """Return a small Llama with random weights, float32.

    Raises:
        ValueError: Sizes that do not fit each other.
    """
    groups = config.kv_heads or config.heads
    if config.hidden % config.heads or config.heads % groups or config.hidden // config.heads % 2:
        raise ValueError(
            f"hidden {config.hidden} must be {config.heads} heads of an even width, shared evenly by {groups} kv_heads"
        )
    ends = {name: getattr(target.config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=target.vocab_size,
            hidden_size=config.hidden,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=groups,
            intermediate_size=config.intermediate or 8 * config.hidden // 3,
            max_position_embeddings=config.positions or length,
            **ends,
        )
    )


class ClassicTask(nn.Module):
    """A small model in training.

    Args:
        teacher: The target, to learn its distribution; None: learn the text's next token.
    """

    def __init__(self, model: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        super().__init__()
        self.model: Any = model
        self.teacher_of: list[Any] = [teacher]  # in a list, so that it is no part of this module
        self.watched: Callable[..., tuple[Tensor, ...]] = directly

    def forward(self, ids: Tensor, draw: tuple[int, ...]) -> Tensor:
        """Return the mean loss in nats on windows of tokens, int64 [B, T + 1]; nothing is drawn."""
        hidden = self.model.get_decoder()(ids[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)
        head, columns, teacher = target_head(self.model), self.model.config.vocab_size, self.teacher_of[0]
        if teacher is None:
            return cross_entropy(hidden, head, ids[:, 1:].flatten(), columns)
        (read,) = self.watched(self.watch, ids[:, :-1])
        return cross_entropy(hidden, head, read.flatten(0, 1), columns, target_head(teacher))

    @torch.no_grad()
    def watch(self, tokens: Tensor) -> tuple[Tensor]:
        """Return what the teacher's LM head reads, [B, T, hidden]."""
        teacher: Any = self.teacher_of[0]
        return (teacher.get_decoder()(tokens, use_cache=False).last_hidden_state,)
