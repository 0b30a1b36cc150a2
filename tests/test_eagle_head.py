"""What a head computes, against a naive forward; and the dialects that it may be saved in."""

import json

import pytest
import torch
from heads import (
    DRAFT_VOCAB,
    EAGLE1,
    EAGLE3,
    GROUPS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    VOCAB,
    couple,
    flat_config,
    head_tensors,
    prompt_of,
    save,
    tiny_target,
)
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from specx.adapters.checkpoints import check_files
from specx.adapters.eagle_checkpoints import read_head
from specx.adapters.eagle_rope import rope_options, rotation
from specx.adapters.weights import kind_of
from specx.config import CacheConfig
from specx.target import Target
from specx.tree import Plan

CPU = torch.device("cpu")


def naive(config, tensors, target, ids, drafted):
    """Log-probabilities after the prompt `ids` and each of `drafted`: a dense forward of the whole text for each.

    Written after the formulas of the papers and of the dialects: no cache, no tree, no module.
    """
    options = {"theta": 10000.0, "residual": "raw", "norm": "logits", "window": None} | config

    def norm(x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * tensors[name + ".weight"]

    def linear(x, name):
        return x @ tensors[name + ".weight"].T + tensors.get(name + ".bias", 0.0)

    def turned(x):  # [T, heads, D] at positions 0, 1, ...
        angles = torch.arange(len(x))[:, None] * options["theta"] ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        cos, sin = angles.cos().repeat(1, 2)[:, None], angles.sin().repeat(1, 2)[:, None]
        half = HEAD_DIM // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def layer(entry, residual, prefix):
        q, k, v = (linear(entry, f"{prefix}self_attn.{n}_proj").unflatten(-1, (-1, HEAD_DIM)) for n in "qkv")
        if f"{prefix}self_attn.q_norm.weight" in tensors:
            q, k = norm(q, f"{prefix}self_attn.q_norm"), norm(k, f"{prefix}self_attn.k_norm")
        q, k, count = turned(q), turned(k).repeat_interleave(HEADS // GROUPS, 1), len(q)
        scores = torch.einsum("qhd,khd->hqk", q, k) * HEAD_DIM**-0.5
        distance = torch.arange(count)[:, None] - torch.arange(count)
        seen = (distance >= 0) & (distance < (options["window"] or count))
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        attended = torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(HEADS // GROUPS, 1)).flatten(1)
        hidden = residual + linear(attended, prefix + "self_attn.o_proj")
        x = norm(hidden, prefix + "post_attention_layernorm")
        gate = torch.nn.functional.silu(linear(x, prefix + "mlp.gate_proj"))
        return hidden + linear(gate * linear(x, prefix + "mlp.up_proj"), prefix + "mlp.down_proj")

    def head(tokens, states):
        embeds = tensors.get("embed_tokens.weight", target.model.embed_tokens.weight)[tokens]
        if "midlayer.hidden_norm.weight" in tensors:
            normed = norm(states, "midlayer.hidden_norm")
            residual = normed if options["residual"] == "normed" else states
            hidden = layer(torch.cat([norm(embeds, "midlayer.input_layernorm"), normed], -1), residual, "midlayer.")
        else:
            entry = linear(torch.cat([embeds, states], -1), "fc")
            hidden = layer(entry, entry, "layers.0.")
        number = 1
        while f"layers.{number}.mlp.up_proj.weight" in tensors:
            hidden = layer(norm(hidden, f"layers.{number}.input_layernorm"), hidden, f"layers.{number}.")
            number += 1
        read = hidden if options["norm"] == "none" or "norm.weight" not in tensors else norm(hidden, "norm")
        return read if options["norm"] == "both" else hidden, read

    own = target(ids[None, :-1], output_hidden_states=True).hidden_states
    if "midlayer.hidden_norm.weight" in tensors:
        layers = [own[each][0] for each in options.get("hidden_states", (2, len(own) // 2, len(own) - 4))]
        if "fc_norm.0.weight" in tensors:
            layers = [norm(each, f"fc_norm.{number}") for number, each in enumerate(layers)]
        fused = torch.cat(layers, -1)
        states = linear(norm(fused, "input_norm") if "input_norm.weight" in tensors else fused, "fc")
    else:
        states = own[-1][0]
    tokens, found = ids[1:], []
    for token in [*drafted, None]:
        after, read = head(tokens, states)
        weight = tensors.get("lm_head.weight", target.lm_head.weight)
        found.append((read[-1] @ weight.T).log_softmax(-1))
        states, tokens = torch.cat([states, after[-1:]]), torch.cat([tokens, torch.tensor([token or 0])])
    return found


def tree_of(pair, ids, sinks=4, capacity=500, tokens=0, plan=None):
    """The first tree after a prompt whose last token is the root."""
    target = Target(pair.engine, 1000, taps=pair.draft.taps)
    draft = pair.draft.start(capacity, 60, tokens, CacheConfig(sinks=sinks))
    target.prefill(ids[:-1], lambda chunk: draft.observe(ids[:-1], chunk))
    draft.prefill(ids[:-1], None)
    draft.begin(int(ids[-1]))
    return draft.propose(plan or Plan(20, 3, 3))


@torch.no_grad()
def check(pair, config, tensors, ids=None, **options):
    """Compare every path of the first tree with the naive forward."""
    ids = prompt_of(30) if ids is None else ids
    tree, table = tree_of(pair, ids, **options), tensors.get("d2t")
    column = {
        int(i + (table[i] if table is not None else 0)): i
        for i in range(len(tensors.get("lm_head.weight", [0] * VOCAB)))
    }
    for node in range(1, len(tree)):
        tokens = tree.tokens[tree.path(node)[1:]].tolist()
        steps = naive(config, tensors, pair.target, ids, tokens[:-1])
        score = sum(float(step[column[token]]) for step, token in zip(steps, tokens, strict=True))
        assert abs(score - float(tree.scores[node])) < 1e-4, f"{tokens}: {score} instead of {tree.scores[node]}"


@pytest.fixture(scope="module")
def target():
    return tiny_target()


def ones(count, seed=3):
    return 1 + 0.3 * torch.randn(count, generator=torch.Generator().manual_seed(seed))


FC_NORM = {f"fc_norm.{number}.weight": ones(HIDDEN, number) for number in range(3)}
QK_NORM = {f"midlayer.self_attn.{name}_norm.weight": ones(HEAD_DIM, ord(name)) for name in "qk"}
BIASES = {
    **{
        f"midlayer.self_attn.{name}_proj.bias": ones(rows, 7)
        for name, rows in zip("qkvo", (48, 24, 24, 48), strict=True)
    },
    "midlayer.mlp.down_proj.bias": ones(HIDDEN, 8),
    "fc.bias": ones(HIDDEN, 9),
}
# What the config and the file say beyond a plain EAGLE-3 head's, and what that means.
VARIANTS = {
    "plain": ({}, {}, {}),
    "rope_theta": ({"rope_theta": 500.0}, {}, {"theta": 500.0}),
    "rope_parameters": ({"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}, {}, {"theta": 77.0}),
    "fc_norm": ({"fc_norm": True, "norm_output": True, "eagle_config": {}}, FC_NORM, {}),
    "norm_output off": ({"norm_output": False, "architectures": ["LlamaForCausalLMEagle3"]}, {}, {"norm": "none"}),
    "norm_output of speculators": ({"norm_output": True, "speculators_model_type": "eagle3"}, {}, {"norm": "both"}),
    "EAGLE-3.1": (
        {"norm_output": True, "fc_norm": True, "speculators_model_type": "eagle3"}, FC_NORM, {"norm": "both"},
    ),
    "norm_before_residual": (
        {"norm_before_residual": True, "speculators_model_type": "eagle3"}, {}, {"residual": "normed"},
    ),
    "input_norm": ({"eagle_config": {"norm_before_fc": True}}, {"input_norm.weight": ones(3 * HIDDEN)}, {}),
    "qk norm": ({}, QK_NORM, {}),
    "biases": ({"attention_bias": True}, BIASES, {}),
    "own embeddings": ({}, {"embed_tokens.weight": torch.randn(VOCAB, HIDDEN, generator=torch.Generator())}, {}),
    "layers as inputs": ({"eagle_aux_hidden_state_layer_ids": [1, 5, 6]}, {}, {"hidden_states": (1, 5, 6)}),
    "layers as outputs": (
        {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 5, 6]}}, {}, {"hidden_states": (2, 6, 7)},
    ),
    "layers copied verbatim": ({"eagle_aux_hidden_state_layer_ids": [1, 3, 4]}, {}, {"hidden_states": (2, 4, 5)}),
    "sliding window": (
        {"transformer_layer_config": {"layer_types": ["sliding_attention"], "sliding_window": 6}}, {}, {"window": 6},
    ),
}  # fmt: skip


def test_levels_of_different_widths(target, tmp_path):
    config, tensors = flat_config(), head_tensors()
    pair = couple(target, save(tmp_path, config, tensors))
    check(pair, config, tensors, plan=Plan(17, 3, 7, shape=(2, 5, 7, 2)))


@pytest.mark.parametrize("name", VARIANTS)
def test_eagle3_variants(target, tmp_path, name):
    config, extra, meaning = VARIANTS[name]
    tensors = head_tensors() | extra
    check(couple(target, save(tmp_path, flat_config(**config), tensors)), meaning, tensors)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "plain"])
def test_variants_matter(target, tmp_path, name):
    """What a variant means is not what a plain head computes."""
    config, extra, meaning = VARIANTS[name]
    tensors = head_tensors() | extra
    folder = save(tmp_path, flat_config(**config), tensors)
    plain = {"hidden_states": (1, 3, 4)} if name == "layers copied verbatim" else {}
    with pytest.raises(AssertionError, match="instead of"):
        check(couple(target, folder), plain, head_tensors() if extra else tensors)
    assert meaning or extra


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layers", [1, 2])
def test_eagle1(target, tmp_path, bias, layers):
    tensors = head_tensors(EAGLE1, layers=layers)
    if not bias:
        del tensors["fc.bias"]
    tensors |= {f"layers.0.self_attn.{name}_proj.bias": ones(rows) for name, rows in (("q", 48), ("k", 24), ("v", 24))}
    check(couple(target, save(tmp_path, flat_config(bias=not bias, qkv_bias=True), tensors)), {}, tensors)


def test_several_layers(target, tmp_path):
    tensors = head_tensors(layers=3)
    check(couple(target, save(tmp_path, flat_config(num_hidden_layers=3), tensors)), {}, tensors)


@pytest.mark.parametrize("family", ["Qwen2", "Mixtral", "Gemma2", "GPTNeoX"])
def test_features_of_any_target(tmp_path, family):
    """EAGLE-1 reads what the LM head reads, whatever the norms before it are called."""
    other = tiny_target(family, **({"num_key_value_heads": HEADS} if family == "GPTNeoX" else {}))
    pair = couple(other, save(tmp_path, flat_config(), head_tensors(EAGLE1)))
    target, ids = Target(pair.engine, 40, taps=pair.draft.taps), prompt_of(30)
    states = pair.draft.states(pair.draft.features(target.prefill(ids)))
    with torch.no_grad():
        own = other(ids[None], output_hidden_states=True).hidden_states[-1][0]
    torch.testing.assert_close(states, own, atol=1e-4, rtol=1e-4)


DIALECTS = ("official", "SpecForge", "speculators", "flat speculators")


def in_dialect(folder, dialect, tensors, **more):
    """The same EAGLE-3 head as each trainer saves it. The layers named are the default ones of a target of 8."""
    if dialect == "official":
        return save(folder, flat_config(**more), tensors)
    if dialect == "SpecForge":
        config = flat_config(
            architectures=["LlamaForCausalLMEagle3"], draft_vocab_size=DRAFT_VOCAB, head_dim=HEAD_DIM,
            eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 3, 4], "use_aux_hidden_state": True}, **more,
        )  # fmt: skip
        return save(folder, config, tensors, "model.safetensors")
    renamed = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}
    if "d2t" in renamed:
        renamed["d2t"] = renamed["d2t"].int()
    outer = {"speculators_model_type": "eagle3", "draft_vocab_size": DRAFT_VOCAB, "norm_before_residual": False}
    outer |= {"architectures": ["Eagle3Speculator"], "eagle_aux_hidden_state_layer_ids": [2, 4, 5]}
    inner = flat_config(**more)
    flat = inner | {"eagle_aux_hidden_state_layer_ids": [2, 4, 5]}
    config = flat if dialect == "flat speculators" else outer | {"transformer_layer_config": inner}
    renamed["verifier_lm_head.weight"] = torch.zeros(VOCAB, HIDDEN)
    return save(folder, config, renamed, "model.safetensors")


def test_one_head_in_every_dialect_gives_one_tree(target, tmp_path):
    trees = []
    for dialect in DIALECTS:
        folder = in_dialect(tmp_path / dialect, dialect, head_tensors())
        assert kind_of(folder) == "eagle"
        assert read_head(folder)[0].dialect == dialect.removeprefix("flat ")
        trees.append(tree_of(couple(target, folder), prompt_of(50)))
    for tree in trees[1:]:
        for name in ("tokens", "parents", "scores"):
            assert torch.equal(getattr(tree, name), getattr(trees[0], name))


def test_shards_and_prefixes(target, tmp_path):
    tensors = {f"model.{name}": tensor for name, tensor in head_tensors().items()}
    folder, names = tmp_path / "shards", sorted(tensors)
    for number in (1, 2):
        part = {name: tensors[name] for name in names[number - 1 :: 2]}
        save(folder, flat_config(), part, f"model-0000{number}-of-00002.safetensors")
    whole = in_dialect(tmp_path / "whole", "official", head_tensors())
    trees = [tree_of(couple(target, str(each)), prompt_of(50)) for each in (folder, whole)]
    assert torch.equal(trees[0].scores, trees[1].scores)
    assert kind_of(str(folder)) == "eagle"


def test_safetensors_go_before_pickles(target, tmp_path):
    folder = in_dialect(tmp_path, "official", head_tensors(seed=1))
    save(tmp_path, flat_config(), head_tensors(seed=2), "model.safetensors")
    assert torch.equal(read_head(folder)[1]["fc.weight"], head_tensors(seed=2)["fc.weight"])


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "key",
    [
        "fc.weight",
        "midlayer.self_attn.k_proj.weight",
        "midlayer.hidden_norm.weight",
        "norm.weight",
        "lm_head.weight",
        "d2t",
    ],
)
def test_a_missing_key_is_named(tmp_path, dialect, key):
    tensors = head_tensors()
    del tensors[key]
    folder = in_dialect(tmp_path, dialect, tensors)
    assert kind_of(folder) == "eagle"
    shown = key if dialect in ("official", "SpecForge") else key.replace("midlayer.", "layers.0.")
    with pytest.raises(
        RuntimeError, match=f"lacks {shown}, read as an EAGLE-3 head in the {dialect.removeprefix('flat ')} dialect"
    ):
        read_head(folder)


@pytest.mark.parametrize(
    ("kind", "key", "message"),
    [
        (
            EAGLE3,
            "midlayer.extra.weight",
            r"the unknown key midlayer.extra.weight, read as an EAGLE-3 head in the official",
        ),
        (EAGLE3, "fusion.weight", r"the unknown key fusion.weight"),
        (
            EAGLE1,
            "layers.0.input_layernorm.weight",
            r"unknown key layers.0.input_layernorm.weight, read as an EAGLE-1/2 head",
        ),
        (EAGLE1, "embed_layernorm.weight", r"the unknown key embed_layernorm.weight, read as an EAGLE-1/2 head"),
        (EAGLE3, "mask_hidden", "not supported: it is P-EAGLE"),
        (EAGLE3, "midlayer.self_attn.q_a_proj.weight", "not supported: its attention is multi-head latent"),
    ],
)
def test_an_unknown_key_is_named(tmp_path, kind, key, message):
    with pytest.raises(RuntimeError, match=message):
        read_head(save(tmp_path, flat_config(), head_tensors(kind) | {key: torch.ones(HIDDEN)}))


def test_a_missing_key_of_eagle1_is_named(tmp_path):
    tensors = head_tensors(EAGLE1)
    del tensors["layers.0.mlp.up_proj.weight"]
    with pytest.raises(RuntimeError, match=r"lacks layers.0.mlp.up_proj.weight, read as an EAGLE-1/2 head"):
        read_head(save(tmp_path, flat_config(), tensors))


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({"num_attention_heads": None}, {}, r"config.json gives no num_attention_heads \(found None\)"),
        ({"num_attention_heads": 5}, {}, "48 rows of q_proj cannot be 5 heads"),
        ({"target_hidden_size": 50}, {}, "no multiple of the target's hidden size 50"),
        ({"norm_before_fc": True}, {}, "lacks input_norm.weight"),
        ({"fc_norm": True}, {}, "lacks fc_norm.0.weight"),
        ({}, {"norm.weight": torch.ones(7)}, r"norm.weight is \[7\], not \[48\]"),
        ({}, FC_NORM | {"input_norm.weight": torch.ones(144)}, "fc_norm and input_norm, where only one makes sense"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, {}, "rotates by rope_type 'su'; known are default, linear"),
        ({"speculators_model_type": "peagle"}, {}, "not supported: its speculators_model_type is peagle"),
        ({"dflash_config": {"mask_token_id": 1}}, {}, "it is a block drafter"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, config, change, message):
    with pytest.raises(RuntimeError, match=message):
        read_head(save(tmp_path, flat_config(**config), head_tensors() | change))


def test_pickled_code_is_not_run(tmp_path):
    save(tmp_path, flat_config(), head_tensors())
    torch.save({"fc.weight": print}, tmp_path / "pytorch_model.bin")
    check_files(str(tmp_path), "draft")
    with pytest.raises(RuntimeError, match="pickled code, which is never run"):
        kind_of(str(tmp_path))


def test_a_head_narrower_than_its_target(target, tmp_path):
    tensors = head_tensors(hidden=24, target_hidden=HIDDEN)
    config = flat_config(hidden_size=24, target_hidden_size=HIDDEN)
    with pytest.raises(ValueError, match=r"lacks embed_tokens.weight; the target's embeddings are not 24 wide"):
        couple(target, save(tmp_path, config, tensors))
    tensors["embed_tokens.weight"] = torch.randn(VOCAB, 24)
    check(couple(target, save(tmp_path, config, tensors)), {}, tensors)


class TestVocabulary:
    def test_a_full_one_needs_no_table(self, target, tmp_path):
        tensors = {name: tensor for name, tensor in head_tensors().items() if name not in ("d2t", "t2d")}
        tensors["lm_head.weight"] = torch.randn(VOCAB, HIDDEN)
        pair = couple(target, save(tmp_path, flat_config(), tensors))
        assert pair.draft.vocabulary is None
        check(pair, {}, tensors)

    def test_ids_beyond_the_target_are_never_drafted(self, tmp_path):
        tensors = head_tensors() | {"d2t": torch.arange(DRAFT_VOCAB)}  # every second id, up to twice as many
        tensors["lm_head.weight"][VOCAB // 2 :] *= 50  # whose logits would win
        pair = couple(tiny_target(), save(tmp_path, flat_config(vocab_size=2 * VOCAB), tensors))
        assert pair.draft.vocabulary.tolist() == list(range(0, VOCAB, 2))
        assert int(tree_of(pair, prompt_of(30)).tokens.max()) < VOCAB

    def test_a_table_that_repeats_is_refused(self, target, tmp_path):
        tensors = head_tensors() | {"d2t": -torch.arange(DRAFT_VOCAB)}
        with pytest.raises(ValueError, match="d2t maps two rows to one token"):
            couple(target, save(tmp_path, flat_config(), tensors))

    def test_copies_of_the_targets_tables_are_shared(self, target, tmp_path):
        tensors = head_tensors(EAGLE1)
        tensors["embed_tokens.weight"] = target.model.embed_tokens.weight.detach()
        pair = couple(target, save(tmp_path, flat_config(), tensors))
        assert pair.draft.head.embedding is target.model.embed_tokens
        assert pair.draft.head.lm_head is target.lm_head


class TestContext:
    """draft_context is what a head was trained for, not what its config claims."""

    @pytest.mark.parametrize(
        ("claimed", "asked", "context", "source"),
        [
            (2048, None, 2048, "its config's max_position_embeddings"),
            (40960, None, 4096, "trained for at most (its config claims 40960)"),
            (40960, 2048, 2048, "asked for"),
            (None, None, 4096, "max_position_embeddings"),
        ],
    )
    def test_sources(self, target, tmp_path, claimed, asked, context, source):
        draft = couple(
            target, save(tmp_path, flat_config(max_position_embeddings=claimed), head_tensors()), asked
        ).draft
        assert draft.draft_context == context
        assert source in draft.context_source

    def test_of_a_nested_config(self, target, tmp_path):
        folder = in_dialect(tmp_path, "speculators", head_tensors(), max_position_embeddings=1234)
        assert couple(target, folder).draft.draft_context == 1234


ROPES = {
    "linear": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"factor": 8.0, "original_max_position_embeddings": 256},
    "yarn with mscale": {"factor": 8.0, "original_max_position_embeddings": 256, "mscale": 1.0, "mscale_all_dim": 0.5},
    "yarn untruncated": {"factor": 8.0, "original_max_position_embeddings": 256, "truncate": False, "beta_fast": 16},
}


@pytest.mark.parametrize("name", ROPES)
def test_rotations_are_those_of_transformers(name):
    """Also where a config spells them as older releases of transformers did."""
    kind = name.split()[0]
    for spelled in ({"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **ROPES[name]}},
                    {"rope_scaling": {"type": kind, **ROPES[name]}, "rope_theta": 500.0}):  # fmt: skip
        config = json.loads(json.dumps({"max_position_embeddings": 2048, **spelled}))
        found, attention = rotation(rope_options(config), 64, CPU)
        parameters = {"rope_type": kind, "rope_theta": 500.0, **ROPES[name]}
        own = LlamaConfig(head_dim=64, max_position_embeddings=2048, rope_parameters=parameters)
        expected, factor = ROPE_INIT_FUNCTIONS[kind](own, CPU)
        torch.testing.assert_close(found.inv_freq, expected)
        assert attention == pytest.approx(factor)
        assert found.inv_freq.dtype == torch.float32


def test_a_head_without_a_base_rotates_by_10000():
    assert rope_options({})["rope_theta"] == 10000.0
    nested = {"rope_parameters": {"sliding_attention": {"rope_theta": 5.0}, "full_attention": {"rope_theta": 7.0}}}
    assert rope_options(nested)["rope_theta"] == 5.0
    assert rope_options(nested | {"layer_types": ["full_attention"]})["rope_theta"] == 7.0
    found, _ = rotation(rope_options({}), 4, CPU)
    assert found.inv_freq.tolist() == pytest.approx([1.0, 0.01])


def test_tables_are_float32_at_any_length():
    """In bfloat16 the positions 4000 and 4007 would be the same."""
    found, _ = rotation(rope_options({}), 64, CPU)
    keys, at = torch.randn(1, 1, 8, 64).bfloat16(), torch.arange(4000, 4008)
    angles = at.double()[:, None] * 10000.0 ** -(torch.arange(0, 64, 2).double() / 64)
    first, second = keys.double().chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    expected = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    torch.testing.assert_close(found.move(keys, at).double(), expected, atol=2e-2, rtol=1e-2)


def test_layers_copied_verbatim_are_told(target, tmp_path):
    config = flat_config(eagle_aux_hidden_state_layer_ids=[1, 3, 4])
    about = couple(target, save(tmp_path, config, head_tensors())).draft.about
    assert any("names layers [1, 3, 4] where ids mean inputs" in line for line in about)
