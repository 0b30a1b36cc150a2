"""A grown Llama computes what the small one computed; what growing gets wrong would show."""

import pytest
import torch
from conftest import FIXED, noised, pair

from specx.eval.growth import PAIRS, PairShape, Shape, grow, grown_pair, head_sources, layer_places, rotary_places
from specx.hf import HFModel
from specx.target import Target

# tiny_llama: hidden 64, 3 layers, 4 heads of 16 dims, 2 KV heads, ffn 128, vocabulary 64
SHAPES = {
    "same": Shape("same", 64, 3, 4, 2, 16, 128, 64),
    "wider": Shape("wider", 256, 3, 4, 2, 16, 128, 64),
    "heads of 64": Shape("dim", 64, 3, 4, 2, 64, 128, 64),
    "groups of 4": Shape("groups", 64, 3, 8, 2, 16, 128, 64),
    "more KV heads": Shape("spare", 64, 3, 10, 5, 16, 128, 64),
    "KV heads twice": Shape("twice", 64, 3, 6, 6, 16, 128, 64),
    "KV heads partly twice": Shape("partly", 64, 3, 4, 4, 16, 128, 64),
    "deeper": Shape("deeper", 64, 7, 4, 2, 16, 128, 64),
    "more units": Shape("ffn", 64, 3, 4, 2, 16, 300, 64),
    "more ids": Shape("vocab", 64, 3, 4, 2, 16, 128, 500),
    "all": Shape("all", 256, 7, 16, 4, 64, 300, 500),
    "all, KV heads twice": Shape("all", 256, 7, 8, 8, 64, 300, 500),
}


def ids_of(length=60):
    return torch.randint(0, 64, (1, length), generator=torch.Generator().manual_seed(3))


def logits(model, vocab=64):
    with torch.no_grad():
        return model(ids_of()).logits[0, :, :vocab].double()


def largest_difference(model, grown):
    return (logits(model) - logits(grown)).abs().max().item()


@pytest.mark.parametrize("name", SHAPES)
def test_logits_stay_in_float32(tiny, name):
    shape = SHAPES[name]
    grown = grow(tiny, shape)
    assert largest_difference(tiny, grown) == 0.0
    config = grown.config
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (
        shape.hidden, shape.layers, shape.vocab,
    )  # fmt: skip
    assert (config.num_attention_heads, config.num_key_value_heads) == (shape.heads, shape.kv_heads)
    assert (config.head_dim, config.intermediate_size) == (shape.head_dim, shape.ffn)


@pytest.mark.parametrize("name", SHAPES)
def test_argmax_stays_in_bfloat16(tiny, name):
    small = grow(tiny, SHAPES["same"], dtype=torch.bfloat16)  # not .bfloat16(), which rounds rotary frequencies too
    grown = grow(small, SHAPES[name])
    assert grown.dtype == torch.bfloat16
    assert torch.equal(logits(small).argmax(-1), logits(grown, None).argmax(-1))


def test_a_wrong_rule_shows(tiny):
    grown = grow(tiny, SHAPES["wider"])
    for module in grown.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = tiny.config.rms_norm_eps
    assert largest_difference(tiny, grown) > 1e-4
    grown = grow(tiny, SHAPES["heads of 64"])
    with torch.no_grad():
        grown.model.layers[0].self_attn.q_proj.weight.mul_(0.5)
    assert largest_difference(tiny, grown) > 1e-2


def test_what_does_not_matter_is_random_and_seeded(tiny):
    shape = SHAPES["all"]
    first, again, other = grow(tiny, shape), grow(tiny, shape), grow(tiny, shape, seed=1)
    for (name, one), two, three in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        if not name.endswith(("o_proj.weight", "down_proj.weight")):  # these keep what is random from mattering
            assert not torch.equal(one, three)
            assert (one != 0).double().mean() > 0.2
    assert largest_difference(first, other) < 1e-4


def test_the_small_model_stays_as_it_was(tiny):
    before = {name: weight.clone() for name, weight in tiny.state_dict().items()}
    grow(tiny, SHAPES["all"])
    assert all(torch.equal(weight, before[name]) for name, weight in tiny.state_dict().items())
    assert tiny.config.hidden_size == 64


def test_the_scored_layer_and_the_last_one_stay_real(tiny):
    assert layer_places(12, 32) == [0, 3, 5, 8, 11, 13, 16, 19, 21, 24, 28, 31]
    for old in range(1, 14):
        for new in range(old, 40):
            places = layer_places(old, new)
            assert places == sorted(set(places))
            assert len(places) == old
            assert places[-1] == new - 1
            if 3 * old // 4 < old - 1:
                assert places[3 * old // 4] == 3 * new // 4
    grown = grow(tiny, SHAPES["deeper"])
    real = [bool(layer.self_attn.o_proj.weight.any()) for layer in grown.model.layers]
    assert [number for number, each in enumerate(real) if each] == layer_places(3, 7)


def test_heads_and_dims_by_hand():
    assert head_sources(8, 2, 32, 8) == ([*range(8)] * 4, [0, 1] * 4)
    assert head_sources(8, 2, 32, 32) == ([*range(8)] * 4, [0, 0, 0, 0, 1, 1, 1, 1] * 4)
    assert head_sources(4, 2, 16, 4) == ([0, 1, 0, 1, 2, 3, 2, 3] * 2, [0, 1, 0, 1])
    assert head_sources(6, 2, 6, 6) == ([0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 1, 1])
    assert head_sources(6, 2, 8, 4) == ([0, 1, 2, 2, 3, 4, 5, 5], [0, 0, 1, 1])
    assert rotary_places(4, 16) == [0, 4, 8, 12]
    assert rotary_places(8, 8) == list(range(8))


def test_what_retrieval_reads_stays(tiny, prompt_of):
    """All heads of the scored layer count, also those whose output is dropped."""
    ids, scores = prompt_of(200), []
    for model in (tiny, grow(tiny, SHAPES["all"]), grow(tiny, SHAPES["all, KV heads twice"])):
        layer = layer_places(3, len(model.model.layers))[2]
        target = Target(HFModel(model), 300, layer)
        target.prefill(ids)
        scores.append(target.chunk_scores(-1, 8))
    torch.testing.assert_close(scores[1], scores[0])
    torch.testing.assert_close(scores[2], scores[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": 128}, "hidden 128 cannot be grown to exactly: it must be 64 times 1, 4, 16"),
        ({"head_dim": 32}, "head_dim 32 cannot be grown to exactly: it must be 16"),
        ({"layers": 2}, "layers must be at least 3, the small model's; got 2"),
        ({"ffn": 100}, "ffn must be at least 128"),
        ({"vocab": 60}, "vocab must be at least 64"),
        ({"heads": 5}, "5 query heads cannot share 2 key heads"),
        ({"heads": 2, "kv_heads": 2}, "kv_heads must be at least 4 with 2 heads"),
        ({"kv_heads": 1}, "kv_heads must be at least 2 with 4 heads"),
    ],
)
def test_refusals(tiny, changes, message):
    values = {
        "name": "x",
        "hidden": 64,
        "layers": 3,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "ffn": 128,
        "vocab": 64,
    }
    with pytest.raises(ValueError, match=message):
        grow(tiny, Shape(**(values | changes)))


def test_a_grown_pair_drafts_and_accepts_as_the_small_one(tiny, prompt_of):
    draft = noised(tiny, 0.02)
    small = pair(tiny, draft, settings=FIXED.override(draft_context=128))
    shape = PairShape("both", SHAPES["all"], SHAPES["all, KV heads twice"])
    grown = grown_pair(small, shape)
    assert grown.draft.draft_context == small.draft.draft_context
    assert grown.draft.vocab == 500
    for policy in ("full", "retrieval"):
        ids = prompt_of(300)
        ours, theirs = (model.generate(ids, max_new_tokens=24, policy=policy, trace=True) for model in (grown, small))
        assert ours.tokens == theirs.tokens
        # ids that there are none take a little of the draft's probability, and so may change a tree
        assert abs(ours.stats["tau"] - theirs.stats["tau"]) < 0.15 * theirs.stats["tau"]
    grown.draft = None
    with pytest.raises(ValueError, match="only a pair with a classic draft"):
        grown_pair(grown, shape)


def test_the_shapes_fit_the_bundled_pair():
    """Checked on the configs alone: nobody wants 7B weights here."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from specx.adapters.names import locate
    from specx.eval import growth

    for shapes in PAIRS:
        for role in ("target", "draft"):
            with torch.device("meta"):
                model = LlamaForCausalLM(LlamaConfig.from_pretrained(locate("demo", role)))
            growth._check(model, getattr(shapes, role))
    sizes = {shapes.name: parameters(shapes.target) for shapes in PAIRS}
    assert sizes == {"7B": pytest.approx(6.74e9, rel=0.01), "8B": pytest.approx(8.03e9, rel=0.01)}
    assert [parameters(shapes.draft) for shapes in PAIRS] == [
        pytest.approx(68e6, rel=0.01),
        pytest.approx(216e6, rel=0.01),
    ]


def parameters(shape):
    attention = 2 * shape.hidden * shape.head_dim * (shape.heads + shape.kv_heads)
    return 2 * shape.vocab * shape.hidden + shape.layers * (attention + 3 * shape.hidden * shape.ffn)
