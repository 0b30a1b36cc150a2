"""Retrofitting live EaModel objects: the real eagle-llm's, where it is installed, and ones shaped like EAGLE's own."""

import copy
import gc
import inspect
import json
import logging
from pathlib import Path
from types import GeneratorType, SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from heads import EAGLE1, EAGLE3, VOCAB, fitted, flat_config, head_tensors, prompt_of, save, tiny_target
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import specx
from specx import cli
from specx.adapters import eagle_llm
from specx.adapters.live import shared_target
from specx.retrofit_check import Way, first_difference

pytestmark = pytest.mark.filterwarnings("ignore")  # of eagle-llm's, which is older than the libraries it runs on
real = pytest.mark.skipif(not eagle_llm.installed(), reason=f"eagle-llm is not there: {eagle_llm.INSTALL}")
LONG = 2100


def own_ids(target, ids, new):
    return target.generate(ids, max_new_tokens=new, do_sample=False)


def tokenizer():
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words)


class Pair:
    """A target and a head on disk, as eagle-llm wants them, and what they are read as."""

    def __init__(self, root, name, teach=(), **overrides):
        self.target = tiny_target(max_position_embeddings=2048, **overrides)
        self.where, head = str(root / name), root / f"{name}-head"
        self.target.save_pretrained(self.where)
        tokenizer().save_pretrained(self.where)
        if teach:
            fitted(self.target, head, EAGLE1, teach)
        else:
            save(head, flat_config(), head_tensors(EAGLE1))
        tensors = torch.load(head / "pytorch_model.bin", weights_only=True)
        tensors = {key: each.detach().clone() for key, each in tensors.items()}
        tensors["embed_tokens.weight"] = self.target.model.embed_tokens.weight.detach().clone()
        self.head = save(head, flat_config(), tensors)

    def live(self):
        return eagle_llm.load(self.where, self.head)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Rotates by 10000: eagle-llm computes it rightly."""
    return Pair(tmp_path_factory.mktemp("plain"), "plain", teach=(40, 60))


@pytest.fixture(scope="module")
def stretched(tmp_path_factory):
    """2048 positions and a factor of 4, as lmsys/vicuna-7b-v1.5-16k writes it."""
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    return Pair(tmp_path_factory.mktemp("stretched"), "stretched", rope_parameters=rope)


@pytest.fixture(scope="module")
def turned(tmp_path_factory):
    """Rotates by 500000, as Llama 3 does; eagle-llm does not read that."""
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    return Pair(tmp_path_factory.mktemp("turned"), "turned", rope_parameters=rope)


@pytest.fixture
def live(plain):
    return plain.live()


def picture(ea_model):
    """Everything an object is: its own attributes and its parts', by identity."""
    parts = {name: dict(vars(part)) for name, part in ea_model.named_modules()}
    return {
        (name, key): {inner: id(it) for inner, it in each.items()} if isinstance(each, dict) else id(each)
        for name, part in parts.items()
        for key, each in part.items()
    }


def weights(module):
    return {each.data_ptr() for each in module.parameters()}


@real
class TestCompatibility:
    def test_it_computes_what_transformers_computes(self, plain, live):
        ids = prompt_of(300)[None]
        assert (live.base_model(ids).logits - plain.target(ids).logits).abs().max() < 1e-4

    def test_linear_scaling_too(self, stretched):
        ids = prompt_of(300)[None]
        assert (stretched.live().base_model(ids).logits - stretched.target(ids).logits).abs().max() < 1e-4

    def test_tied_weights_too(self, tmp_path):
        tied, ids = Pair(tmp_path, "tied", tie_word_embeddings=True), prompt_of(300)[None]
        live = tied.live()
        assert live.base_model.lm_head.weight is live.base_model.model.embed_tokens.weight
        assert (live.base_model(ids).logits - tied.target(ids).logits).abs().max() < 1e-4
        with specx.retrofit(live):
            out = live.eagenerate(ids[:, :40], max_new_tokens=8)
        assert torch.equal(out[:, :48], own_ids(tied.target, ids[:, :40], 8))

    def test_its_own_output_is_the_targets(self, plain, live):
        out = live.eagenerate(prompt_of(40)[None], max_new_tokens=24)
        assert torch.equal(out, own_ids(plain.target, prompt_of(40)[None], out.shape[1] - 40))

    def test_the_package_is_patched_inside_only(self):
        with eagle_llm.compatible() as package:
            owners = [package.KVLlamaForCausalLM, package.KVMixtralForCausalLM]
            assert all("from_pretrained" in vars(each) for each in owners)
            layer = inspect.getmodule(package.KVLlamaForCausalLM).LlamaAttention
            inside = layer._init_rope
        assert not any("from_pretrained" in vars(each) for each in owners)
        assert layer._init_rope is not inside
        with pytest.raises(ZeroDivisionError), eagle_llm.compatible():
            raise ZeroDivisionError
        assert layer._init_rope is not inside

    def test_a_file_that_it_does_not_know_is_said_to_be_its_own_trouble(self, plain, tmp_path):
        head = save(tmp_path / "head", flat_config(), head_tensors(EAGLE1))  # without embed_tokens
        with pytest.raises(RuntimeError, match=r"eagle-llm cannot load .*embed_tokens"):
            eagle_llm.load(plain.where, head)

    def test_without_the_package(self, monkeypatch):
        monkeypatch.setattr(eagle_llm, "installed", lambda: False)
        with pytest.raises(RuntimeError, match=r"not installed: pip install --no-deps eagle-llm==1\.2\.1"):
            eagle_llm.load("", "")


@real
class TestReleased:
    def test_the_same_output_from_the_same_call(self, plain, live):
        for count in (40, 60, 200):
            ids = prompt_of(count)[None]
            before = live.eagenerate(ids, temperature=0.0, max_new_tokens=32)
            with specx.retrofit(live) as handle:
                now = live.eagenerate(ids, temperature=0.0, max_new_tokens=32)
            assert type(now) is type(before)
            assert (now.dtype, now.shape) == (before.dtype, (1, count + 32))
            assert torch.equal(now, before[:, : count + 32])
            assert torch.equal(now, own_ids(plain.target, ids, 32))
            if count < 100:  # the head knows these by heart
                assert handle.last.stats["tau"] > 1.5

    def test_the_generator(self, live):
        ids = prompt_of(40)[None]
        before = [each.clone() for each in live.ea_generate(ids, max_steps=6)]
        with specx.retrofit(live):
            run = live.ea_generate(ids, max_steps=6)
            now = list(run)
        assert isinstance(run, GeneratorType)
        assert len(now) == len(before) == 6
        lengths = [each.shape[1] for each in now]
        assert lengths == sorted(set(lengths))
        assert lengths[0] > 40
        short = min(lengths[-1], before[-1].shape[1])
        assert torch.equal(now[-1][:, :short], before[-1][:, :short])

    def test_weights_are_shared(self, live):
        with specx.retrofit(live) as handle:
            assert weights(handle.engine.model) <= weights(live.base_model)
            assert weights(handle.draft.head) <= weights(live)
            assert not len(handle.engine.packed)

    def test_nothing_is_read_from_disk(self, live, monkeypatch):
        def refuse(*args, **kwargs):
            raise AssertionError("a file was opened")

        monkeypatch.setattr("builtins.open", refuse)
        monkeypatch.setattr(Path, "open", refuse)
        with specx.retrofit(live):
            live.eagenerate(prompt_of(20)[None], max_new_tokens=4)

    @pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
    def test_everything_is_as_it_was(self, live, used):
        if used:
            live.eagenerate(prompt_of(20)[None], max_new_tokens=4)
        before, values = picture(live), {name: each.clone() for name, each in live.state_dict().items()}
        gradients = [each.requires_grad for each in live.parameters()]
        handle = specx.retrofit(live)
        live.eagenerate(prompt_of(40)[None], max_new_tokens=8)
        next(live.ea_generate(prompt_of(40)[None]))
        assert handle.active
        handle.remove()
        handle.remove()
        gc.collect()
        assert not handle.active
        assert picture(live) == before
        assert all(torch.equal(each, values[name]) for name, each in live.state_dict().items())
        assert [each.requires_grad for each in live.parameters()] == gradients
        assert live.eagenerate.__func__ is type(live).eagenerate

    def test_a_call_that_was_the_objects_own_comes_back(self, live):
        live.eagenerate = mine = lambda *_, **__: "mine"
        with specx.retrofit(live):
            assert live.eagenerate is not mine
        assert live.eagenerate is mine

    def test_an_exception_inside(self, live, monkeypatch):
        before = picture(live)
        with pytest.raises(ValueError, match="between 0 and 63"), specx.retrofit(live):
            live.eagenerate(torch.full((1, 5), 64))
        assert picture(live) == before
        with specx.retrofit(live) as handle:
            monkeypatch.setattr(handle.draft, "start", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                live.eagenerate(prompt_of(9)[None])
            monkeypatch.undo()
            assert live.eagenerate(prompt_of(9)[None], max_new_tokens=4).shape == (1, 13)
        assert picture(live) == before

    def test_twice_is_refused(self, live):
        with specx.retrofit(live), pytest.raises(ValueError, match="already retrofitted"):
            specx.retrofit(live)
        specx.retrofit(live).remove()

    def test_the_objects_tree_and_ones_own(self, live):
        with specx.retrofit(live) as handle:
            out, _ = handle._calls.start(prompt_of(9)[None], (0, 0, 0), 4, None, handle._calls._tree(None))
            assert out.prompt_tokens == 9
            assert handle._calls._tree(None) == {"nodes": 26, "depth": 4, "beam": 4}
            assert handle._calls._tree([[0], [1], [0, 0]]) == {"nodes": 4, "depth": 1, "beam": 2}
        with specx.retrofit(live, nodes=6, depth=1, policy="window", draft_context=64, backend="reference") as handle:
            live.eagenerate(prompt_of(100)[None], max_new_tokens=12)
            assert handle.last.stats["policy"] == "window"
            assert handle.last.stats["draft_kv_tokens"] <= 64
            assert max(map(int, handle.last.stats["accepted_histogram"])) <= 2

    def test_sampling_follows_torchs_seed(self, live):
        def drawn(seed, **options):
            torch.manual_seed(seed)
            return live.eagenerate(prompt_of(9)[None], max_new_tokens=8, **options)

        with specx.retrofit(live):
            greedy = drawn(0)
            assert torch.equal(drawn(1, temperature=3.0), drawn(1, temperature=3.0))
            assert len({str(drawn(seed, temperature=3.0)) for seed in range(6)}) > 3
            assert torch.equal(drawn(1, temperature=3.0, top_k=1.0), greedy)
            assert torch.equal(drawn(1, temperature=3.0, top_p=1e-6), greedy)

    def test_it_ends_at_the_tokenizers_end(self, plain, live):
        whole = own_ids(plain.target, prompt_of(40)[None], 20)
        live.tokenizer.eos_token = f"w{int(whole[0, 46])}"
        end = whole[0, 40:].tolist().index(int(whole[0, 46]))
        with specx.retrofit(live):
            out = live.eagenerate(prompt_of(40)[None], max_new_tokens=20)
        assert torch.equal(out, whole[:, : 41 + end])

    def test_lengths(self, live):
        with specx.retrofit(live):
            assert live.eagenerate(prompt_of(40)[None], max_new_tokens=99, max_length=50).shape == (1, 50)
            assert live.eagenerate(prompt_of(2040)[None]).shape == (1, 2048)
            with pytest.raises(ValueError, match="max_length 40 leaves nothing"):
                live.eagenerate(prompt_of(40)[None], max_length=40)
            with pytest.raises(ValueError, match="fills the target's 2048 positions"):
                live.eagenerate(prompt_of(2048)[None])

    def test_beyond_2048_where_the_package_crashes(self, stretched):
        live, ids = stretched.live(), prompt_of(LONG)[None]
        with pytest.raises(RuntimeError, match="exceeds dimension size") as crash:
            live.eagenerate(ids, max_new_tokens=12, max_length=4096)
        place = crash.traceback[-1]
        assert (Path(place.path).name, place.name) == ("kv_cache.py", "cat")
        with specx.retrofit(live) as handle:
            assert torch.equal(live.eagenerate(ids, max_new_tokens=12), own_ids(stretched.target, ids, 12))
            assert handle.last.stats["policy"] == "auto"

    def test_a_rotation_that_the_package_ignores(self, turned, caplog):
        live, ids = turned.live(), prompt_of(60)[None]
        theirs = live.eagenerate(ids, max_new_tokens=24)[:, :84]
        with caplog.at_level(logging.WARNING, "specx"), specx.retrofit(live) as handle:
            mine = live.eagenerate(ids, max_new_tokens=24)
        assert torch.equal(mine, own_ids(turned.target, ids, 24))
        assert first_difference(mine[0].tolist(), theirs[0].tolist()) is not None
        assert "rotates by base 10000 although its config says rope_theta 500000" in handle.notes[0]
        assert handle.notes[0] in caplog.text

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            (torch.ones(2, 5, dtype=torch.long), "one prompt at a time"),
            (torch.ones(1, 0, dtype=torch.long), "not an empty one"),
            (torch.ones(5, dtype=torch.long), r"shape \[1, L\]"),
            ([[1, 2]], r"shape \[1, L\]"),
        ],
    )
    def test_prompts_that_cannot_be_served(self, live, ids, message):
        with specx.retrofit(live), pytest.raises(ValueError, match=message):
            live.eagenerate(ids)


@real
class TestCommand:
    def call(self, pair, *more):
        return CliRunner().invoke(cli.main, ["retrofit-check", "--target", pair.where, "--head", pair.head, *more])

    def prompt(self, count):
        return " ".join(f"w{token}" for token in prompt_of(count).tolist())

    def test_identical(self, plain):
        result = self.call(plain, "--prompt", self.prompt(40), "--max-new-tokens", "16", "--device", "cpu")
        assert result.exit_code == 0, result.output
        lines = {line.split()[0]: line for line in result.stdout.splitlines() if line.strip()}
        assert lines["outputs:"] == "outputs: identical"
        assert "identical to transformers' own" in lines["retrofitted"]
        for name in ("tau", "tokens/s", "memory,"):
            assert len([word for word in lines[name].split() if word[-1].isdigit()]) == 2

    def test_another_output(self, turned):
        result = self.call(turned, "--prompt", self.prompt(60), "--max-new-tokens", "24", "--device", "cpu")
        assert result.exit_code == 0, result.output
        assert "outputs: differ from token" in result.stdout
        assert "although its config says rope_theta 500000" in result.stdout
        assert "retrofitted output: identical to transformers' own" in result.stdout

    def test_the_package_put_right(self, turned):
        result = self.call(
            turned, "--prompt", self.prompt(60), "--max-new-tokens", "24", "--device", "cpu", "--fix-rope"
        )
        assert result.exit_code == 0, result.output
        assert "outputs: identical" in result.stdout
        assert "rope_theta" not in result.stdout

    def test_a_crash_of_the_package(self, stretched, tmp_path):
        (tmp_path / "prompt.txt").write_text(self.prompt(LONG))
        result = self.call(
            stretched, "--input", str(tmp_path / "prompt.txt"), "--max-new-tokens", "8", "--device", "cpu"
        )
        assert result.exit_code == 0, result.output
        assert "eagle-llm fails on this prompt: RuntimeError in cat (eagle/model/kv_cache.py:63)" in result.stdout
        assert "retrofitted output: identical to transformers' own" in result.stdout

    def test_mistakes(self, plain, tmp_path):
        both = self.call(plain, "--prompt", "a", "--input", "b")
        assert (both.exit_code, "not both" in both.stderr) == (2, True)
        folder = tmp_path / "head"
        folder.mkdir()
        absent = CliRunner().invoke(cli.main, ["retrofit-check", "--target", plain.where, "--head", str(folder)])
        assert (absent.exit_code, "no config.json" in absent.stderr) == (1, True)


class OfficialHead(torch.nn.Module):
    """Parameters under the names of EAGLE's repository, its attributes, and no forward: specx must not call one."""

    def __init__(self, tensors, config, eagle3):
        super().__init__()
        for name, tensor in tensors.items():
            *path, leaf = name.split(".")
            place = self
            for each in path:
                if each not in place._modules:
                    place.add_module(each, torch.nn.ModuleList() if each == "layers" else torch.nn.Module())
                place = place._modules[each]
            if tensor.is_floating_point():
                place.register_parameter(leaf, torch.nn.Parameter(tensor))
            else:
                place.register_buffer(leaf, tensor)
        self.total_tokens, self.depth, self.top_k, self.threshold, self.stable_kv = 19, 3, 4, 0.0, None
        if eagle3:
            self.config = config
        else:
            self.layers[0].self_attn.config = config


class OfficialModel(torch.nn.Module):
    """The attributes and signatures of EAGLE's own `EaModel`; its calls are never to be answered by itself."""

    def __init__(self, target, tensors, config, eagle3):
        super().__init__()
        self.base_model, self.config, self.use_eagle3 = target, target.config, eagle3
        self.ea_layer = OfficialHead(tensors, config, eagle3)
        ends = {"<|eot_id|>": None}
        self.tokenizer = SimpleNamespace(eos_token_id=None, convert_tokens_to_ids=ends.get)
        self.ends = ends

    def eagenerate(self, input_ids, temperature=0.0, top_p=0.0, top_k=0.0, max_new_tokens=512, max_length=2048,
                   log=False, is_llama3=False):  # fmt: skip
        raise NotImplementedError

    def ea_generate(self, input_ids, temperature=0.0, top_p=0.0, top_k=0.0, max_new_tokens=512, max_length=2048,
                    log=False, is_llama3=False):  # fmt: skip
        raise NotImplementedError


class Config(SimpleNamespace):
    def to_dict(self):
        return copy.deepcopy(vars(self))


@pytest.fixture(scope="module", params=[EAGLE1, EAGLE3])
def official(request, tmp_path_factory):
    """A live object, and its target as transformers has it."""
    target = tiny_target(rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    folder = fitted(target, tmp_path_factory.mktemp("official") / "head", request.param, (40,))
    tensors = torch.load(Path(folder) / "pytorch_model.bin", weights_only=True)
    tensors = {name: each.detach() for name, each in tensors.items()}
    if request.param == EAGLE3:  # which the loader of folders drops
        tensors["t2d"] = torch.ones(VOCAB, dtype=torch.bool)
    config = Config(**json.loads((Path(folder) / "config.json").read_text()))
    rewritten = copy.deepcopy(target)
    for layer in rewritten.model.layers:  # the one thing that its state has more than transformers'
        layer.self_attn.rotary_emb = torch.nn.Module()
        layer.self_attn.rotary_emb.register_buffer("inv_freq", torch.ones(6))
    return OfficialModel(rewritten, tensors, config, request.param == EAGLE3).eval(), target


class TestOfficial:
    def test_the_same_call(self, official):
        live, target = official
        ids, before = prompt_of(40)[None], picture(live)
        with specx.retrofit(live, lookup=False, controller="off") as handle:
            out, count, last = live.eagenerate(ids, temperature=0.0, max_new_tokens=32, log=True)
            assert torch.equal(out, own_ids(target, ids, 32))
            assert torch.equal(live.eagenerate(ids, max_new_tokens=32), out)
            assert (int(count), last) == (32, handle.last.steps - 1)
            assert handle.last.stats["tau"] > 1.5
            pieces = list(live.ea_generate(ids, max_new_tokens=32))
            assert torch.equal(pieces[-1], out)
            assert len(pieces) == last + 1
            assert weights(handle.engine.model) <= weights(live.base_model)
            assert not handle.notes
        assert picture(live) == before
        with pytest.raises(NotImplementedError):
            live.eagenerate(ids)

    def test_signatures_take_what_the_objects_own_take(self, official):
        live, _ = official
        own = {name: list(inspect.signature(getattr(live, name)).parameters) for name in ("eagenerate", "ea_generate")}
        with specx.retrofit(live):
            assert {name: list(inspect.signature(getattr(live, name)).parameters) for name in own} == own

    def test_beyond_2048(self, official):
        live, target = official
        with specx.retrofit(live):
            ids = prompt_of(LONG)[None]
            assert torch.equal(live.eagenerate(ids, max_new_tokens=8), own_ids(target, ids, 8))

    def test_the_heads_tree_is_read_at_every_call(self, official):
        live, _ = official
        with specx.retrofit(live) as handle:
            assert handle._calls._tree() == {"nodes": 20, "depth": 3, "beam": 4}
            live.ea_layer.total_tokens, live.ea_layer.depth = 0, 0
            live.eagenerate(prompt_of(40)[None], max_new_tokens=8)
            assert handle.last.stats["tau"] == 1.0
            live.ea_layer.total_tokens, live.ea_layer.depth = 19, 3

    def test_the_chat_end_of_llama_3(self, official):
        live, target = official
        whole = own_ids(target, prompt_of(40)[None], 20)
        live.ends["<|eot_id|>"] = int(whole[0, 46])
        end = whole[0, 40:].tolist().index(int(whole[0, 46]))
        with specx.retrofit(live):
            assert torch.equal(live.eagenerate(prompt_of(40)[None], max_new_tokens=20), whole)
            out, *_ = live.eagenerate(prompt_of(40)[None], max_new_tokens=20, is_llama3=True, log=True)
        assert torch.equal(out, whole[:, : 41 + end])


class TestRefusals:
    def test_no_ea_model(self):
        with pytest.raises(ValueError, match="Linear is no EaModel: it has no base_model"):
            specx.retrofit(torch.nn.Linear(2, 2))

    def test_an_unknown_option(self, official):
        with pytest.raises(ValueError, match="retrofit takes no option 'node'; did you mean 'nodes'"):
            specx.retrofit(official[0], node=3)
        assert "eagenerate" not in vars(official[0])

    def test_weights_that_do_not_fit(self):
        target = tiny_target()
        target.model.extra = torch.nn.Linear(2, 2)
        with pytest.raises(ValueError, match="cannot be shared with a transformers model"):
            shared_target(target)

    def test_tied_embeddings(self):
        target = tiny_target(tie_word_embeddings=True)
        shared = shared_target(target)
        assert weights(shared) <= weights(target)
        assert torch.equal(shared(prompt_of(9)[None]).logits, target(prompt_of(9)[None]).logits)

    def test_tables_are_float32_whatever_the_weights_are(self):
        target = tiny_target().bfloat16()
        shared = shared_target(target)
        assert shared.dtype == torch.bfloat16
        assert shared.model.rotary_emb.inv_freq.dtype == torch.float32
        assert weights(shared) <= weights(target)


class TestMeasurement:
    def test_rows_and_table(self, monkeypatch, tmp_path):
        """Runs are stood in for; that an EAGLE-1 head is written as the package reads it is not."""
        from specx.eval import retrofit as measurement

        seen = []

        def run_one(job, retrofitted):
            seen.append(set(torch.load(Path(job["head"]) / "pytorch_model.bin", weights_only=True)))
            if not retrofitted and not job["fix_rope"]:
                return Way([], failed="RuntimeError in cat")
            return Way([1, 2], "", 2.0, 3.0, 4.0, 5 << 20, [1, 2] if retrofitted else None)

        monkeypatch.setattr(measurement, "run_one", run_one)
        monkeypatch.setattr(measurement, "installed", lambda: True)
        out = tmp_path / "found"
        command = ["--out", str(out), "--lengths", "64,96", "--prompts", "2"]
        result = CliRunner().invoke(measurement.main, command)
        assert result.exit_code == 0, result.output
        rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
        assert len(rows) == 2 * 2 * len(measurement.WAYS) == len(seen)
        assert all("embed_tokens.weight" in keys and "fc.weight" in keys for keys in seen)
        text = (out / "summary.md").read_text()
        assert "| 64 | eagle-llm | failed | failed | failed | failed | 0 of 2 |" in text
        assert "| 96 | retrofitted, auto | 2.00 | 4.0 | 3.0 | 5 | 2 of 2 |" in text
        assert "eagle-llm: RuntimeError in cat" in text
        again = CliRunner().invoke(measurement.main, command)
        assert (again.exit_code, "already holds results" in again.output) == (2, True)
