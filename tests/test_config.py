"""Every option's rule, and the errors that name option, value and what is allowed."""

import math
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest

from specx.config import CacheConfig, LoadConfig, SamplingConfig, Settings, StopConfig, TreeConfig, nearest

CONFIGS = (TreeConfig, CacheConfig, SamplingConfig, StopConfig, LoadConfig)
BOUNDED = [(config, each) for config in CONFIGS for each in fields(config) if each.metadata.get("low") is not None]
CHOICES = [(config, each) for config in CONFIGS for each in fields(config) if each.metadata.get("choices")]


def named(pairs):
    return pytest.mark.parametrize(("config", "each"), pairs, ids=[each.name for _, each in pairs])


@pytest.mark.parametrize("config", CONFIGS)
def test_defaults_obey_their_own_rules(config):
    config()


@named(BOUNDED)
def test_bounds_are_allowed(config, each):
    for bound in (each.metadata["low"], each.metadata["high"]):
        if bound is not None:
            assert getattr(config(**{each.name: bound}), each.name) == bound


@named(BOUNDED)
def test_beyond_the_bounds_is_refused(config, each):
    low, high = each.metadata["low"], each.metadata["high"]
    step = 1 if isinstance(low, int) else 1e-7
    for wrong in [low - step] + ([high + step] if high is not None else []):
        with pytest.raises(ValueError, match=rf"^{each.name} must be .*{low}.*got {wrong}") as caught:
            config(**{each.name: wrong})
        assert high is None or str(high) in str(caught.value)


@named(BOUNDED)
@pytest.mark.parametrize("wrong", ["8", True, math.nan, [3]], ids=str)
def test_what_is_no_number_is_refused(config, each, wrong):
    with pytest.raises(ValueError, match=rf"^{each.name} must be "):
        config(**{each.name: wrong})


@named([pair for pair in BOUNDED if isinstance(pair[1].metadata["low"], int)])
@pytest.mark.parametrize("wrong", [20.5, 20.0, math.inf, -math.inf], ids=str)
def test_an_integer_is_an_integer(config, each, wrong):
    """Also 20.0 would reach places where torch takes only an int."""
    with pytest.raises(ValueError, match=rf"^{each.name} must be an integer; got {wrong}"):
        config(**{each.name: wrong})


@named([pair for pair in BOUNDED if pair[1].default is not None])
def test_none_is_no_value_where_there_is_a_default(config, each):
    with pytest.raises(ValueError, match=rf"^{each.name} must be .*got None"):
        config(**{each.name: None})


@named(CHOICES)
def test_choices(config, each):
    for choice in set(each.metadata["choices"]):
        assert getattr(config(**{each.name: choice}), each.name) == choice
    with pytest.raises(ValueError, match=rf"^{each.name} must be one of {each.metadata['choices'][0]}.*got 'other'"):
        config(**{each.name: "other"})


@pytest.mark.parametrize("name", ["temperature", "tree_threshold"])
def test_infinity_is_no_temperature(name):
    config = SamplingConfig if name == "temperature" else TreeConfig
    with pytest.raises(ValueError, match=rf"^{name} must be "):
        config(**{name: math.inf})


@pytest.mark.parametrize(
    ("config", "name", "given"),
    [
        (SamplingConfig, "temperature", 2),
        (SamplingConfig, "temperature", np.float32(0.5)),
        (SamplingConfig, "repetition_penalty", 2),
        (SamplingConfig, "seed", np.int64(3)),
        (TreeConfig, "nodes", np.int32(8)),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", repr(value)),
)
def test_numbers_become_plain(config, name, given):
    """transformers takes neither 2 for 2.0 nor numpy's numbers."""
    held = getattr(config(**{name: given}), name)
    assert held == given
    assert type(held) is (int if name in ("seed", "nodes") else float)


@pytest.mark.parametrize("option", [{"temperature": 2}, {"temperature": 1.0, "repetition_penalty": 2}], ids=str)
def test_whole_numbers_reach_the_processors(tiny_pair, option):
    assert len(tiny_pair.generate([1, 2, 3], max_new_tokens=4, **option).tokens) == 4


@pytest.mark.parametrize(
    ("given", "held"),
    [((), ()), ("END", ("END",)), (["a", "b"], ("a", "b")), (("a",), ("a",)), (None, ())],
    ids=["none", "text", "list", "tuple", "None"],
)
def test_stop_texts(given, held):
    assert StopConfig(stop=given).stop == held


@pytest.mark.parametrize("wrong", ["", [""], [3], 3, ["a", None]], ids=repr)
def test_wrong_stop_texts(wrong):
    with pytest.raises(ValueError, match="stop must be non-empty texts; got"):
        StopConfig(stop=wrong)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_option_says_what_it_does(config):
    for each in fields(config):
        assert each.metadata["help"].endswith((".", ").")), each.name


def test_names_are_unique_over_all_concerns():
    names = [each.name for config in CONFIGS for each in fields(config)]
    assert len(set(names)) == len(names)


def test_settings_are_frozen():
    with pytest.raises(FrozenInstanceError):
        Settings().tree = TreeConfig()


def test_override_reaches_every_concern_and_changes_nothing_else():
    before = Settings()
    after = before.override(nodes=8, sinks=2, temperature=0.5, stop="x", use_specextend=False)
    assert (after.tree.nodes, after.cache.sinks, after.sampling.temperature) == (8, 2, 0.5)
    assert (after.stopping.stop, after.use_specextend) == (("x",), False)
    assert after.tree.depth == before.tree.depth
    assert before == Settings()


def test_override_of_every_option_by_its_own_value_is_no_change():
    before, options = Settings(), {}
    for part in (before.tree, before.cache, before.sampling, before.stopping):
        options |= {each.name: getattr(part, each.name) for each in fields(part)}
    assert before.override(**options) == before


def test_override_keeps_earlier_overrides():
    settings = Settings().override(nodes=8).override(depth=2)
    assert (settings.tree.nodes, settings.tree.depth) == (8, 2)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("temprature", "temperature"), ("max_tokens", "max_new_tokens"), ("use_spec_extend", "use_specextend")],
)
def test_unknown_option_offers_the_nearest(wrong, meant):
    with pytest.raises(ValueError, match=rf"^unknown option '{wrong}'; did you mean '{meant}'\? Known: nodes, "):
        Settings().override(**{wrong: 1})


def test_unknown_option_without_a_near_one():
    with pytest.raises(ValueError, match=r"^unknown option 'zzzzzz'\. Known: nodes, "):
        Settings().override(zzzzzz=1)


def test_override_checks_ranges():
    with pytest.raises(ValueError, match="nodes must be between 1 and 256; got 0"):
        Settings().override(nodes=0)


@pytest.mark.parametrize(
    ("options", "policy"),
    [
        ({}, "auto"),
        ({"use_specextend": False}, "full"),
        ({"policy": "window"}, "window"),
        ({"policy": "window", "use_specextend": False}, "window"),
        ({"policy": None}, "auto"),
    ],
    ids=str,
)
def test_policy_in_force(options, policy):
    assert Settings().override(**options).policy == policy


def test_nearest():
    assert nearest("dept", ["nodes", "depth"]) == "; did you mean 'depth'?"
    assert nearest("qqqq", ["nodes", "depth"]) == "."


def test_no_torch_here():
    code = "import sys, specx.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("given", ["4,16,16", "4 16 16", (4, 16, 16), [4, 16, 16]], ids=str)
def test_a_tree_shape_gives_nodes_depth_and_beam(given):
    tree = Settings().override(tree_shape=given).tree
    assert (tree.tree_shape, tree.nodes, tree.depth, tree.beam) == ((4, 16, 16), 37, 2, 16)


@pytest.mark.parametrize("wrong", ["", "4,x", "4,0", "-1", 4, (2.5,), (True,), ()], ids=str)
def test_what_is_no_tree_shape_is_refused(wrong):
    with pytest.raises(ValueError, match="tree_shape must be positive integers, one a level, such as 4,16,16,16,16"):
        TreeConfig(tree_shape=wrong)


@pytest.mark.parametrize(("wrong", "most"), [((65,), 64), ((60,) * 5, 255), ((1,) * 34, 33)], ids=str)
def test_a_tree_shape_too_large_is_refused(wrong, most):
    with pytest.raises(ValueError, match=f"at most {most} are possible"):
        TreeConfig(tree_shape=wrong)
