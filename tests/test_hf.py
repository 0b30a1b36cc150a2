"""What hf.py promises: a model that cannot run trees is refused with a reason; taps and scores are the model's own."""

import contextlib
import copy
from typing import Any

import pytest
import torch
import transformers
from conftest import noised, pair, tiny_llama
from test_lossless import BASE, FAMILIES, LONGROPE, MOE, SLIDING, family, untouched
from transformers import PreTrainedModel

import specx.hf
import specx.target
from specx import attention
from specx.hf import HFModel
from specx.hf_config import end_ids
from specx.target import Target
from specx.tree import DraftTree

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MIXED = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8, "intermediate_size": 32}
TREE = DraftTree(  # two branches, the deeper one out of order
    tokens=torch.tensor([5, 9, 11, 7, 23, 42]),
    parents=torch.tensor([-1, 0, 0, 2, 1, 3]),
    depths=torch.tensor([0, 1, 1, 2, 2, 3]),
    scores=torch.zeros(6),
)


def made(name: str, model: str = "", **overrides: Any) -> PreTrainedModel:
    """A small random model: its config's name and, where that differs, its class's."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(SMALL | overrides))
    return getattr(transformers, model or f"{name}ForCausalLM")(config).eval()


def read(model: PreTrainedModel, ids: torch.Tensor, **options: Any) -> tuple[Target, Any]:
    """Prefill a prompt and verify TREE behind it."""
    target = Target(HFModel(model), len(ids) + 16, **options)
    target.prefill(ids)
    return target, target.verify(TREE)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(specx.target, "PREFILL_CHUNK", 16)


REFUSED = {
    "bloom": (lambda: made("Bloom", n_head=4), "do not use transformers' attention interface"),
    "falcon": (lambda: made("Falcon"), "do not use transformers' attention interface"),
    "gptj": (
        lambda: made("GPTJ", n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
        "do not use transformers' attention interface",
    ),
    "mamba": (lambda: made("Mamba"), "carry a state that cannot branch"),
    "qwen3-next": (lambda: made("Qwen3Next", **MIXED, **MOE), "carry a state that cannot branch"),
    "minimax": (lambda: made("MiniMax", **MIXED, **MOE), "layers of type linear_attention cannot run a tree"),
    "lfm2": (
        lambda: made("Lfm2", layer_types=["conv", "full_attention"], intermediate_size=32),
        "layers of type conv cannot run a tree",
    ),
    "llama4": (
        lambda: made("Llama4Text", "Llama4ForCausalLM", attention_chunk_size=16, num_local_experts=2, head_dim=8),
        "layers of type chunked_attention cannot run a tree",
    ),
    "chunk size": (lambda: tiny_llama(attention_chunk_size=16), "chunked attention is held only in a mask"),
    "t5": (lambda: made("T5", "T5ForConditionalGeneration", d_kv=8, d_ff=32), "is an encoder-decoder model"),
    "bart": (
        lambda: made("Bart", "BartForConditionalGeneration", encoder_layers=1, decoder_layers=1, pad_token_id=1),
        "is an encoder-decoder model",
    ),
    "bert": (lambda: made("Bert", "BertLMHeadModel", intermediate_size=32), "tree's logits differ"),
    "doge": (lambda: made("Doge"), "DogeAttention makes an attention mask of its own"),
    "phimoe": (
        lambda: made("Phimoe", sliding_window=16, num_local_experts=2),
        "the sliding window of layer 0 is held only in a mask",
    ),
    "qwen2-moe": (
        lambda: made("Qwen2Moe", use_sliding_window=True, sliding_window=99, max_window_layers=1, **MOE),
        "the sliding window of layer [01] is held only in a mask",
    ),
    "no head": (lambda: made("Llama", "LlamaModel"), "has no language model head"),
    "training": (lambda: tiny_llama().train(), "is in training mode: call model.eval"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refuses(kind):
    make, reason = REFUSED[kind]
    model = make()
    with pytest.raises(ValueError, match=f"cannot be enhanced: .*{reason}"):
        HFModel(model)
    assert model not in specx.hf._checked
    assert not any("_specx_call" in vars(module) for module in model.modules())
    assert model.config._attn_implementation != specx.hf.IMPLEMENTATION


def test_names_the_refused_class():
    with pytest.raises(ValueError, match=r"^FalconForCausalLM cannot be enhanced"):
        HFModel(made("Falcon"))


def ignore_the_interface(layer: torch.nn.Module) -> None:
    """Make an attention layer mean over all earlier rows, without asking anyone."""

    def forward(hidden_states, **_):
        rows = torch.arange(1, hidden_states.shape[1] + 1)
        return hidden_states.cumsum(1) / rows[:, None], None

    layer.forward = forward


def ignore_the_mask(layer: torch.nn.Module) -> None:
    """Make an attention layer call the interface, but mix all earlier rows of a forward into what comes back."""
    forward = layer.forward

    def leaky(hidden_states, **options):
        out, weights = forward(hidden_states, **options)
        return out + 0.1 * (hidden_states.cumsum(1) - hidden_states), weights

    layer.forward = leaky


def test_refuses_a_model_that_ignores_the_mask():
    model = tiny_llama(seed=8)
    ignore_the_mask(model.model.layers[1].self_attn)
    with pytest.raises(ValueError, match="a tree's logits differ by"):
        HFModel(model)


@pytest.mark.parametrize("layers", [[1], [0, 1, 2]])
def test_refuses_layers_that_ignore_the_interface(layers):
    model = tiny_llama(seed=8)
    for layer in layers:
        ignore_the_interface(model.model.layers[layer].self_attn)
    with pytest.raises(ValueError, match=f"{3 - len(layers)} of its 3 layers use the attention interface"):
        HFModel(model)


def test_refuses_a_wrong_tree_mask(monkeypatch):
    real = specx.hf.Call

    def causal(prefix, positions, mask, *rest):
        return real(prefix, positions, None, *rest)

    monkeypatch.setattr(specx.hf, "Call", causal)
    with pytest.raises(ValueError, match="a tree's logits differ by"):
        HFModel(tiny_llama(seed=8))


def test_refuses_training_mode_also_after_the_check():
    model = tiny_llama(seed=8)
    HFModel(model)
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        HFModel(model)


def test_checks_a_model_object_once(monkeypatch):
    calls = []
    check = specx.hf.self_check
    monkeypatch.setattr(specx.hf, "self_check", lambda wrapped: (calls.append(wrapped.model), check(wrapped)))
    first, second = tiny_llama(seed=8), tiny_llama(seed=8)
    for model in (first, first, second, first):
        HFModel(model)
    HFModel(first, "reference", hybrid=False)
    assert calls == [first, second]
    HFModel(copy.deepcopy(first))
    assert len(calls) == 3


def test_a_refused_model_is_refused_again():
    model = tiny_llama(seed=8)
    ignore_the_mask(model.model.layers[1].self_attn)
    for _ in range(2):
        with pytest.raises(ValueError, match="logits differ"):
            HFModel(model)


def test_the_attention_runs_only_inside():
    model = tiny_llama(seed=8)
    model.set_attn_implementation(specx.hf.IMPLEMENTATION)
    with pytest.raises(RuntimeError, match="set another attn_implementation"):
        model(torch.tensor([[1, 2, 3]]))


def test_leaves_the_parts_of_a_model_as_they_were():
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**(BASE | FAMILIES["gemma3"][2])),
        vision_config=transformers.SiglipVisionConfig(image_size=28, patch_size=14, **vision),
        image_token_index=95,
        boi_token_index=94,
        eoi_token_index=93,
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model.set_attn_implementation({"": "sdpa", "text_config": "sdpa", "vision_config": "eager"})
    HFModel(model)
    parts = (config, config.text_config, config.vision_config)
    assert [part._attn_implementation for part in parts] == ["sdpa", "sdpa", "eager"]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_leaves_the_implementation_as_it_was(implementation):
    model = tiny_llama(seed=8)
    model.set_attn_implementation(implementation)
    HFModel(model)
    assert untouched(model, implementation)


@pytest.mark.parametrize("prompt", [torch.ones(2, 5, dtype=torch.long), [[1, 2], [3, 4]], torch.ones(2, 1, 3).long()])
def test_refuses_a_batch(tiny_pair, prompt):
    with pytest.raises(ValueError, match="one prompt at a time"):
        tiny_pair.generate(prompt)


def test_takes_a_batch_of_one(tiny_pair, prompt_of):
    ids = prompt_of(12)
    expected = tiny_pair.generate(ids, max_new_tokens=8).tokens
    for prompt in (ids[None], ids.tolist(), [ids.tolist()], ids.int()):
        assert tiny_pair.generate(prompt, max_new_tokens=8).tokens == expected


@pytest.mark.parametrize(("given", "ids"), [(None, set()), (7, {7}), ([7, 9], {7, 9})], ids=["none", "one", "several"])
def test_end_ids(given, ids):
    model = tiny_llama(seed=8)
    model.generation_config.eos_token_id = given
    assert end_ids(model) == ids


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_of_a_tree(name, prompt_of, small_chunks):
    """Every node's logits are those of the plain model after the node's path, also behind a kept path."""
    model, ids = family(name), prompt_of(50)
    if name == "phi3-longrope":
        ids = prompt_of(70)
    target, out = read(model, ids)
    target.keep([0, 2])
    again = target.verify(TREE)
    for context, logits in ((ids, out.logits), (torch.cat([ids, TREE.tokens[[0, 2]]]), again.logits)):
        for node in range(len(TREE)):
            path = torch.cat([context, TREE.tokens[TREE.path(node)]])
            with torch.no_grad():
                own = model(path[None]).logits[0, -1]
            assert (own - logits[node]).abs().max() < 2e-5 * max(1.0, own.abs().max())


def hidden_states(model: PreTrainedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    """Hugging Face's hidden states, each [L, hidden], from a copy: asking for them leaves hooks behind."""
    with torch.no_grad():
        return [each[0] for each in copy.deepcopy(model)(ids[None], output_hidden_states=True).hidden_states]


@pytest.mark.parametrize("name", ["llama-gqa", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "gpt-oss", "opt"])
def test_taps_are_the_hidden_states(name, prompt_of, small_chunks):
    model, ids = family(name), prompt_of(50)
    target = Target(HFModel(model), 80, taps=(0, 1))
    chunks: list[Any] = []
    target.prefill(ids, lambda out: chunks.append(out.features))
    tree = target.verify(TREE).features
    own = hidden_states(model, ids)
    for layer in (0, 1):
        seen = torch.cat([features[layer] for features in chunks])
        assert torch.allclose(seen, own[layer + 1], rtol=1e-4, atol=1e-4)
    for node in range(len(TREE)):
        path = torch.cat([ids, TREE.tokens[TREE.path(node)]])
        own = hidden_states(model, path)
        for layer in (0, 1):
            assert torch.allclose(tree[layer][node], own[layer + 1][-1], rtol=1e-4, atol=1e-4)
    assert untouched(model, model.config._attn_implementation)


def test_the_last_tap_comes_before_the_norm(tiny, prompt_of):
    target = Target(HFModel(tiny), 80, taps=(2,))
    features = target.prefill(prompt_of(30)).features[2]
    with torch.no_grad():
        own = hidden_states(tiny, prompt_of(30))[-1]
        assert torch.allclose(tiny.model.norm(features), own, atol=1e-4)
    assert not torch.allclose(features, own, atol=1e-2)


@pytest.mark.parametrize("fails", [False, True])
def test_a_tapped_layer_keeps_a_forward_that_somebody_gave_it(prompt_of, fails):
    model, calls = copy.deepcopy(family("llama-gqa")), []
    engine, (first, layer) = HFModel(model), model.model.layers[:2]
    own = layer.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if fails:
            raise KeyError("theirs")
        return own(*args, **kwargs)

    layer.forward = counted
    with pytest.raises(KeyError) if fails else contextlib.nullcontext():
        Target(engine, 80, taps=(0, 1)).prefill(prompt_of(30))
    assert calls
    assert vars(layer)["forward"] is counted
    assert "forward" not in vars(first)


def own_scores(model: PreTrainedModel, ids: torch.Tensor, layer: int, chunk_size: int) -> torch.Tensor:
    """Chunk means of the last row of Hugging Face's own attention weights, without what a sink took."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    with torch.no_grad():
        row = twin(ids[None], output_attentions=True).attentions[layer][0, :, -1]
    row = (row / row.sum(-1, keepdim=True)).mean(0)
    return torch.stack([chunk.mean() for chunk in row.split(chunk_size)])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    "name", ["llama-mha", "llama-gqa", "llama-mqa", "qwen3", "phi3", "gemma2", "gemma3", "gpt-oss"]
)
def test_chunk_scores_are_the_models_attention(name, backend, prompt_of, small_chunks):
    model, ids = family(name), prompt_of(61)
    engine = HFModel(model, backend)
    layer = engine.score_layer()
    target = Target(engine, 100, score_layer=layer)
    target.prefill(ids)
    for size in (8, 61, 64):  # a partial last chunk, one whole chunk, less than one chunk
        expected = own_scores(model, ids, layer, size)
        assert torch.allclose(target.chunk_scores(-1, size), expected, rtol=1e-3, atol=1e-6)
    target.verify(TREE)
    target.keep([0, 2, 3])
    path = torch.cat([ids, TREE.tokens[[0, 2, 3]]])
    assert torch.allclose(target.chunk_scores(3, 8), own_scores(model, path, layer, 8), rtol=1e-3, atol=1e-6)


def test_no_scores_without_a_score_layer(tiny, prompt_of):
    target = Target(HFModel(tiny), 80)
    target.prefill(prompt_of(20))
    assert target.chunk_scores(-1, 8) is None


@pytest.mark.parametrize(
    ("name", "overrides", "layer"),
    [
        ("Llama", {}, 2),
        ("Mistral", {"sliding_window": 16}, None),
        ("Mistral", {"sliding_window": None}, 2),
        ("Phi3", {"sliding_window": 4096, "rope_parameters": LONGROPE}, 2),  # no position is further away
        ("Phi3", {"sliding_window": 4095}, None),
        ("Mistral", {"sliding_window": 4096, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}, None),
        ("Qwen2", {"sliding_window": 16, "use_sliding_window": False}, 2),
        ("Qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2}, 1),
        ("Gemma3Text", {"sliding_window": 16, "layer_types": SLIDING}, 1),
        ("Qwen2Moe", {"sliding_window": 16, "use_sliding_window": False, **MOE}, 2),
        ("Phimoe", {"sliding_window": 4096, "num_local_experts": 2}, 2),
    ],
)
def test_score_layer(name, overrides, layer):
    rope = overrides.get("rope_parameters")
    options = overrides | ({"rope_parameters": {"rope_theta": 10000.0, **rope}} if rope else {})
    model = name.removesuffix("Text")
    config = getattr(transformers, f"{name}Config")(**(BASE | options))
    assert HFModel(getattr(transformers, f"{model}ForCausalLM")(config).eval()).score_layer() == layer


def test_longrope_hooks_do_not_stay(prompt_of, small_chunks):
    model = family("phi3-longrope")
    Target(HFModel(model), 100).prefill(prompt_of(90))
    assert untouched(model, "sdpa")


def test_a_dynamic_table_is_not_stretched(prompt_of):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model = tiny_llama(max_position_embeddings=64, rope_parameters=rope)
    served = pair(model, noised(model, 0.01))
    own = model.generate(prompt_of(40)[None], max_new_tokens=24, do_sample=False)[0, 40:].tolist()
    assert served.generate(prompt_of(40), max_new_tokens=24).tokens == own
    with pytest.raises(ValueError, match="64 positions"):
        served.generate(prompt_of(40), max_new_tokens=25)


def test_heads_that_share_unevenly_raise():
    """The CPU kernel would end the process with a division by zero."""
    query, key = torch.zeros(1, 2, 3, 8), torch.zeros(1, 4, 5, 8)
    with pytest.raises(ValueError, match="2 query heads cannot share 4 key heads"):
        attention.attend(query, key, key, scale=1.0, backend="cpu")
