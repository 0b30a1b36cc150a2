"""Greedy output in float32 is `model.generate`'s, token for token.

A mismatch is a failure unless Hugging Face's own two best logits lie closer than 1e-4 there; such near ties are counted
and printed. The models are random, with wide margins; that windows, sinks and softcaps decide tokens is tested as well.
"""

import copy
from typing import Any

import pytest
import torch
import transformers
from conftest import FIXED, noised, tiny_llama
from transformers import AttentionInterface, GPT2Config, GPT2LMHeadModel, PreTrainedModel

import specx.adapters.classic
import specx.target
from specx.adapters.classic import ClassicModel
from specx.api import SpeculativeModel
from specx.generation import Generation
from specx.hf import HFModel
from specx.hf_attention import IMPLEMENTATION, specx_attention
from specx.tree import DraftTree

NEAR_TIE = 1e-4
near_ties: list[str] = []

BASE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MLA = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 24,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 64.0,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 8,
    "long_factor": [1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 8.0, 8.0],
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
# name: (config class, causal LM class, what differs from BASE)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama-mha": ("Llama", "Llama", {"num_key_value_heads": 4}),
    "llama-gqa": ("Llama", "Llama", {}),
    "llama-mqa": ("Llama", "Llama", {"num_key_value_heads": 1}),
    "llama-llama3": ("Llama", "Llama", {"rope_parameters": LLAMA3}),
    "llama-linear": ("Llama", "Llama", {"rope_parameters": LINEAR}),
    "qwen2": ("Qwen2", "Qwen2", {}),
    "qwen2-window": ("Qwen2", "Qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "qwen3": ("Qwen3", "Qwen3", {}),
    "mistral": ("Mistral", "Mistral", {"sliding_window": 16}),
    "mistral-narrow": ("Mistral", "Mistral", {"sliding_window": 4}),
    "gemma2": (
        "Gemma2",
        "Gemma2",
        {
            "sliding_window": 16,
            "attn_logit_softcapping": 1.0,
            "final_logit_softcapping": 8.0,
            "query_pre_attn_scalar": 16,
        },
    ),
    "gemma3": ("Gemma3Text", "Gemma3", {"sliding_window": 16, "layer_types": SLIDING, "query_pre_attn_scalar": 16}),
    "phi3": ("Phi3", "Phi3", {}),
    "phi3-window": ("Phi3", "Phi3", {"sliding_window": 16}),
    "phi3-longrope": ("Phi3", "Phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}),
    "gpt-oss": ("GptOss", "GptOss", {"sliding_window": 16, "layer_types": SLIDING, **MOE}),
    "gpt-oss-narrow": ("GptOss", "GptOss", {"sliding_window": 3, "layer_types": SLIDING, **MOE}),
    "mixtral": ("Mixtral", "Mixtral", MOE),
    "qwen3-moe": ("Qwen3Moe", "Qwen3Moe", MOE),
    "olmo2": ("Olmo2", "Olmo2", {"num_hidden_layers": 2, "initializer_range": 0.15}),
    "granite": ("Granite", "Granite", {"attention_multiplier": 0.5, "logits_scaling": 3.0}),
    "smollm3": ("SmolLM3", "SmolLM3", {"no_rope_layer_interval": 2}),
    "cohere2": ("Cohere2", "Cohere2", {"sliding_window": 16, "layer_types": SLIDING}),
    "starcoder2": ("Starcoder2", "Starcoder2", {"sliding_window": 16}),
    "stablelm": ("StableLm", "StableLm", {}),  # drops keyword arguments on their way to the attention
    "diffllama": ("DiffLlama", "DiffLlama", {}),  # calls the attention twice a layer
    "deepseek-v3": ("DeepseekV3", "DeepseekV3", BASE | MOE | MLA),  # values wider than keys
    "gpt-neox": ("GPTNeoX", "GPTNeoX", {"initializer_range": 0.3}),
    "opt": ("OPT", "OPT", {"ffn_dim": 96, "word_embed_proj_dim": 64}),  # learned positions
}
made: dict[str, PreTrainedModel] = {}


def family(name: str) -> PreTrainedModel:
    """The tiny model of a family, made once."""
    if name not in made:
        config, model, overrides = FAMILIES[name]
        kind = getattr(transformers, f"{config}Config")
        torch.manual_seed(0)
        made[name] = getattr(transformers, f"{model}ForCausalLM")(kind(**(BASE | overrides))).eval()
        generator = torch.Generator().manual_seed(0)
        for path, weight in made[name].named_parameters():
            if path.endswith("sinks"):  # sinks that take a good part of the attention
                weight.data.uniform_(2.0, 5.0, generator=generator)
            elif name in ("opt", "gpt-neox") and weight.dim() > 1:
                weight.data.normal_(0.0, 0.3, generator=generator)
    return made[name]


def couple(
    target: PreTrainedModel,
    draft: PreTrainedModel | float = 0.01,
    draft_context: int = 512,
    backend: str = "auto",
    hybrid: bool = True,
) -> SpeculativeModel:
    """A target with a classic draft; a number makes the draft a copy of the target with so much noise."""
    engine = HFModel(target, backend, hybrid=hybrid)
    twin = noised(target, draft) if isinstance(draft, float) else draft
    plug = ClassicModel("tiny", HFModel(twin, backend, hybrid=hybrid), engine.vocab_size, draft_context, "the test")
    return SpeculativeModel(engine, plug, None, FIXED)


def own_tokens(model: PreTrainedModel, ids: torch.Tensor, new: int, **options: Any) -> list[int]:
    """What Hugging Face's greedy search generates."""
    return model.generate(ids[None], max_new_tokens=new, do_sample=False, **options)[0, len(ids) :].tolist()


def own_margin(model: PreTrainedModel, ids: torch.Tensor, step: int) -> float:
    """The distance of Hugging Face's two best processed logits at the step-th new token."""
    out = model.generate(
        ids[None], max_new_tokens=step + 1, do_sample=False, return_dict_in_generate=True, output_scores=True
    )
    best = out.scores[step][0].topk(2).values
    return (best[0] - best[1]).item()


def assert_same(model: PreTrainedModel, ids: torch.Tensor, got: list[int], own: list[int]) -> None:
    """Fail at the first token that differs, unless Hugging Face itself all but tossed a coin for it."""
    if got == own:
        return
    both = zip(got, own, strict=False)
    step = next((i for i, (mine, theirs) in enumerate(both) if mine != theirs), min(len(got), len(own)))
    assert step < min(len(got), len(own)), f"{len(got)} tokens instead of {len(own)}"
    margin = own_margin(model, ids, step)
    assert margin < NEAR_TIE, f"token {step} is {got[step]} instead of {own[step]}, whose margin is {margin:.2g}"
    near_ties.append(f"{type(model).__name__}, prompt of {len(ids)}, token {step}: margin {margin:.2g}")


def check(pair: SpeculativeModel, ids: torch.Tensor, new: int = 40, **options: Any) -> Generation:
    """Generate with specx and compare with Hugging Face."""
    out = pair.generate(ids, max_new_tokens=new, **options)
    assert_same(pair.target, ids, out.tokens, own_tokens(pair.target, ids, new))
    return out


def untouched(model: PreTrainedModel, implementation: str) -> bool:
    """Whether nothing of specx is left on a model."""
    clean = not any({"_specx_call", "forward"} & vars(module).keys() for module in model.modules())
    hooks = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return clean and not hooks and model.config._attn_implementation == implementation


@pytest.fixture(scope="module", autouse=True)
def tell_near_ties(request):
    yield
    if near_ties:
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n{len(near_ties)} near ties:", *near_ties, sep="\n  ")  # noqa: T201


@pytest.fixture
def small_chunks(monkeypatch):
    """Prompts of a few hundred tokens span several prefill chunks."""
    monkeypatch.setattr(specx.target, "PREFILL_CHUNK", 64)
    monkeypatch.setattr(specx.adapters.classic, "_CHUNK", 64)


@pytest.fixture
def broken_attention():
    """broken_attention(name): take one argument of the attention function away from it."""

    def take_away(name: str) -> None:
        def broken(*args, **kwargs):
            kwargs.pop(name, None)
            return specx_attention(*args, **kwargs)

        AttentionInterface.register(IMPLEMENTATION, broken)

    yield take_away
    AttentionInterface.register(IMPLEMENTATION, specx_attention)


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name, prompt_of, small_chunks):
    out = check(couple(family(name)), prompt_of(150))
    assert len(set(out.tokens)) > 5, "a constant output would show nothing"
    assert 1.2 < out.stats["tau"] < 4.9, "a good step accepts some drafted tokens and refuses others"
    assert len(out.accepted) > 1


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        ("qwen2-window", "sliding_window"),
        ("mistral", "sliding_window"),
        ("mistral-narrow", "sliding_window"),
        ("gemma2", "sliding_window"),
        ("gemma3", "sliding_window"),
        ("phi3-window", "sliding_window"),
        ("gpt-oss", "sliding_window"),
        ("cohere2", "sliding_window"),
        ("starcoder2", "sliding_window"),
        ("gemma2", "softcap"),
        ("gpt-oss", "s_aux"),
        ("granite", "scaling"),
    ],
)
def test_features_matter(name, feature, prompt_of, broken_attention):
    pair, ids = couple(family(name)), prompt_of(150)
    broken_attention(feature)
    out = pair.generate(ids, max_new_tokens=40)
    assert out.tokens != own_tokens(pair.target, ids, 40), f"the output does not depend on {feature}"


@pytest.mark.parametrize("nodes", [16, 64])
def test_the_tree_mask_matters(tiny, prompt_of, monkeypatch, nodes):
    pair, ids = couple(tiny), prompt_of(150)
    check(pair, ids, nodes=nodes)
    monkeypatch.setattr(DraftTree, "mask", lambda tree: torch.ones(len(tree), len(tree), dtype=torch.bool).tril())
    assert pair.generate(ids, max_new_tokens=40, nodes=nodes).tokens != own_tokens(tiny, ids, 40)


@pytest.mark.parametrize("hybrid", [True, False], ids=["hybrid", "dense"])
@pytest.mark.parametrize("name", ["mistral", "mistral-narrow", "gemma2", "gpt-oss-narrow"])
def test_trees_deeper_than_the_window(name, hybrid, prompt_of, small_chunks):
    pair = couple(family(name), 0.001, hybrid=hybrid)
    out = check(pair, prompt_of(100), nodes=40, depth=19, beam=2, draft_context=4096)
    window = pair.target.config.sliding_window
    assert max(out.accepted) > min(window, 8), f"accepted {dict(out.accepted)}"


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("refill", ["gather", "recompute"])
@pytest.mark.parametrize("policy", ["full", "window", "retrieval", "auto"])
def test_policies(tiny, prompt_of, policy, refill, backend, monkeypatch):
    pair = couple(tiny, 0.02, draft_context=128, backend=backend)
    forward, reached = pair.draft.model.forward, []

    def watched(ids, positions, *rest, **options):
        reached.append(int(positions.max()))
        return forward(ids, positions, *rest, **options)

    monkeypatch.setattr(pair.draft.model, "forward", watched)
    out = check(pair, prompt_of(300), policy=policy, refill=refill, chunk_size=8, trace=True)
    assert out.stats["policy"] == policy
    assert out.stats["refill"] == ("recompute" if policy == "full" else refill)
    assert out.stats["tau"] > 1.0
    assert (max(reached) < 128) == (policy != "full")
    assert (out.draft_kv_tokens > 128) == (policy == "full")
    kept = [step["kept_chunks"] for step in out.trace if step["kept_chunks"]]
    assert bool(kept) == (policy in ("retrieval", "auto"))


@pytest.mark.parametrize("policy", ["full", "auto"])
@pytest.mark.parametrize("name", ["llama-gqa", "mistral", "gemma2", "gpt-oss"])
def test_without_hybrid_attention(name, policy, prompt_of, small_chunks):
    pair = couple(family(name), draft_context=128, hybrid=False)
    assert check(pair, prompt_of(200), policy=policy, chunk_size=8).stats["tau"] > 1.0


@pytest.mark.parametrize("length", [1, 2, 17, 300, 3000])
@pytest.mark.parametrize("name", ["llama-gqa", "mistral", "gemma2", "gpt-oss"])
def test_prompt_lengths(name, length, prompt_of, small_chunks, monkeypatch):
    if length == 3000:
        monkeypatch.setattr(specx.target, "PREFILL_CHUNK", 500)
    check(couple(family(name), draft_context=128), prompt_of(length), 24, chunk_size=8)


@pytest.mark.parametrize("policy", ["full", "auto"])
def test_a_prompt_of_several_default_chunks(tiny, prompt_of, policy):
    check(couple(tiny), prompt_of(specx.target.PREFILL_CHUNK * 2 + 5), 20, policy=policy)


@pytest.mark.parametrize("length", [63, 64, 65, 128, 129])
def test_prompts_that_end_at_a_chunk_border(length, prompt_of, small_chunks):
    check(couple(family("mistral")), prompt_of(length), 12)


@pytest.mark.parametrize("refill", ["gather", "recompute"])
@pytest.mark.parametrize("policy", ["full", "auto"])
def test_a_short_prompt_after_a_long_one(tiny, prompt_of, policy, refill):
    pair = couple(tiny, 0.02, draft_context=128)
    for length in (700, 9, 300, 1):
        check(pair, prompt_of(length), 30, policy=policy, refill=refill, chunk_size=8)


@pytest.mark.parametrize("refill", ["gather", "recompute"])
def test_a_long_answer_to_a_short_prompt(prompt_of, refill):
    target = tiny_llama(num_hidden_layers=2, hidden_size=32, intermediate_size=48, num_attention_heads=2)
    pair = couple(target, 0.005, draft_context=128)
    options = {"policy": "auto", "refill": refill, "chunk_size": 8, "retrieve_every": 8, "depth": 1, "nodes": 8}
    out = check(pair, prompt_of(10), 3000, trace=True, **options)
    refreshed = [step["kept_chunks"] is not None for step in out.trace]
    first = refreshed.index(True)
    emitted = sum(len(step["path"]) for step in out.trace[:first])
    assert 90 < emitted < 128, "full while it fits"
    assert sum(refreshed[first:]) > 100
    assert out.draft_kv_tokens <= 128
    assert out.stats["tau"] > 1.0
    assert len(set(out.tokens[-500:])) > 5


@pytest.mark.parametrize("place", [0, 1, 2, 3, 5, 8, 13, 21, 34, 39])
def test_stops_at_the_end_token(tiny, prompt_of, place):
    ids, target = prompt_of(60), copy.deepcopy(tiny)
    end = own_tokens(target, ids, 40)[place]
    target.generation_config.eos_token_id = [63, end, 62]
    out = check(couple(target, tiny), ids)
    assert out.tokens[-1] in (63, end, 62)
    assert out.finish_reason == "eos"
    assert out.emitted == len(out.tokens) - 1


@pytest.mark.parametrize("new", [1, 2, 3, 4, 5, 6, 7, 20])
def test_max_new_tokens_is_exact(tiny, prompt_of, new):
    out = check(couple(tiny, tiny), prompt_of(60), new)
    assert (len(out.tokens), out.finish_reason) == (new, "length")


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ({"repetition_penalty": 1.5}, "level"),
        ({"suppress_tokens": list(range(0, 96, 2))}, "batch"),
        ({"no_repeat_ngram_size": 1}, "level"),
        ({"begin_suppress_tokens": list(range(77, 96))}, "level"),
        ({"min_new_tokens": 30, "eos_token_id": list(range(0, 96, 3))}, "level"),
        ({"min_length": 170, "eos_token_id": list(range(0, 96, 3))}, "level"),
        ({"bad_words_ids": [[each] for each in range(0, 96, 3)]}, "level"),
        ({"forced_eos_token_id": 7}, "level"),
        ({"encoder_repetition_penalty": 2.0}, "level"),
        ({"encoder_no_repeat_ngram_size": 1}, "walk"),
        ({"sequence_bias": {(5,): 4.0, (9, 11): 6.0}}, "level"),
        ({"exponential_decay_length_penalty": (5, 1.5), "eos_token_id": 3}, "walk"),
        ({"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "suppress_tokens": [1, 2, 3]}, "level"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else value,
)
def test_generation_config_applies(prompt_of, options, mode):
    plain, ids = family("llama-gqa"), prompt_of(150)
    target = copy.deepcopy(plain)
    for name, value in options.items():
        setattr(target.generation_config, name, value)
    out = check(couple(target, 0.005), ids)
    assert out.stats["processors"] == mode
    assert out.stats["tau"] is None or out.stats["tau"] > 1.0 or "exponential_decay_length_penalty" in options
    assert out.tokens != own_tokens(plain, ids, 40), "the option changes nothing here"


def test_sampling_fields_of_the_generation_config_do_not_apply(tiny, prompt_of):
    target = copy.deepcopy(tiny)
    target.generation_config.update(do_sample=True, temperature=0.3, top_k=3, top_p=0.5, min_p=0.1)
    out = couple(target).generate(prompt_of(60), max_new_tokens=30)
    assert out.tokens == own_tokens(tiny, prompt_of(60), 30)


def test_repetition_penalty_as_an_option(tiny, prompt_of):
    ids = prompt_of(60)
    out = couple(tiny).generate(ids, max_new_tokens=30, repetition_penalty=1.4)
    assert out.tokens == own_tokens(tiny, ids, 30, repetition_penalty=1.4)
    assert out.tokens != own_tokens(tiny, ids, 30)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_hugging_face_generates_between_two_pieces(prompt_of, implementation):
    target, ids = tiny_llama(seed=4), prompt_of(80)
    target.set_attn_implementation(implementation)
    own, other = own_tokens(target, ids, 30), own_tokens(target, prompt_of(33), 10)
    pair = couple(target, target, draft_context=64)
    out, run = pair.start(ids, max_new_tokens=30, chunk_size=8, nodes=6, depth=1)
    pieces = 0
    for _ in run:
        pieces += 1
        assert untouched(target, implementation)
        assert own_tokens(target, prompt_of(33), 10) == other
    assert pieces > 5
    assert out.tokens == own


def test_hugging_face_generates_after_an_abandoned_stream(tiny, prompt_of):
    ids = prompt_of(80)
    own, pair = own_tokens(tiny, ids, 30), couple(tiny)
    out, run = pair.start(ids, max_new_tokens=30)
    next(run)
    next(run)
    run.close()
    assert out.finish_reason == "interrupted"
    assert out.tokens == own[: len(out.tokens)]
    assert untouched(tiny, "sdpa")
    assert own_tokens(tiny, ids, 30) == own
    check(pair, ids)


@pytest.mark.parametrize("role", ["target", "draft"])
def test_an_exception_inside_a_forward_leaves_nothing(prompt_of, role):
    target, ids = tiny_llama(seed=5), prompt_of(80)
    own, pair = own_tokens(target, ids, 30), couple(target)
    broken = target if role == "target" else pair.draft.model.model
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 4:
            raise MemoryError("as on a full device")

    handle = broken.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError, match="full device"):
        pair.generate(ids, max_new_tokens=30)
    handle.remove()
    assert untouched(broken, "sdpa")
    assert own_tokens(target, ids, 30) == own
    check(pair, ids, 30)


def test_two_streams_in_turn(tiny, prompt_of):
    pair, lengths = couple(tiny, 0.02, draft_context=64), (200, 31)
    started = [pair.start(prompt_of(length), max_new_tokens=25, chunk_size=8) for length in lengths]
    for _ in range(25):
        for _, run in started:
            next(run, None)
    for length, (out, _) in zip(lengths, started, strict=True):
        assert_same(tiny, prompt_of(length), out.tokens, own_tokens(tiny, prompt_of(length), 25))


@pytest.mark.parametrize(
    "shape",
    [
        {"nodes": 1},
        {"nodes": 2},
        {"nodes": 64},
        {"nodes": 256, "depth": 9, "beam": 16},
        {"depth": 0},
        {"depth": 12},
        {"beam": 1},
        {"beam": 1, "depth": 0},
        {"beam": 64},
        {"tree_threshold": 0.3},
        {"tree_threshold": 0.0, "depth": 8},
        {"tree_shape": (3, 8, 2, 4, 4)},
    ],
    ids=str,
)
@pytest.mark.parametrize("policy", ["full", "auto"])
def test_tree_shapes(prompt_of, shape, policy):
    target = tiny_llama(seed=6, vocab_size=48)
    pair = couple(target, 0.005, draft_context=96)
    ids = prompt_of(120) % 48
    out = check(pair, ids, policy=policy, chunk_size=8, retrieve_every=1, **shape)
    if shape.get("nodes") == 1:
        assert out.stats["tau"] == 1.0
    else:
        assert 1.0 < out.stats["tau"] <= shape.get("depth", 4) + 2
        assert max(out.accepted) <= shape.get("depth", 4) + 1


def test_a_model_is_its_own_draft(tiny, prompt_of):
    out = check(couple(tiny, tiny), prompt_of(100), 31, beam=1, depth=4)
    assert out.stats["tau"] == 6.0, "every level of a chain is accepted"


@pytest.mark.parametrize("vocab", [40, 200])
def test_a_draft_of_another_architecture_and_vocabulary(prompt_of, vocab):
    target = family("qwen3")
    draft = tiny_llama(3, vocab_size=vocab, hidden_size=32, num_hidden_layers=2)
    ids = prompt_of(150)
    assert int(ids.max()) >= 40
    for policy in ("full", "auto"):
        out = check(couple(target, draft, draft_context=96), ids, policy=policy, chunk_size=8, trace=True)
        drafted = {token for step in out.trace for token in step["tokens"][1:]}
        assert max(drafted) < min(vocab, 96)
        assert max(out.tokens) >= 40


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_a_draft_whose_positions_end(prompt_of, kind):
    torch.manual_seed(0)
    if kind == "gpt2":
        size = {"n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.2}
        draft = GPT2LMHeadModel(
            GPT2Config(vocab_size=96, n_positions=64, bos_token_id=None, eos_token_id=None, **size)
        ).eval()
    else:
        config, _, overrides = FAMILIES["opt"]
        options = BASE | overrides | {"max_position_embeddings": 64}
        draft = transformers.OPTForCausalLM(getattr(transformers, f"{config}Config")(**options)).eval()
    pair = couple(family("llama-gqa"), draft, draft_context=4096)
    assert pair.draft.max_positions == 64
    for length, new in ((20, 60), (150, 20)):
        out = check(pair, prompt_of(length), new, policy="full")
        assert (out.stats["policy"], out.notes) == (
            "window",
            ["policy full became window: the draft has 64 positions"],
        )
        check(pair, prompt_of(length), new, policy="auto", chunk_size=8, retrieve_every=2)
    out = check(pair, prompt_of(20), 20, policy="full")
    assert (out.stats["policy"], out.notes) == ("full", [])


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_a_target_filled_to_its_last_position(prompt_of, kind):
    torch.manual_seed(1)
    if kind == "gpt2":
        size = {"n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
        target = GPT2LMHeadModel(
            GPT2Config(vocab_size=96, n_positions=64, bos_token_id=None, eos_token_id=None, **size)
        ).eval()
    else:
        config, _, overrides = FAMILIES["opt"]
        options = BASE | overrides | {"max_position_embeddings": 64, "init_std": 0.3}
        target = transformers.OPTForCausalLM(getattr(transformers, f"{config}Config")(**options)).eval()
    pair = couple(target, 0.001)
    for new in (1, 2, 3, 9, 10, 11, 12, 40):
        check(pair, prompt_of(64 - new), new)
    with pytest.raises(ValueError, match="64 positions: at most 4 new tokens fit"):
        pair.generate(prompt_of(60), max_new_tokens=5)


@pytest.mark.parametrize(("length", "new"), [(20, 45), (64, 1), (65, 30), (200, 30)])
def test_longrope_on_either_side_of_its_border(prompt_of, monkeypatch, length, new):
    monkeypatch.setattr(specx.target, "PREFILL_CHUNK", 32)
    check(couple(family("phi3-longrope")), prompt_of(length), new)


def test_longrope_does_not_cross_its_border(prompt_of):
    pair = couple(family("phi3-longrope"))
    with pytest.raises(ValueError, match="at most 45 new ones fit"):
        pair.generate(prompt_of(20), max_new_tokens=46)


def test_float64(prompt_of):
    target = tiny_llama(seed=2).double()
    check(couple(target, draft_context=128), prompt_of(200), chunk_size=8)


def test_plain_decoding(tiny, prompt_of):
    assert check(couple(tiny), prompt_of(100), plain=True).stats["tau"] == 1.0


def test_near_ties_are_rare():
    assert len(near_ties) <= 2, near_ties
