"""Training EAGLE heads: EAGLE-1 (arXiv 2401.15077) and EAGLE-3 with its training-time test (arXiv 2503.01840).

Modules are named as the published checkpoints are, so that a state dict is one.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from specx.adapters.eagle_rope import rope_options, rotation
from specx.training.features import directly

NOISE = 0.2  # EAGLE-1 adds uniform noise of this width to the target's features


class TrainableHead(nn.Module):
    """A one-layer head in training, over a frozen target. Tensors are [B, T, ...].

    Args:
        version: "eagle1" or "eagle3".
        target: The finished target; gives embeddings, features and, to EAGLE-1, its LM head.
        intermediate: Width of the head's MLP.
        vocabulary: Ascending ids of the tokens that an EAGLE-3 head can draft; None: all.
        unrolled: Steps of EAGLE-3's training-time test; the first one reads the target's
            features, the others what the head itself gave.
    """

    d2t: Tensor
    t2d: Tensor

    def __init__(
        self,
        version: str,
        target: PreTrainedModel,
        intermediate: int,
        vocabulary: Tensor | None = None,
        unrolled: int = 3,
    ) -> None:
        super().__init__()
        self.watched: Callable[..., tuple[Tensor, ...]] = directly
        config, self.version, self.unrolled = target.config.get_text_config(decoder=True), version, unrolled
        self.target_of: list[Any] = [target]  # in a list, so that it is no part of this module
        hidden = config.hidden_size
        self.head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        third = version == "eagle3"
        read = 2 * hidden if third else hidden
        self.fc = nn.Linear((3 if third else 2) * hidden, hidden, bias=not third)
        counts = {"q_proj": self.heads, "k_proj": self.groups, "v_proj": self.groups}
        attention = {name: nn.Linear(read, count * self.head_dim, bias=False) for name, count in counts.items()}
        attention["o_proj"] = nn.Linear(self.heads * self.head_dim, hidden, bias=False)
        wide, norms = intermediate, ["post_attention_layernorm", *(["hidden_norm", "input_layernorm"] if third else [])]
        mlp = {name: nn.Linear(hidden, wide, bias=False) for name in ("gate_proj", "up_proj")}
        parts: dict[str, nn.Module] = {"self_attn": nn.ModuleDict(attention)}
        parts["mlp"] = nn.ModuleDict(mlp | {"down_proj": nn.Linear(wide, hidden, bias=False)})
        parts |= {name: nn.RMSNorm(hidden, eps=config.rms_norm_eps) for name in norms}
        layer = nn.ModuleDict(parts)
        if third:
            self.midlayer, self.norm = layer, nn.RMSNorm(hidden, eps=config.rms_norm_eps)
            own: Any = target.get_output_embeddings()
            rows = own.weight if vocabulary is None else own.weight[vocabulary.to(own.weight.device)]
            self.lm_head = nn.Linear(hidden, len(rows), bias=False)
            self.lm_head.weight.data.copy_(rows)
            if vocabulary is not None:
                self.register_buffer("d2t", vocabulary - torch.arange(len(vocabulary)))
                self.register_buffer("t2d", torch.isin(torch.arange(config.vocab_size), vocabulary))
        else:
            self.layers = nn.ModuleList([layer])
        self._layer: list[Any] = [layer]
        layers = config.num_hidden_layers
        self.taps = (1, layers // 2 - 1, layers - 4) if third else ()
        self.rotation, _ = rotation(rope_options({}), self.head_dim, self.fc.weight.device)

    @torch.no_grad()
    def watch(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the head reads of the target, [B, T, sources * hidden], and its last states, [B, T, hidden]."""
        target = self.target_of[0]
        out = target.get_decoder()(tokens, use_cache=False, output_hidden_states=bool(self.taps))
        last = out.last_hidden_state
        read = torch.cat([out.hidden_states[layer + 1] for layer in self.taps], -1) if self.taps else last
        return read, last

    def loss(self, tokens: Tensor) -> Tensor:
        """Return the loss on tokens [B, T]: cross entropy against the target's next distribution, over the steps.

        EAGLE-1 adds, ten times heavier, the distance of its output to the target's next feature.
        """
        read, last = self.watched(self.watch, tokens[:, :-1])
        read = self._cast(read)
        with torch.no_grad():
            logits = self.target_of[0].get_output_embeddings()(last)
        embeds = self._cast(self.target_of[0].get_input_embeddings()(tokens[:, 1:-1]))  # of token i + 1
        wanted, counts = self._wanted(logits[:, 1:].float())  # of token i + 2
        if self.version == "eagle1":
            noisy = read[:, :-1] + (torch.rand_like(read[:, :-1]) - 0.5) * NOISE
            hidden, _ = self._step(self.fc(torch.cat([embeds, noisy], -1)), None, [])
            lm_head = self.target_of[0].get_output_embeddings()
            guess = lm_head(hidden.to(lm_head.weight.dtype)).float()
            near = F.smooth_l1_loss(hidden.float(), read[:, 1:].float())
            return near + 0.1 * F.cross_entropy(guess.flatten(0, 1), wanted.flatten(0, 1))
        states, total = self.fc(read[:, :-1]), torch.zeros((), device=tokens.device)
        past: list[tuple[Tensor, Tensor]] = []
        for step in range(self.unrolled):
            layer = self._layer[0]
            entry = torch.cat([layer["input_layernorm"](embeds), layer["hidden_norm"](states)], -1)
            hidden, kept = self._step(entry, states, past)
            past.append(kept)
            guess = self.lm_head(self.norm(hidden)).float()
            each = F.cross_entropy(guess[:, step:].flatten(0, 1), wanted[:, step:].flatten(0, 1), reduction="none")
            total = total + 0.8**step * (each if counts is None else each * counts[:, step:].flatten()).mean()
            states = torch.cat([states[:, :1], hidden[:, :-1]], 1)  # the head's own output stands in for the feature
        return total / sum(0.8**step for step in range(self.unrolled))

    def _cast(self, x: Tensor) -> Tensor:
        """Let what a target of another dtype gives fit the head's weights; autocast does that by itself."""
        return x if torch.is_autocast_enabled(x.device.type) else x.to(self.fc.weight.dtype)

    def _wanted(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the distribution to learn, [B, T, columns], and which rows count, [B, T]; None: all.

        Where the target's own token is not in the draft's vocabulary nothing can be learnt.
        """
        if self.version != "eagle3" or "d2t" not in self._buffers:
            return logits.softmax(-1), None
        ids = self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)
        return logits[..., ids].softmax(-1), self.t2d[logits.argmax(-1)].float()

    def _step(
        self, entry: Tensor, residual: Tensor | None, past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One pass over all entries; step s sees true entries up to i - s, and its own steps' ones after these."""
        layer, attention = self._layer[0], self._layer[0]["self_attn"]
        query, key, value = (
            attention[name](entry).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        positions = torch.arange(entry.shape[1], device=entry.device)
        query, key = self.rotation.move(query, positions), self.rotation.move(key, positions)
        out = self._attend(query, [*past, (key, value)])
        hidden = (entry if residual is None else residual) + attention["o_proj"](out.transpose(1, 2).flatten(2))
        normed, mlp = layer["post_attention_layernorm"](hidden), layer["mlp"]
        return hidden + mlp["down_proj"](F.silu(mlp["gate_proj"](normed)) * mlp["up_proj"](normed)), (key, value)

    def _attend(self, query: Tensor, steps: list[tuple[Tensor, Tensor]]) -> Tensor:
        if len(steps) == 1:
            return F.scaled_dot_product_attention(query, *steps[0], is_causal=True, enable_gqa=True)
        share, count, last = self.heads // self.groups, query.shape[2], len(steps) - 1
        packed = query.unflatten(1, (self.groups, share))
        near = []  # the entries of later steps: step s stands for entry i - (last - s)
        for number, (key, _) in enumerate(steps[1:], 1):
            near.append((packed * _back(key, last - number)[:, :, None]).sum(-1, keepdim=True))
        far = packed @ steps[0][0][:, :, None].transpose(-1, -2)
        seen = torch.ones(count, count, dtype=torch.bool, device=query.device).tril(-last)
        scores = torch.cat([far.masked_fill(~seen, torch.finfo(far.dtype).min), *near], -1) * self.head_dim**-0.5
        weights = scores.float().softmax(-1).to(query.dtype)
        out = weights[..., :count] @ steps[0][1][:, :, None]
        for number, (_, value) in enumerate(steps[1:], 1):
            column = count + number - 1
            out = out + weights[..., column : column + 1] * _back(value, last - number)[:, :, None]
        return out.flatten(1, 2)


def _back(rows: Tensor, places: int) -> Tensor:
    """Let row i be row i - places, [B, G, T, D]; the first ones stay their own."""
    return torch.cat([rows[:, :, :places], rows[:, :, : rows.shape[2] - places]], 2) if places else rows


def head_config(head: TrainableHead, positions: int) -> dict[str, Any]:
    """Return config.json as the head's authors' own training saves it."""
    config = head.target_of[0].config.get_text_config(decoder=True)
    shape = {
        "hidden_size": config.hidden_size,
        "intermediate_size": head._layer[0]["mlp"]["up_proj"].out_features,
        "num_attention_heads": head.heads,
        "num_key_value_heads": head.groups,
        "head_dim": head.head_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.rms_norm_eps,
    }
    extra = {"draft_vocab_size": head.lm_head.out_features} if head.version == "eagle3" else {}
    kind = {"architectures": ["LlamaForCausalLMEagle3" if extra else "LlamaForCausalLM"], "model_type": "llama"}
    return kind | shape | extra | {"num_hidden_layers": 1, "hidden_act": "silu", "max_position_embeddings": positions}
