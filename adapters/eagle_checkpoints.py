"""EAGLE heads on disk: EAGLE-1/2, EAGLE-3 in its three dialects, EAGLE-3.1. Recognised by their keys.

Every dialect ends in one `HeadFormat` and tensors under one set of names. What a config and the tensors disagree about
is as the tensors have it. Nothing is ignored: a key too few or too many is an error.
"""

from typing import Any

from torch import Tensor

from specx.adapters.eagle_format import HeadFormat, expected_shapes
from specx.adapters.eagle_rope import rope_options
from specx.adapters.weights import read_config, read_tensors

_REFUSED = {
    "q_a_proj": "its attention is multi-head latent (MLA)",
    "kv_a_proj": "its attention is multi-head latent (MLA)",
    "mask_hidden": "it is P-EAGLE, which drafts all depths at once",
    "markov": "it is a block drafter (DSpark)",
}
_UNUSED = ("t2d", "rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")


def read_head(directory: str) -> tuple[HeadFormat, dict[str, Tensor]]:
    """Read an EAGLE head.

    Args:
        directory: Holds config.json and the weights.

    Returns:
        What it is, and its tensors on the CPU, under EAGLE's names with `layers.0` for `midlayer`.

    Raises:
        RuntimeError: A key that is missing or unknown, with the dialect tried; a kind of head that is not supported.
    """
    return parse_head(f"draft {directory}", read_config(directory), read_tensors(directory))


def parse_head(name: str, config: dict[str, Any], raw: dict[str, Tensor]) -> tuple[HeadFormat, dict[str, Tensor]]:
    """Make sense of a head's config and tensors, wherever they come from; see `read_head`. Tensors are not copied.

    Args:
        name: What messages call it.
        config: The content of its config.json.
        raw: Its tensors under the names of any dialect.
    """
    tensors = dict[str, Tensor]()
    for key, tensor in raw.items():
        plain = key.removeprefix("model.").replace("midlayer.", "layers.0.")
        if not plain.startswith("verifier_") and not plain.endswith(_UNUSED):
            tensors[plain] = tensor
    try:
        _refuse(config, tensors)
        reader = _Reader(config, tensors, any("midlayer." in key for key in raw))
        head = reader.format()
        reader.check(head)
    except ValueError as error:
        raise RuntimeError(f"{name}: {error}") from error
    return head, tensors


def _refuse(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    kind = config.get("speculators_model_type", "eagle3")
    reasons = [why for mark, why in _REFUSED.items() if any(mark in name for name in tensors)]
    if kind not in ("eagle3", "eagle"):
        reasons.append(f"its speculators_model_type is {kind}")
    if config.get("dflash_config") or config.get("block_size"):
        reasons.append("it is a block drafter (DFlash)")
    if reasons:
        raise ValueError(f"this head is not supported: {reasons[0]}; supported are EAGLE-1, 2, 3 and 3.1")


class _Reader:
    """Turns a config and tensors into a `HeadFormat`.

    Args:
        midlayer: The file calls the first layer so, and messages do then.
    """

    def __init__(self, config: dict[str, Any], tensors: dict[str, Tensor], midlayer: bool) -> None:
        self.outer, self.eagle = config, config.get("eagle_config") or {}
        self.config = self.eagle | config | (config.get("transformer_layer_config") or {})
        self.tensors, self.midlayer, self.notes = tensors, midlayer, list[str]()
        names = {"fc_norm", "input_norm", "norm", "lm_head", "d2t", "layers.0.hidden_norm"}
        self.eagle3 = midlayer or any(name.removesuffix(".weight") in names - {"lm_head"} for name in tensors)
        if not self.eagle3 and "fc.weight" in tensors and "layers.0.self_attn.q_proj.weight" in tensors:
            self.eagle3 = self.shape("layers.0.self_attn.q_proj.weight")[1] == 2 * self.shape("fc.weight")[0]
        self.dialect = self._dialect()

    def _dialect(self) -> str:
        nested = {"transformer_layer_config", "speculators_model_type", "speculators_config"} & self.outer.keys()
        if not self.eagle3:
            return "EAGLE-1/2"
        if nested or not self.midlayer:
            return "speculators"
        specforge = "LlamaForCausalLMEagle3" in (self.outer.get("architectures") or ())
        return "SpecForge" if specforge or self.eagle or "fc_norm" in self.outer else "official"

    def shown(self, name: str) -> str:
        """Return a key as the file's dialect spells it."""
        return name.replace("layers.0.", "midlayer.") if self.midlayer else name

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a needed tensor's shape."""
        if name not in self.tensors:
            raise ValueError(f"the head lacks {self.shown(name)}, {self.tried}")
        return tuple(self.tensors[name].shape)

    @property
    def tried(self) -> str:
        """Name the dialect in an error."""
        version = "EAGLE-3 head" if self.eagle3 else "EAGLE-1/2 head"
        return f"read as an {version}" + (f" in the {self.dialect} dialect" if self.eagle3 else "")

    def number(self, name: str) -> int:
        """Return a needed positive number of the config."""
        found = self.config.get(name)
        if not isinstance(found, int) or found < 1:
            raise ValueError(f"config.json gives no {name} (found {found!r}), {self.tried}")
        return found

    def format(self) -> HeadFormat:
        """Put together what the head is."""
        hidden, width = self.shape("fc.weight")
        attention, heads = "layers.0.self_attn.", self.number("num_attention_heads")
        queries = self.shape(attention + "q_proj.weight")[0]
        if queries % heads:
            raise ValueError(f"{queries} rows of q_proj cannot be {heads} heads (num_attention_heads), {self.tried}")
        head_dim = queries // heads
        target_hidden, sources = self._sources(hidden, width)
        ids, are_inputs = self._layer_ids()
        layers = 1 + max(int(name.split(".")[1]) for name in self.tensors if name.startswith("layers."))
        embedding = self.tensors.get("embed_tokens.weight")
        return HeadFormat(
            version=self._version(),
            dialect=self.dialect,
            hidden=hidden,
            target_hidden=target_hidden,
            sources=sources,
            layer_ids=ids,
            ids_are_inputs=are_inputs,
            intermediate=self.shape("layers.0.mlp.gate_proj.weight")[0],
            heads=heads,
            kv_heads=self.shape(attention + "k_proj.weight")[0] // head_dim,
            head_dim=head_dim,
            layers=layers,
            windows=self._windows(layers),
            eps=float(self.config.get("rms_norm_eps") or 1e-6),
            activation=self.config.get("hidden_act") or "silu",
            vocab=self.config.get("vocab_size") or (len(embedding) if embedding is not None else 0),
            draft_vocab=self.shape("lm_head.weight")[0] if self.eagle3 or "lm_head.weight" in self.tensors else 0,
            before_fc=self._before_fc(),
            residual_normed=bool(self.config.get("norm_before_residual")),
            norm=self._norm(),
            rope=rope_options(self.config),
            max_positions=self.config.get("max_position_embeddings"),
            notes=tuple(self.notes),
        )

    def _sources(self, hidden: int, width: int) -> tuple[int, int]:
        """Return the target's hidden size and how many of its layers fc reads."""
        claimed = self.config.get("target_hidden_size") or hidden
        if not self.eagle3:
            claimed = width - hidden
        fused = width if self.eagle3 else claimed
        if claimed < 1 or fused % claimed:
            raise ValueError(
                f"fc.weight reads {width} numbers, which are no multiple of the target's hidden size {claimed} "
                f"(target_hidden_size in config.json says another one), {self.tried}"
            )
        return claimed, fused // claimed

    def _layer_ids(self) -> tuple[tuple[int, ...] | None, bool]:
        outer, inner = (each.get("eagle_aux_hidden_state_layer_ids") for each in (self.outer, self.eagle))
        if outer and inner and [each - 1 for each in outer] != list(inner):
            self.notes.append(f"its config names layers twice: {outer} and, in eagle_config, {inner}")
        if inner and not (outer and self.dialect == "speculators"):
            return tuple(inner), False
        return (tuple(outer), True) if outer else (None, False)

    def _before_fc(self) -> str:
        found = [name for name in ("fc_norm", "input_norm") if any(each.startswith(name) for each in self.tensors)]
        asked = [
            name for name, flag in (("fc_norm", "fc_norm"), ("input_norm", "norm_before_fc")) if self.config.get(flag)
        ]
        if len(found) > 1:
            raise ValueError(f"the head holds fc_norm and input_norm, where only one makes sense, {self.tried}")
        return (found or asked or [""])[0]

    def _norm(self) -> str:
        """`norm_output` of speculators feeds the normed state back; SpecForge's only switches the norm."""
        asked = self.config.get("norm_output")
        if not self.eagle3:
            return "none"
        if self.dialect == "speculators":
            return "both" if asked else "logits"
        return "none" if asked is False else "logits"

    def _version(self) -> str:
        if not self.eagle3:
            return "EAGLE-1/2"
        return "EAGLE-3.1" if "fc_norm.0.weight" in self.tensors or self._norm() == "both" else "EAGLE-3"

    def _windows(self, layers: int) -> tuple[int | None, ...]:
        kinds, window = self.config.get("layer_types") or (), self.config.get("sliding_window")
        slides = [bool(window) and kind == "sliding_attention" for kind in kinds[:layers]]
        return tuple(window if each else None for each in slides + [False] * (layers - len(slides)))

    def check(self, head: HeadFormat) -> None:
        """Compare keys and shapes with what such a head has.

        Raises:
            ValueError: Naming the key and the dialect.
        """
        needed, optional = expected_shapes(head)
        missing = sorted(needed.keys() - self.tensors.keys())
        unknown = sorted(self.tensors.keys() - needed.keys() - optional.keys())
        if missing:
            raise ValueError(f"the head lacks {self.shown(missing[0])}, {self.tried}")
        if unknown:
            raise ValueError(f"the head holds the unknown key {self.shown(unknown[0])}, {self.tried}")
        for name, shape in (optional | needed).items():
            found = self.shape(name) if name in self.tensors else shape
            if len(found) != len(shape) or any(many not in (-1, size) for many, size in zip(shape, found, strict=True)):
                raise ValueError(f"{self.shown(name)} is {list(found)}, not {list(shape)}, {self.tried}")
