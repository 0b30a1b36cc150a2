"""What an EAGLE head is, whatever it was saved as, and the tensors that such a head has."""

from dataclasses import dataclass
from typing import Any

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class HeadFormat:
    """What a head is, whatever it was saved as.

    Attributes:
        version: "EAGLE-1/2", "EAGLE-3" or "EAGLE-3.1".
        dialect: Whose convention its config follows: EAGLE-1/2, official, SpecForge or speculators.
        hidden, target_hidden: Hidden sizes of the head and of the target it was made for.
        sources: Target layers that it reads.
        layer_ids: Those it names, None: the default ones; `ids_are_inputs`: id j is the output of layer j - 1.
        vocab, draft_vocab: Tokens of the target and of the head's own LM head; 0: not said, none.
        windows: Sliding window of each layer, or None.
        before_fc: The norm that the features pass before fc: "input_norm" (all at once), "fc_norm" (each), or "".
        residual_normed: The first layer's residual is the normed state.
        norm: Where the final norm acts: "logits", "both" (logits and the next step's state) or "none".
        rope: See `eagle_rope.rope_options`.
        max_positions: What its config claims.
        notes: What is odd about it, in words.
    """

    version: str
    dialect: str
    hidden: int
    target_hidden: int
    sources: int
    layer_ids: tuple[int, ...] | None
    ids_are_inputs: bool
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    windows: tuple[int | None, ...]
    eps: float
    activation: str
    vocab: int
    draft_vocab: int
    before_fc: str
    residual_normed: bool
    norm: str
    rope: dict[str, Any]
    max_positions: int | None
    notes: tuple[str, ...]

    @property
    def is_eagle3(self) -> bool:
        """Whether it fuses several layers of the target, instead of reading its last hidden state."""
        return self.version != "EAGLE-1/2"

    def about(self) -> list[str]:
        """Say what the head is, in lines for `specx doctor`."""
        dialect = f" in the {self.dialect} dialect" if self.is_eagle3 else ""
        layers = f"{self.layers} layer{'s' if self.layers > 1 else ''}"
        shape = (
            f"{layers} of hidden size {self.hidden}, {self.heads} heads of {self.head_dim} ({self.kv_heads} key/value)"
        )
        rope = f"rope {self.rope['rope_type']}, base {self.rope['rope_theta']:g}"
        norms = [f"{self.before_fc} before fc"] if self.before_fc else []
        norms += ["normed residual"] if self.residual_normed else []
        norms += {"both": ["normed states fed back"], "none": ["no final norm"]}.get(
            self.norm if self.is_eagle3 else "", []
        )
        lines = [f"{self.version}{dialect}: {shape}, {', '.join([rope, *norms])}"]
        windows = {each for each in self.windows if each}
        lines += [f"its own attention slides over {', '.join(map(str, windows))} positions"] if windows else []
        table = f"a vocabulary of its own of {self.draft_vocab} tokens" if self.draft_vocab else "the target's LM head"
        claimed = self.max_positions or "no number of"
        return [*lines, f"it uses {table}; its config claims {claimed} positions", *self.notes]

    def taps(self, layers: int) -> tuple[int, ...]:
        """Return the layers of a target of `layers` layers whose outputs the head reads; see `hf.HFModel.forward`.

        Raises:
            ValueError: If the target has no such layers.
        """
        if not self.is_eagle3:
            return (layers,)
        default = (1, layers // 2 - 1, layers - 4)
        found = self.layer_ids if self.layer_ids is not None else default
        # Some converters copied ids that name outputs to where they name inputs: these give themselves away.
        if self.ids_are_inputs and found != default:
            found = tuple(each - 1 for each in found)
        if len(found) != self.sources or any(not 0 <= each < layers for each in found):
            raise ValueError(
                f"the head's fc.weight reads {self.sources} layers, but in this target of {layers} layers they would "
                f"be {list(found)} (counted from 0): it was made for another target"
            )
        return found


def expected_shapes(head: HeadFormat) -> tuple[Shapes, Shapes]:
    """Return the shapes of the tensors that a head must have, and of those it may have; -1 is any number."""
    hidden, eagle3 = head.hidden, head.is_eagle3
    width = head.sources * head.target_hidden + (0 if eagle3 else hidden)
    needed: Shapes = {"fc.weight": (hidden, width)}
    for layer in range(head.layers):
        needed |= _layer_shapes(head, layer)
    optional: Shapes = {name.replace("weight", "bias"): (shape[0],) for name, shape in needed.items() if shape[1:]}
    prefixes = [f"layers.{layer}.self_attn." for layer in range(head.layers)]
    optional |= {f"{each}{name}_norm.weight": (head.head_dim,) for each in prefixes for name in "qk"}
    optional["embed_tokens.weight"] = (-1, hidden)
    lm_head: Shapes = {"lm_head.weight": (head.draft_vocab, hidden)}
    table: Shapes = {"d2t": (head.draft_vocab,)}
    if not eagle3:
        return needed, optional | lm_head | table
    needed |= lm_head
    (optional if head.norm == "none" else needed)["norm.weight"] = (hidden,)
    (needed if head.vocab and head.draft_vocab < head.vocab else optional).update(table)
    if head.before_fc == "fc_norm":
        needed |= {f"fc_norm.{number}.weight": (head.target_hidden,) for number in range(head.sources)}
    elif head.before_fc == "input_norm":
        needed["input_norm.weight"] = (width,)
    return needed, optional


def _layer_shapes(head: HeadFormat, layer: int) -> Shapes:
    hidden, queries, keys = head.hidden, head.heads * head.head_dim, head.kv_heads * head.head_dim
    first = head.is_eagle3 and layer == 0
    wide, prefix = 2 * hidden if first else hidden, f"layers.{layer}."
    shapes: Shapes = {
        "self_attn.q_proj.weight": (queries, wide),
        "self_attn.k_proj.weight": (keys, wide),
        "self_attn.v_proj.weight": (keys, wide),
        "self_attn.o_proj.weight": (hidden, queries),
        "mlp.gate_proj.weight": (head.intermediate, hidden),
        "mlp.up_proj.weight": (head.intermediate, hidden),
        "mlp.down_proj.weight": (hidden, head.intermediate),
        "post_attention_layernorm.weight": (hidden,),
    }
    if first:
        shapes["hidden_norm.weight"] = (hidden,)
    if first or layer > 0:
        shapes["input_layernorm.weight"] = (hidden,)
    return {prefix + name: shape for name, shape in shapes.items()}
