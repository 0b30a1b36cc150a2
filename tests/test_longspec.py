"""LongSpec drafts: exact whatever they draft, a window of their own keys, the target's read in place."""

import pytest
import torch
from blocks import GROUPS, HEAD_DIM, LINEAR, VOCAB, block_tensors, config_of, couple, prompt_of, save, tiny_target
from click.testing import CliRunner
from test_sampling_law import CERTAIN, drawn, exact_law, p_value

from specx import cli
from specx.adapters.longspec import Ring
from specx.adapters.longspec_block import WINDOW
from specx.adapters.longspec_checkpoints import UNUSED, BlockFormat, read_block
from specx.adapters.longspec_loader import load_longspec
from specx.adapters.names import DRAFTS, TARGETS
from specx.adapters.weights import kind_of
from specx.api import load
from specx.config import CacheConfig
from specx.hf import HFModel
from specx.target import Target
from specx.tree import Plan

pytest_plugins = ["disk"]
FAMILIES = {"llama": ("Llama", {}), "linear rope": ("Llama", LINEAR), "qwen2": ("Qwen2", {})}
GROWTHS = {
    "tree": {},
    "shape": {"tree_shape": (4, 8, 8, 8)},
    "chain": {"nodes": 5, "depth": 3, "beam": 1},
    "retrieval": {"draft_context": 160, "chunk_size": 8, "top_chunks": 6, "policy": "retrieval"},
    "window": {"draft_context": 160, "policy": "window"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("longspec"))


def own_tokens(target, ids, new):
    return target.generate(ids[None], max_new_tokens=new, do_sample=False)[0, len(ids) :].tolist()


class TestExactness:
    @pytest.mark.parametrize("growth", GROWTHS)
    @pytest.mark.parametrize("family", FAMILIES)
    def test_greedy(self, family, growth, folder):
        kind, options = FAMILIES[family]
        target = tiny_target(kind, **options)
        model, accepted = couple(target, folder, alignment="reference" if growth == "shape" else "exact"), 0
        for length in (600, 3):  # across the window; and a second prompt that is shorter
            out = model.generate(prompt_of(length), max_new_tokens=40, **GROWTHS[growth])
            assert out.tokens == own_tokens(target, prompt_of(length), 40)
            accepted += out.emitted - out.steps
        assert accepted > 5

    def test_a_short_prompt_grows_beyond_the_window_and_the_context(self, folder):
        target = tiny_target()
        out = couple(target, folder, 100).generate(prompt_of(60), max_new_tokens=520, chunk_size=8, top_chunks=4)
        assert out.tokens == own_tokens(target, prompt_of(60), 520)
        assert out.draft_kv_tokens == WINDOW

    def test_static_steps(self, folder):
        """Their buffers are longer than what is committed."""
        target = tiny_target()
        model = couple(HFModel(target, graphs=True), folder)
        for length in (540, 30):
            out = model.generate(prompt_of(length), max_new_tokens=30)
            assert out.tokens == own_tokens(target, prompt_of(length), 30)
            assert out.emitted > 1.5 * out.steps

    def test_sampling_has_the_law_of_the_target(self, folder):
        target = tiny_target(seed=1, vocab_size=6, hidden_size=48)
        target.lm_head.weight.data *= 0.5
        counts, drafted = drawn(couple(target, folder), {"temperature": 1.0}, 500)
        assert 0.2 < drafted < 0.8
        assert p_value(counts, exact_law(target, {"temperature": 1.0})) > CERTAIN


def grown(model, length, plan=None, keep=None, policy=None):
    """The tree behind a prompt of `length` tokens, its target and its draft."""
    ids = prompt_of(length)
    target = Target(model.engine, length + 32)
    draft = model.draft.start(length, 12, 0, CacheConfig())
    draft.attach(target.last_layer)
    target.prefill(ids)
    draft.prefill(ids, keep)
    draft.begin(7)
    return draft.propose(plan or Plan(12, 3, 3)), target, draft


class TestWhatItReads:
    def test_the_target_s_rows_are_views_of_committed_rows(self, folder):
        model = couple(tiny_target(), folder)
        _, target, _ = grown(model, 50)
        keys, values = target.last_layer()
        assert keys.shape == values.shape == (1, GROUPS, 50, HEAD_DIM)
        whole = target.cache.memory.blocks[0]
        for part, block in zip((keys, values), whole, strict=True):
            assert part.data_ptr() == block[-1].data_ptr()
        # what lies behind the committed rows is never read
        first = grown(model, 50)[0]
        for block in whole:
            block[:, :, :, 50:] = torch.nan
        again = model.draft.start(50, 12, 0, CacheConfig())
        again.attach(target.last_layer)
        again.prefill(prompt_of(50), None)
        again.begin(7)
        assert torch.equal(again.propose(Plan(12, 3, 3)).scores, first.scores)

    def test_its_own_cache_is_a_window_and_a_tree_whatever_the_context(self, folder):
        model, sizes = couple(tiny_target(), folder), set()
        for length in (20, 600, 2000):
            _, _, draft = grown(model, length)
            assert draft.kv_rows == min(length + 1, WINDOW)
            sizes.add((draft.ring.keys.shape, draft.ring.values.shape, draft.tail.shape))
        assert sizes == {((1, GROUPS, WINDOW, HEAD_DIM),) * 2 + ((2, 1, GROUPS, 12, HEAD_DIM),)}

    def test_each_query_sees_the_ring_from_its_own_first_token_on(self):
        ring = Ring(4, torch.zeros(1, 1, 1, 2))
        block = torch.arange(12.0).reshape(1, 1, 6, 2)
        ring.extend(block[:, :, :4], block[:, :, :4], torch.arange(4), 4)
        ring.extend(block[:, :, 4:], block[:, :, 4:], torch.arange(4, 6), 6)
        assert ring.positions.tolist() == [4, 5, 2, 3]
        assert ring.seen(torch.tensor([1, 2]), 2)[2] is None
        bias = ring.seen(torch.tensor([2, 4]), 4)[2]
        assert (bias == 0).tolist() == [[True] * 4, [True, True, False, False]]

    def test_a_prompt_costs_projections_of_its_last_tokens(self, folder, monkeypatch):
        model, seen = couple(tiny_target(), folder), []
        project = model.draft.block.keys_values
        monkeypatch.setattr(model.draft.block, "keys_values", lambda x, t: (seen.append(x.shape[1]), project(x, t))[1])
        draft = model.draft.start(2000, 12, 0, CacheConfig())
        draft.prefill(prompt_of(2000), None)
        assert seen == [1, WINDOW]  # one to learn the shape

    def test_keeping_all_tokens_is_reading_all(self, folder):
        model = couple(tiny_target(), folder)
        plain = grown(model, 600)[0]
        kept = grown(model, 600, keep=torch.arange(600))[0]
        assert torch.equal(plain.tokens, kept.tokens)
        torch.testing.assert_close(plain.scores, kept.scores, atol=1e-5, rtol=1e-5)
        fewer = grown(model, 600, keep=torch.arange(400, 600))[0]
        assert (plain.scores - fewer.scores).abs().max() > 1e-3

    def test_kept_rows_and_newer_ones_are_seen(self, folder):
        model = couple(tiny_target(), folder)
        _, target, draft = grown(model, 40, keep=torch.tensor([0, 3, 4, 30]))
        assert (draft.cached, draft.waiting) == (4, 1)
        target.cache.extend(3)
        draft._ids.append([1, 2, 3])
        assert draft.cached == 7
        keys = torch.cat([part[0] for part in draft._context()], 2)
        whole = target.last_layer()[0]
        assert torch.equal(keys, whole[:, :, [0, 3, 4, 30, 40, 41, 42]])

    def test_many_plain_rounds_in_between(self, folder):
        """Rounds without a draft leave more tokens waiting than the window holds."""
        model = couple(tiny_target(), folder)
        tree = grown(model, 900)[0]
        ids = prompt_of(900)
        target = Target(model.engine, 1000)
        draft = model.draft.start(900, 12, 0, CacheConfig())
        draft.attach(target.last_layer)
        target.prefill(ids)
        draft.prefill(ids[:5], None)
        draft._ids.append([*ids[5:].tolist(), 7])
        assert torch.equal(draft.propose(Plan(12, 3, 3)).scores, tree.scores)


def changed(**parts):
    return block_tensors() | parts


def renamed(prefix):
    return {prefix + name: tensor for name, tensor in block_tensors().items()}


def bare(path, tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, path)
    return str(path)


class TestCheckpoints:
    @pytest.mark.parametrize(
        "write",
        [
            lambda path: save(path, shards=3),
            lambda path: save(path, renamed("model.")),
            lambda path: save(path, renamed("draft_model."), shards=2),
            lambda path: bare(path / "draft_model_weights.pth", block_tensors()),
            lambda path: str((path, bare(path / "draft_model_weights.pth", renamed("glide.")))[0]),
            lambda path: bare(path / "w.bin", renamed("module.draft_model.")),
            lambda path: save(path, {name: each for name, each in block_tensors().items() if name not in UNUSED}),
            lambda path: save(path, changed(**{"self_attn.rotary_emb.inv_freq": torch.ones(3)})),
        ],
        ids=["shards", "model.", "draft_model.", "pth", "pth-directory", "bin", "no-unused", "buffers"],
    )
    def test_every_layout_gives_the_same_draft(self, write, tmp_path, folder):
        path = write(tmp_path / "draft")
        assert kind_of(path) == "longspec"
        expected, found = (read_block(each)[1] for each in (folder, path))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        model = load(tiny_target(), path)
        assert model.generate(prompt_of(20), max_new_tokens=4).tokens
        assert model.draft.draft_context == (4096 if list(tmp_path.rglob("config.json")) else 8192)

    @pytest.mark.parametrize(
        ("tensors", "message"),
        [
            ({"self_attn.q_proj.bias": None}, "it lacks self_attn.q_proj.bias"),
            ({"mlp.up_proj.weight": None, "input_layernorm.weight": None}, "it lacks input_layernorm.weight"),
            ({"embed_tokens.weight": torch.ones(3)}, "it holds unknown keys: embed_tokens.weight"),
            ({"glide.mlp.up_proj.weight": torch.ones(3)}, "it holds mlp.up_proj.weight twice"),
            ({"mlp.up_proj.weight": torch.ones(3, 3)}, r"mlp.up_proj.weight is \[3, 3\], not \[80, 48\]"),
            ({"mlp.up_proj.bias": torch.ones(80)}, "it lacks mlp.down_proj.bias, mlp.gate_proj.bias"),
        ],
    )
    def test_keys_too_few_or_too_many_are_named(self, tensors, message, tmp_path):
        kept = {name: each for name, each in changed(**tensors).items() if each is not None}
        path = save(tmp_path / "draft", kept)
        with pytest.raises(RuntimeError, match=message):
            read_block(path)

    @pytest.mark.parametrize(
        ("target", "config", "message"),
        [
            ({"hidden_size": 64, "head_dim": 12}, {}, "hidden size 48, the target has 64"),
            ({"num_attention_heads": 2, "num_key_value_heads": 2}, {}, "attention heads 4, the target has 2"),
            ({"num_key_value_heads": 4}, {}, "key/value heads 2, the target has 4"),
            ({"head_dim": 16}, {}, "numbers in all query heads 48, the target has 64"),
            ({}, {"num_attention_heads": 8}, "attention heads 8, the target has 4"),
        ],
    )
    def test_a_draft_of_another_target_is_refused(self, target, config, message, tmp_path):
        path = save(tmp_path / "draft", config=config_of(**config))
        with pytest.raises(ValueError, match=f"does not fit this target: .*{message}"):
            couple(tiny_target(**target), path)

    def test_targets_without_what_it_reads_are_refused(self, folder):
        target = tiny_target("Gemma3Text", head_dim=HEAD_DIM, query_pre_attn_scalar=HEAD_DIM)
        with pytest.raises(ValueError, match="Gemma3ForCausalLM has no rotary embedding that all of its layers share"):
            couple(target, folder)

    def test_an_odd_config_is_told_of(self, tmp_path):
        model = couple(tiny_target(), save(tmp_path / "draft", config=config_of(num_hidden_layers=40)))
        assert any("40 layers where this target has 3" in line for line in model.draft.about)

    def test_pickled_code_is_never_run(self, tmp_path):
        path = bare(tmp_path / "draft.pth", block_tensors() | {"input_layernorm.weight": CliRunner})
        with pytest.raises(RuntimeError, match="holds pickled code, which is never run"):
            read_block(path)

    def test_mlp_biases_and_fewer_tokens(self, tmp_path):
        sizes = {"gate": 80, "up": 80, "down": 48}
        tensors = changed(**{f"mlp.{name}_proj.bias": torch.ones(count) for name, count in sizes.items()})
        engine = HFModel(tiny_target())
        path, tokens = save(tmp_path / "draft", tensors), torch.tensor([3, 5, 8, 20, 63])
        model = couple(engine, path, tokens=tokens)
        tree, *_ = grown(model, 30)
        assert set(tree.tokens[1:].tolist()) <= set(tokens.tolist())
        assert couple(engine, path).draft.block.mlp["up_proj"].bias.sum() == 80


class TestNames:
    def test_the_published_ones(self):
        found = {name: known for name, known in DRAFTS.items() if known.kind == "longspec" and "/" in known.repo}
        assert {known.repo for known in found.values()} == {
            f"sail/longspec-{name}"
            for name in (
                "vicuna-7b-v1.5-16k",
                "vicuna-13b-v1.5-16k",
                "longchat-7b-v1.5-32k",
                "longchat-13b-16k",
                "Llama-3-8B-Instruct-262k",
                "QwQ-32B-Preview",
            )
        }
        for known in found.values():  # the draft is named after its target
            assert TARGETS[known.target].endswith(known.repo.removeprefix("sail/longspec-"))

    def test_its_context_is_that_of_the_table(self, folder):
        model = load_longspec("longspec-vicuna-7b", folder, HFModel(tiny_target()), 16384, "the table of known names")
        assert (model.draft_context, model.max_positions) == (16384, None)


@pytest.fixture(scope="module")
def names(disk, tmp_path_factory):
    """A pair on disk, as options."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    tensors = block_tensors(shape=BlockFormat(32, 64, 32, 16, False, 2, 1, 1e-5, "silu"))
    return ["--target", disk.target, "--draft", save(tmp_path_factory.mktemp("pair"), tensors, config_of(**shape))]


class TestCommands:
    def test_run(self, names):
        options = ["--prompt", "def f", "--max-new-tokens", "8", "--tree-shape", "4,4", "--dtype", "float32"]
        result = CliRunner().invoke(cli.main, ["run", *names, *options, "--compare"])
        assert result.exit_code == 0, result.output
        assert "same" in result.stderr

    def test_doctor(self, names):
        result = CliRunner().invoke(cli.main, ["doctor", *names, "--dtype", "float32"])
        assert "LongSpec, one block" in result.stdout
        assert "reads the keys and values of the target's last layer" in result.stdout
        alone = CliRunner().invoke(cli.main, ["doctor", "--draft", names[-1]])
        assert "LongSpec, one block" in alone.stdout
        assert alone.exit_code == 0

    def test_a_wrong_pair_is_told_in_one_line(self, disk, folder):
        result = CliRunner().invoke(cli.main, ["run", "--target", disk.target, "--draft", folder, "--prompt", "x"])
        assert result.exit_code == 2
        assert "hidden size 48, the target has 32" in result.stderr
        assert "Traceback" not in result.output


def test_vocabulary_of_the_target_is_drafted(folder):
    tree, *_ = grown(couple(tiny_target(), folder), 30)
    assert 0 <= int(tree.tokens.min()) <= int(tree.tokens.max()) < VOCAB
