"""Costs, the tree chosen by them, and their profile on disk."""

import dataclasses
import json
import os

import pytest
import torch
from conftest import noised, pair, tiny_llama

from specx import profiles
from specx.config import TreeConfig
from specx.costs import Costs, acceptance_by_rank, acceptance_of, expected_tokens
from specx.draft import DraftModel
from specx.eval.bench_costs import rising
from specx.profiles import key_of, load_profile, path_of, save_profile
from specx.tree import Plan, grow

COSTS = Costs(
    contexts=(1000, 3000),
    nodes=(1, 8, 16),
    verify=((10.0, 17.0, 21.0), (20.0, 34.0, 42.0)),
    level=(1.0, 3.0),
    beam=4,
    rest=0.5,
    tau=2.5,
    tree=(16, 3, 4),
)


class TestInterpolation:
    @pytest.mark.parametrize(
        ("nodes", "context", "ms"),
        [
            (1, 1000, 10), (16, 3000, 42), (4, 1000, 13), (12, 1000, 19), (8, 2000, 25.5), (4, 2000, 19.5),
            (8, 10, 17), (8, 5000, 51), (24, 1000, 25),
        ],
    )  # fmt: skip
    def test_verify(self, nodes, context, ms):
        assert COSTS.verify_ms(nodes, context) == pytest.approx(ms)

    def test_level(self):
        assert [COSTS.level_ms(context) for context in (0, 1000, 2000, 4000)] == [1, 1, 2, 4]

    def test_what_falls_is_not_continued_below_zero(self):
        falling = dataclasses.replace(COSTS, level=(3.0, 1.0))
        assert falling.level_ms(100_000) == 1

    def test_one_context(self):
        single = Costs((512,), (1, 4), ((2.0, 4.0),), (1.0,), 4)
        assert single.verify_ms(2, 99_999) == pytest.approx(8 / 3)

    def test_a_round(self):
        assert COSTS.round_ms(TreeConfig(16, 3, 4), 1000) == 21 + 4 * 1 + 0.5
        assert COSTS.round_ms(TreeConfig(1), 1000) == 10.5


@pytest.mark.parametrize(
    "wrong",
    [
        {"contexts": ()}, {"contexts": (3000, 1000)}, {"contexts": (1000, 1000)}, {"contexts": (1.5, 3000)},
        {"nodes": (1, 8)}, {"level": (1.0,)}, {"level": (0.0, 1.0)}, {"level": (float("nan"), 1.0)},
        {"verify": ((10.0, 17.0, 21.0),)}, {"verify": ((10.0, 17.0), (20.0, 34.0))}, {"beam": 0},
        {"rest": -1.0}, {"rest": float("inf")}, {"tau": 0.5}, {"tree": None}, {"tau": float("nan")},
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(wrong):
    with pytest.raises(ValueError, match=r"fit together|cannot have been measured"):
        dataclasses.replace(COSTS, **wrong)


class TestExpectedTokens:
    def test_a_chain(self):
        assert expected_tokens(TreeConfig(4, 2, 1), 0.5) == pytest.approx(1 + 0.5 + 0.25 + 0.125)
        assert expected_tokens(TreeConfig(3, 2, 1), 0.5) == pytest.approx(1.75)  # no room for the last node

    def test_one_level(self):
        chances = acceptance_by_rank(0.6, 3)
        assert chances == pytest.approx([0.6, 0.12, 0.024])
        assert expected_tokens(TreeConfig(16, 0, 3), 0.6) == pytest.approx(1 + sum(chances))

    @pytest.mark.parametrize(("nodes", "depth", "beam"), [(16, 3, 4), (7, 2, 2), (40, 4, 3), (24, 1, 5)])
    def test_it_is_the_tree_that_a_draft_of_such_chances_grows(self, nodes, depth, beam):
        chances = torch.zeros(4000)
        chances[:8] = torch.tensor(acceptance_by_rank(0.7, 8))
        chances[8:] = (1 - chances.sum()) / 3992  # unlikelier than any of them
        logits = chances.log()
        tree = grow(0, logits, lambda tokens, mask, level: logits.expand(len(tokens), -1), Plan(nodes, depth, beam))
        grown = 1 + tree.scores[1:].exp().sum().item()
        assert expected_tokens(TreeConfig(nodes, depth, beam), 0.7) == pytest.approx(grown, abs=1e-4)

    @pytest.mark.parametrize("first", [0.1, 0.5, 0.9])
    def test_acceptance_explains_tau(self, first):
        tree = TreeConfig(16, 3, 4)
        assert acceptance_of(expected_tokens(tree, first), tree) == pytest.approx(first, abs=1e-6)

    def test_a_tau_beyond_what_the_tree_can_bring(self):
        assert acceptance_of(9.0, TreeConfig(16, 3, 4)) == 1.0


class TestChoice:
    def brute_force(self, costs, context):
        trees = [TreeConfig(n, d, b) for n in (2, 4, 8, 16) for d in range(6) for b in range(1, 5) if n > d + 1]
        return max(expected_tokens(t, costs.acceptance) / costs.round_ms(t, context) for t in trees)

    @pytest.mark.parametrize("tau", [1.1, 1.8, 2.5, 3.5])
    @pytest.mark.parametrize("context", [500, 2000, 8000])
    def test_no_other_tree_is_better(self, tau, context):
        costs = dataclasses.replace(COSTS, tau=tau)
        tree = costs.best_tree(context)
        rate = expected_tokens(tree, costs.acceptance) / costs.round_ms(tree, context)
        assert rate >= 0.99 * self.brute_force(costs, context)
        assert tree.nodes <= 16
        assert tree.beam <= 4

    def test_costs_decide(self):
        free = dataclasses.replace(COSTS, level=(0.01, 0.01), verify=((10.0, 10.0, 10.0),) * 2)
        dear = dataclasses.replace(COSTS, level=(20.0, 20.0))
        assert free.best_tree(1000).nodes == 16
        assert free.best_tree(1000).depth > dear.best_tree(1000).depth == 0

    def test_depth_has_a_limit(self):
        free = dataclasses.replace(COSTS, level=(0.01, 0.01), tau=4.5)
        assert free.best_tree(1000).depth > 4
        assert free.best_tree(1000, deepest=2).depth == 2

    def test_a_draft_that_guesses_badly_gets_little(self):
        assert dataclasses.replace(COSTS, tau=1.0).best_tree(1000) == TreeConfig(2, 0, 1)
        assert dataclasses.replace(COSTS, tau=None, tree=None).acceptance == pytest.approx(0.6)


def test_what_was_held_up_does_not_count():
    assert rising([[5.0, 3.0, 9.0], [4.0, 6.0, 8.0]]) == ((3.0, 3.0, 8.0), (4.0, 6.0, 8.0))


@pytest.fixture(scope="module")
def model():
    target = tiny_llama()
    return pair(target, noised(target, 0.02))


class TestProfile:
    @pytest.fixture(autouse=True)
    def cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("SPECX_CACHE", str(tmp_path))
        return tmp_path

    @pytest.fixture
    def key(self, model):
        return key_of(model.engine, model.draft)

    def test_it_comes_back(self, key, cache):
        path = save_profile(COSTS, key)
        assert load_profile(key).costs == COSTS
        assert str(path) in load_profile(key).about
        assert [each for each in cache.rglob("*") if each.is_file()] == [path]

    def test_none(self, key):
        assert load_profile(key) == profiles.NO_PROFILE

    def test_the_key_tells_pairs_apart(self, model, key):
        other = pair(tiny_llama(num_hidden_layers=2), tiny_llama())
        narrow = pair(model.target, model.draft.model.model, draft_context=64)
        plain = pair(model.target, model.draft.model.model, backend="reference")
        keys = [key, *(key_of(each.engine, each.draft) for each in (other, narrow, plain))]
        assert len({path_of(each) for each in keys}) == 4
        assert key_of(model.engine, model.draft) == key
        assert {"target", "draft", "device", "dtype", "backend", "torch", "transformers"} <= key.keys()

    @pytest.mark.parametrize(
        "damage",
        [
            lambda text: text[:40],
            lambda text: "",
            lambda text: "[1, 2]",
            lambda text: text.replace('"contexts"', '"texts"'),
            lambda text: text.replace("17.0", '"17"'),
            lambda text: text.replace("17.0", "-1.0"),
            lambda text: text.replace("17.0", "NaN"),
            lambda text: text.replace('"format": 2', '"format": 1'),
            lambda text: text.replace('"dtype": "float32"', '"dtype": "float16"'),
            lambda text: text.replace('"verify": [', '"verify": [[],'),
        ],
    )
    def test_what_is_damaged_or_foreign_is_ignored_and_says_so(self, key, damage):
        path = save_profile(COSTS, key)
        good = path.read_text()
        path.write_text(damage(good))
        assert path.read_text() != good
        found = load_profile(key)
        assert found.costs is None
        assert found.ignored
        assert f"{path} is ignored" in found.about
        assert "specx tune" in found.about

    def test_bytes_that_are_no_text(self, key):
        save_profile(COSTS, key).write_bytes(b"\xff\xfe\x00")
        assert load_profile(key).ignored

    def test_a_failing_disk_leaves_the_old_profile(self, key, cache, monkeypatch):
        path = save_profile(COSTS, key)

        def full(self, *args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(type(path), "replace", full)
        with pytest.raises(RuntimeError, match=r"No space left on device; SPECX_CACHE names another folder"):
            save_profile(dataclasses.replace(COSTS, rest=9.0), key)
        assert load_profile(key).costs == COSTS
        assert [each for each in cache.rglob("*") if each.is_file()] == [path]

    def test_a_folder_that_is_a_file(self, key, cache, monkeypatch):
        (cache / "file").write_text("x")
        monkeypatch.setenv("SPECX_CACHE", str(cache / "file"))
        with pytest.raises(RuntimeError, match="cannot be written to"):
            save_profile(COSTS, key)

    def test_where_profiles_lie(self, tmp_path, monkeypatch):
        assert profiles.folder() == tmp_path / "profiles"
        monkeypatch.delenv("SPECX_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert profiles.folder() == tmp_path / "xdg" / "specx" / "profiles"
        monkeypatch.setenv("HOME", str(tmp_path))
        for relative in ("", "here"):
            monkeypatch.setenv("XDG_CACHE_HOME", relative)
            assert profiles.folder() == tmp_path / ".cache" / "specx" / "profiles"

    def test_a_tree_is_chosen_and_the_output_stays(self, model, key, prompt_of):
        save_profile(COSTS, key)
        tuned = pair(model.target, model.draft.model.model)
        plain = tuned.generate(prompt_of(40), max_new_tokens=24)
        tuned.profile = load_profile(key)
        out = tuned.generate(prompt_of(40), max_new_tokens=24, trace=True)
        tree = COSTS.best_tree(40)
        assert out.tokens == plain.tokens
        assert (out.stats["nodes"], out.stats["depth"], out.stats["beam"]) == (tree.nodes, tree.depth, tree.beam)
        assert str(path_of(key)) in out.stats["profile"]
        assert max(len(step["tokens"]) for step in out.trace) <= tree.nodes < 16
        asked = tuned.generate(prompt_of(40), max_new_tokens=24, nodes=5)
        assert (asked.stats["nodes"], asked.stats["depth"]) == (5, 3)
        assert asked.stats["profile"] == "not used: a tree was asked for"

    def test_a_small_draft_context_gets_no_deep_tree(self, model, prompt_of):
        tuned = pair(model.target, model.draft.model.model, draft_context=40)
        free = dataclasses.replace(COSTS, level=(0.01, 0.01), tau=4.5)
        tuned.profile = profiles.Profile(free, "of the test")
        out = tuned.generate(prompt_of(60), max_new_tokens=8)
        assert out.stats["depth"] == 3 < free.best_tree(60).depth

    def test_an_ignored_profile_is_noted(self, model, key, prompt_of):
        save_profile(COSTS, key).write_text("{")
        tuned = pair(model.target, model.draft.model.model)
        tuned.profile = load_profile(key)
        out = tuned.generate(prompt_of(20), max_new_tokens=4)
        assert "is ignored: it is damaged" in out.notes[0]
        assert out.stats["nodes"] == 16


def test_keys_need_no_more_than_the_protocol_of_drafts(model):
    class Other(DraftModel):
        name, draft_context, about = "other", 7, ("a draft of another kind",)

    assert "other" in key_of(model.engine, Other())["draft"]
    assert os.fspath(path_of(key_of(model.engine, Other()))).endswith(".json")
    assert json.dumps(key_of(model.engine, Other()))
