"""The controller: output is the same whatever it decides; what it decides, on rounds whose cost and worth are known."""

import random
from dataclasses import dataclass

import pytest
import torch
from conftest import noised, pair, tiny_llama
from heads import EAGLE1, EAGLE3, fitted, tiny_target
from heads import couple as eagle_couple
from test_lossless import assert_same, own_tokens
from test_merge import echoing

from specx import decoding
from specx.api import load
from specx.auto_controller import AutoController
from specx.branches import Calibration, Origin, match_code
from specx.config import Settings, TreeConfig
from specx.controller import Round
from specx.experience import Experience
from specx.lookup import Lookup
from specx.step_costs import PLAIN, Shape, StepCosts, bucket_of
from specx.stretches import Stretches
from specx.tree import FEW, FORESEEN, LOOK_BACK, Plan

TREE = TreeConfig()


class RandomController:
    """Any plan within the configured tree, in stretches of any length; long ones leave the draft far behind.

    Of the context any number of what it offers, which is more than the tree has while a passage is being copied.
    """

    def __init__(self, seed: int, tree: TreeConfig, scale: Calibration, drafts: bool) -> None:
        self.largest = 0
        self.rng, self.tree, self.scale, self.drafts = random.Random(seed), tree, scale, drafts
        self.left, self.kind, self.kinds = 0, "plain", set()

    def plan(self, remaining, offer, context, waiting):
        rng, tree = self.rng, self.tree
        if not self.left:
            kinds = ["plain", "lookup", *(["draft", "draft", "merged", "merged"] if self.drafts else [])]
            self.kind = rng.choice(kinds)
            self.left = rng.choice([1, 1, 2, 3, 5, 60 if self.kind in ("plain", "lookup") else 6])
        self.left -= 1
        if self.kind == "plain" or remaining <= 1:
            return Plan(1, 0, 1)
        self.kinds.add(self.kind)
        nodes = rng.randint(2, tree.nodes)
        if self.kind == "lookup":
            nodes = rng.randint(2, max(tree.nodes, len(offer) + 1))
            self.largest = max(self.largest, min(nodes, len(offer) + 1))
            return Plan(nodes, 0, 1, draft=False, branches=offer)
        plan = Plan(nodes, rng.randint(0, tree.depth), rng.randint(1, tree.beam), scale=self.scale)
        return plan.within(remaining, offer if self.kind == "merged" else None)

    def learn(self, done):
        return self.kind


@pytest.fixture
def decide_by_chance(monkeypatch):
    """decide_by_chance(seed): every generation from now on is controlled by chance."""
    made = []

    def from_now_on(seed: int) -> list[RandomController]:
        def controller(request, experience):
            made.append(
                RandomController(seed, request.settings.tree, request.sources.scale, bool(request.sources.draft))
            )
            return made[-1]

        monkeypatch.setattr(decoding._Request, "_controller", controller)
        return made

    return from_now_on


@pytest.fixture(scope="module")
def forgetful():
    """A target whose output repeats itself in part, so that the context is right now and then."""
    model = tiny_llama(seed=2)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data *= 0.15
    return model


def reached_by(model) -> list[int]:
    """Watch the positions that a classic draft is asked to compute."""
    forward, found = model.draft.model.forward, []

    def watched(ids, positions, *rest, **options):
        found.append(int(positions.max()))
        return forward(ids, positions, *rest, **options)

    model.draft.model.forward = watched
    return found


CASES = [
    ("full", "gather", 0),
    ("window", "gather", 1),
    ("window", "recompute", 2),
    ("retrieval", "gather", 3),
    ("retrieval", "recompute", 4),
    ("auto", "gather", 5),
    ("auto", "recompute", 6),
]


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("policy", "refill", "seed"), CASES)
def test_no_decision_changes_the_output(forgetful, prompt_of, decide_by_chance, policy, refill, seed, temperature):
    """Greedy: Hugging Face's tokens. Sampled: those that plain decoding draws from the same seed."""
    model, ids = pair(forgetful, noised(forgetful, 0.02), draft_context=64), echoing(prompt_of, 90)
    options = {"max_new_tokens": 200, "temperature": temperature, "seed": seed}
    own = model.generate(ids, plain=True, **options).tokens
    if not temperature:
        assert_same(forgetful, ids, own, own_tokens(forgetful, ids, 200))
    made, reached = decide_by_chance(seed), reached_by(model)
    options |= {"policy": policy, "refill": refill, "chunk_size": 4, "lookup": True}
    out = model.generate(ids, **options)
    del model.draft.model.forward
    assert out.tokens == own
    assert made[-1].kinds == {"lookup", "draft", "merged"}
    assert out.sources["draft"] > 0
    assert policy == "full" or max(reached) < 64, "the draft stays within its positions, however much waited"


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize("policy", ["full", "window", "auto"])
@pytest.mark.parametrize("kind", [EAGLE3, EAGLE1])
def test_no_decision_changes_the_output_of_heads(made_head, prompt_of, decide_by_chance, kind, policy, temperature):
    model, ids = made_head(kind), echoing(prompt_of, 90)
    options = {"max_new_tokens": 150, "temperature": temperature}
    own = model.generate(ids, plain=True, **options).tokens
    decide_by_chance(1)
    out = model.generate(ids, policy=policy, lookup=True, chunk_size=4, **options)
    assert out.tokens == own
    assert out.sources["draft"] > 0
    assert policy == "full" or out.draft_kv_tokens < 64


@pytest.mark.parametrize("draft", ["demo", "demo-eagle3", "demo-longspec"])
def test_no_decision_changes_a_copy(draft, decide_by_chance):
    """Whose trees from the context are several times as large as the draft's, and leave it as far behind."""
    model = load(None, draft, dtype="float32")
    prompt = model.tokenizer.encode("def a(self):\n    return self.b\n\n" * 12)
    own = model.generate(prompt, plain=True, max_new_tokens=300).tokens
    made = decide_by_chance(3)
    bounded = {} if draft == "demo-longspec" else {"draft_context": 96, "chunk_size": 4}
    out = model.generate(prompt, max_new_tokens=300, **bounded)
    assert out.tokens == own
    assert made[-1].kinds == {"lookup", "draft", "merged"}
    assert made[-1].largest > 32
    assert not bounded or out.draft_kv_tokens < 96


@pytest.fixture(scope="module")
def made_head(tmp_path_factory):
    found = {}

    def make(kind):
        if kind not in found:
            target = tiny_target()
            found[kind] = eagle_couple(target, fitted(target, tmp_path_factory.mktemp("head"), kind, (300,)), 64)
        return found[kind]

    return make


def test_the_default_is_the_controller(tiny, prompt_of):
    model, ids = pair(tiny, noised(tiny, 0.02), settings=Settings()), prompt_of(50)
    for options in ({}, {"temperature": 0.8}):
        plain = model.generate(ids, max_new_tokens=60, plain=True, **options)
        out = model.generate(ids, max_new_tokens=60, explain=True, **options)
        assert out.tokens == plain.tokens
        assert sum(out.stats["rounds_by_mode"].values()) == out.steps
        assert out.decisions
        assert all(decision.startswith("after ") for decision in out.decisions)
    assert plain.stats["rounds_by_mode"]["plain"] == plain.steps
    off = model.generate(ids, max_new_tokens=60, controller="off", lookup=False)
    assert set(off.modes) <= {"tree", "plain"}
    assert off.decisions is None


@dataclass
class World:
    """Rounds with known costs and a draft of known worth; the controller sees milliseconds and accepted nodes only."""

    accept: float = 0.8  # of each next level
    plain: float = 10.0
    node: float = 0.1
    level: float = 1.0
    noise: float = 0.0
    seed: int = 0
    foresees: bool = True
    rebuild: float = 0.0  # of the draft's cache, when it was not asked for a while

    def __post_init__(self) -> None:
        self.rng, self.ms, self.context, self.waiting = random.Random(self.seed), 0.0, 2000, 1

    def run(self, controller: AutoController, tokens: int, offers=lambda: None, right: float = 0.0) -> dict[str, int]:
        """Emit so many tokens; return the rounds by mode."""
        modes: dict[str, int] = {}
        end = self.context + tokens
        while self.context < end:
            offer = offers()
            plan = controller.plan(10_000, offer, self.context, self.waiting)
            path, nodes = self._walk(plan, offer, right)
            ms, waited = self.plain + self.node * (nodes - 1), self.waiting
            foreseen = []
            if plan.draft and plan.nodes > 1:
                ms += self.level * (plan.depth + 1) + 0.05 * self.waiting + self.rebuild * (self.waiting > FEW)
                if self.foresees and self.waiting > FEW:
                    foreseen = [self._rank() for _ in range(min(self.waiting, LOOK_BACK) - 1)]
                self.waiting = 0
            if self.rng.random() < self.noise:
                ms *= self.rng.uniform(2, 20)
            emitted = len(path) + 1
            mode = controller.learn(Round(plan, nodes, path, emitted, ms, 0.0, self.context, waited, True, foreseen))
            modes[mode] = modes.get(mode, 0) + 1
            self.waiting += emitted
            self.context += emitted
            self.ms += ms
        return modes

    def _rank(self) -> int:
        chance = self.rng.random() / max(self.accept, 1e-9)
        return 0 if chance < 0.85 else 1 if chance < 1 else FORESEEN

    def _walk(self, plan, offer, right):
        if plan.nodes == 1:
            return [], 1
        if plan.branches and self.rng.random() < right:
            depth = min(plan.nodes - 1, max(plan.branches.depths))
            return [match_code(9, True) | rank << 12 for rank in range(1, depth + 1)], plan.nodes
        if not plan.draft:
            return [], min(plan.nodes, len(plan.branches) + 1)
        path = []
        while len(path) <= plan.depth and self.rng.random() < self.accept * (1 if plan.beam > 1 else 0.85):
            path.append(12 | 0x20 | (len(path) + 1) << 12)
        return path, plan.nodes


def controller(experience: Experience | None = None, **options) -> AutoController:
    return AutoController(TREE, Calibration(), experience or Experience(), True, **options)


def test_the_origins_of_this_file_are_what_trees_say():
    assert Origin.read(12 | 0x20 | 3 << 12) == Origin(11, True, 0, False, 3)
    assert Origin.read(match_code(9, True) | 2 << 12) == Origin(None, False, 9, True, 2)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_good_draft_is_used(seed, noise):
    world = World(accept=0.85, noise=noise, seed=seed)
    modes = world.run(controller(), 2000)
    drafted = modes.get("tree", 0) + modes.get("chain", 0)
    assert drafted > 0.9 * sum(modes.values())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize(("accept", "level"), [(0.0, 4.0), (0.05, 2.0), (0.5, 8.0)])
def test_a_draft_that_does_not_pay_is_left(seed, noise, accept, level):
    world = World(accept=accept, level=level, noise=noise, seed=seed)
    plain = World(noise=noise, seed=seed)
    model = controller()
    modes = world.run(model, 2000)
    assert modes["plain"] > 0.9 * sum(modes.values())
    assert modes["probe"] >= 1, "it looks again"
    if not noise:
        assert world.ms < 1.03 * 2000 * plain.plain, "never slower than plain by more than 3 %"


def test_a_draft_that_nearly_pays_costs_little():
    """Believed in after a text on which it paid, and a little slower than plain decoding in the next, short one."""
    ratios = []
    for number, accept in enumerate((0.35, 0.4, 0.45) * 8):
        before = Experience()
        World(accept=0.75, level=3.0, seed=number).run(controller(before), 600)
        world = World(accept=accept, level=3.0, seed=100 + number)
        world.run(controller(before), 192)
        ratios.append(world.ms / (192 * world.plain))
    assert sum(ratios) / len(ratios) < 1.02


def test_a_draft_that_pays_a_little_is_not_given_up_after_bad_luck():
    """A tree of two levels gives 1.75 tokens in 1.58 plain steps' time."""
    ratios = []
    for seed in range(16):
        before = Experience()
        World(accept=0.5, level=2.5, seed=seed).run(controller(before), 600)
        world = World(accept=0.5, level=2.5, seed=100 + seed)
        world.run(controller(before), 400)
        ratios.append(world.ms / (400 * world.plain))
    assert sum(ratios) / len(ratios) < 0.97


def test_every_text_is_looked_at():
    """A draft that did not pay on one text is asked early in the next, and kept if it pays there."""
    before = Experience()
    World(accept=0.0, level=4.0).run(controller(before), 500)
    bad = World(accept=0.0, level=4.0).run(controller(before), 300)
    assert bad.get("tree", 0) + bad.get("chain", 0) <= 4
    good = World(accept=0.95, level=4.0).run(controller(before), 300)
    assert good["tree"] + good.get("chain", 0) > 0.7 * sum(good.values())


@pytest.mark.parametrize("rebuild", [100.0, 300.0, 1000.0])
def test_what_a_look_at_the_draft_costs_is_known_in_the_next_text(rebuild):
    before, plain = Experience(), 0.0
    for number in range(12):
        world = World(accept=0.0, level=4.0, seed=number, rebuild=rebuild)
        modes = world.run(controller(before), 128)
        if number >= 6:
            assert modes.get("tree", 0) + modes.get("chain", 0) <= 4
            plain += world.ms / (128 * world.plain)
    assert plain / 6 < 1.03


@pytest.mark.parametrize("nodes", [2, 3, 4, 6])
@pytest.mark.parametrize("depth", [1, 3, 8])
def test_no_shape_promises_levels_that_it_cannot_hold(nodes, depth):
    model = AutoController(TreeConfig(nodes=nodes, depth=depth), Calibration(), Experience(), True)
    assert model._shapes
    assert all(plan.within(999) == plan and plan.depth <= plan.nodes - 2 for plan, _ in model._shapes)
    world = World(accept=0.2, level=4.0)
    world.run(model, 1000)
    assert world.ms < 1.04 * 1000 * world.plain


@pytest.mark.parametrize("seed", range(10))
def test_it_leaves_and_returns(seed):
    world, model = World(accept=0.9, level=2.0, seed=seed), controller()
    first = world.run(model, 600)
    world.accept, before = 0.0, world.ms
    middle = world.run(model, 600)
    assert world.ms - before < 1.04 * 600 * world.plain
    world.accept = 0.9
    last = world.run(model, 1200)
    drafted = [modes.get("tree", 0) + modes.get("chain", 0) for modes in (first, middle, last)]
    assert drafted[0] > 50
    assert drafted[1] < 40
    assert drafted[2] > 100, "within the end it has come back"


def test_the_context_alone_where_it_leads():
    """What stands in the context needs no draft; where nothing does, the draft is used."""
    lookup = Lookup()
    lookup.extend([*range(100, 140), *range(100, 120)])
    offer = lookup.branches(15, 99)
    assert len(offer) == 15
    world, model = World(accept=0.85, level=4.0), controller()
    world.run(model, 300)
    modes = world.run(model, 500, lambda: offer, right=0.98)
    assert modes["lookup"] > 0.8 * sum(modes.values())
    modes = world.run(model, 500)
    assert modes.get("lookup", 0) == 0
    assert modes.get("tree", 0) + modes.get("chain", 0) > 0.8 * sum(modes.values())


def test_larger_trees_only_while_a_passage_is_copied():
    """What a large tree costs is found out where it promises more, and what it gives decides."""
    lookup = Lookup()
    lookup.extend([*range(100, 300), *range(100, 120)])
    offer = lookup.branches(15, 99, copying=64)
    assert len(offer) == 64
    found = {}
    for node in (0.02, 20.0):
        world, sizes = World(node=node, plain=10.0), []
        model = AutoController(TREE, Calibration(), Experience(), False, copying=64)
        plan = model.plan
        model.plan = lambda *given, plan=plan, sizes=sizes: sizes.append(plan(*given)) or sizes[-1]
        world.run(model, 2000, lambda: offer, right=0.98)
        found[node] = [each.nodes for each in sizes[-20:] if each.nodes > 1]
    assert min(found[0.02]) > 32
    assert max(found[20.0], default=0) <= 16


def test_a_draft_between_stretches_of_the_context_is_worth_less():
    """Tokens that the next stretch would have given anyway save no plain step."""
    stretches = Stretches()

    def learn(emitted: int, path: list[int]) -> None:
        stretches.learn(Round(Plan(16, 0, 1), 16, path, emitted, 10.0, 0.0, 2000, 1, True))

    for _ in range(20):
        learn(1, [])
    assert stretches.pace_beyond(0.1) == 0.0, "there is none"
    for _ in range(20):
        learn(8, [match_code(9, True)] * 7)
        for _ in range(4):
            learn(1, [])
    often = stretches.pace_beyond(0.1)
    assert 0.1 < often < 0.8, "between the plain pace and that of the stretches"
    for _ in range(40):
        learn(1, [])
    assert stretches.pace_beyond(0.1) - 0.1 < 0.4 * (often - 0.1), "they became rare"
    assert stretches.pace_beyond(0.9) == 0.0, "they are slower than this"


def test_catching_up_is_counted():
    """A draft that pays by itself is not called back for a visit when what waits costs more than it gives."""
    before = Experience()
    costs = before.costs
    for _ in range(5):
        for levels, nodes, beam, ms in ((0, 1, 1, 10.0), (4, 16, 4, 14.0), (4, 8, 4, 13.0), (2, 4, 1, 12.0)):
            costs.add(Shape(levels, nodes, beam), 2000, ms)
    model = controller(before)
    assert model.plan(999, None, 2000, 1).draft
    for _ in range(2):
        costs.add_catch_up(PLAIN, 100, 2000, 100_000.0)
    model = controller(before)
    model._drafting, model._asked = False, 99
    assert not model.plan(999, None, 2000, 5000).draft


class Prior:
    def verify_ms(self, nodes, context):
        return 100.0 + nodes

    def level_ms(self, context):
        return 50.0


def test_costs_start_from_a_prior_and_follow_what_is_measured():
    costs = StepCosts(Prior())
    assert costs.ms(PLAIN, 1000) == 101.0
    assert costs.ms(Shape(2, 8, 4), 1000) == 108.0 + 100.0
    for ms in (99.0, 10.0, 10.2):  # the first one warms up
        costs.add(PLAIN, 1000, ms)
    assert costs.ms(PLAIN, 1000) == 10.0
    assert costs.ms(Shape(0, 8), 1000) == pytest.approx(10.0 * 108 / 101), "in proportion"
    for ms in (99.0, 30.0, 30.0, 500.0, 30.0, 30.0):
        costs.add(Shape(2, 8, 4), 1000, ms)
    assert costs.ms(Shape(2, 8, 4), 1000) == 30.0, "one that something slowed down does not matter"
    assert costs.ms(Shape(4, 8, 4), 1000) > 40.0, "levels that were not measured follow those that were"
    assert costs.ms(Shape(2, 8, 4), 64_000) == 30.0
    for _ in range(5):
        costs.add(PLAIN, 64_000, 40.0)
    assert costs.ms(Shape(2, 8, 4), 64_000) == pytest.approx(120.0), "as plain steps at either length"
    assert bucket_of(10) == bucket_of(256) < bucket_of(512) < bucket_of(64_000)


def test_a_machine_that_slows_down_changes_no_choice():
    """Another program starts: what is in use becomes slower, and so would everything that is not measured now."""
    costs, tree = StepCosts(), Shape(4, 16, 4)
    for _ in range(10):
        costs.add(tree, 2000, 25.0)
    for _ in range(20):
        costs.add(PLAIN, 2000, 10.0)
    for slow in (3.0, 1.0, 2.0):
        for number in range(12):
            costs.add(PLAIN, 2000, 10.0 * slow)
            assert costs.ms(tree, 2000) / costs.ms(PLAIN, 2000) == pytest.approx(2.5), number
        assert costs.ms(PLAIN, 2000) == pytest.approx(10.0 * slow)
        assert costs.ms(tree, 2000) == pytest.approx(25.0 * slow)
    for _ in range(12):
        costs.add(tree, 2000, 60.0)
    assert costs.ms(tree, 2000) == pytest.approx(60.0), "a shape that itself became dearer is measured anew"


@pytest.mark.parametrize("seed", range(8))
def test_a_machine_whose_pace_jumps_makes_no_shape_look_cheap(seed):
    """Shapes in use by turns, some alone for a while; the pace nearly doubles, or halves again, every 50 rounds."""
    rng, costs, slow = random.Random(seed), StepCosts(), 1.0
    shapes = {Shape(0, 8): 13.0, Shape(0, 16): 14.0, Shape(2, 8, 4): 22.0, Shape(4, 16, 4): 30.0}
    for _ in range(40):
        used = rng.choice(list(shapes))
        for number in range(30):
            slow = 2.8 - slow if rng.random() < 0.02 else slow
            shape = PLAIN if number % rng.choice((2, 12)) == 0 else used
            costs.add(shape, 2000, slow * {PLAIN: 10.0, **shapes}[shape] * rng.uniform(1, 1.05))
    for shape, ms in shapes.items():
        assert costs.ms(shape, 2000) / costs.ms(PLAIN, 2000) == pytest.approx(ms / 10, rel=0.1), shape


def test_a_longer_context_is_not_a_slower_machine():
    """Requests of any length follow one another; what a long one takes says nothing of the machine."""
    costs, tree = StepCosts(), Shape(4, 16, 4)
    for _ in range(10):
        costs.add(tree, 500, 20.0)
    for _ in range(6):
        for context, ms in ((500, 10.0), (2000, 11.0), (8000, 16.0), (16_000, 25.0)):
            for _ in range(20):
                costs.add(PLAIN, context, ms)
            assert costs.ms(PLAIN, context) == pytest.approx(ms)
            assert costs.pace == pytest.approx(1.0)
    assert costs.ms(tree, 500) == pytest.approx(20.0)


@pytest.mark.parametrize("seed", range(5))
def test_phases_of_a_busy_machine(seed):
    world, model = World(accept=0.0, level=4.0, seed=seed), controller()
    drafted = 0
    for slow in (1.0, 3.0, 1.0, 2.0, 1.0):
        world.plain, world.node, world.level = 10.0 * slow, 0.1 * slow, 4.0 * slow
        modes = world.run(model, 300)
        drafted += modes.get("tree", 0) + modes.get("chain", 0)
    assert drafted < 20


def test_the_cost_of_catching_up_is_not_all_in_the_tokens():
    costs = StepCosts()
    for _ in range(3):
        costs.add(PLAIN, 2000, 10.0)
    assert costs.catch_up_ms(0, 2000) == 0.0
    assert costs.catch_up_ms(100, 2000) == pytest.approx(100 * 0.05)
    costs.add_catch_up(PLAIN, 6, 2000, 999.0)
    assert costs.catch_up_ms(100, 2000) == pytest.approx(100 * 0.05), "the first one may have compiled something"
    costs.add_catch_up(PLAIN, 6, 2000, 40.0)  # the cache was rebuilt
    assert costs.catch_up_ms(506, 2000) == pytest.approx(30.0 + 500 * 0.05), "not 84 times as much"
    for _ in range(2):
        costs.add_catch_up(PLAIN, 400, 2000, 100.0)
    assert costs.catch_up_ms(506, 2000) == pytest.approx(90.0 + 106 * 0.05)
    assert costs.catch_up_ms(20, 2000) == pytest.approx(30.0 + 14 * 0.05)


def test_planning_costs_next_to_nothing():
    """Not a timing: work that grows with the rounds would show as calls."""
    world, model = World(accept=0.8), controller()
    world.run(model, 20_000)
    assert len(model.costs._samples) < 20
    assert all(len(each) <= 9 for samples in model.costs._samples.values() for each in samples.values())


def test_probabilities_stay_such(prompt_of, tiny):
    model = pair(tiny, noised(tiny, 0.02), settings=Settings())
    out = model.generate(prompt_of(60), max_new_tokens=60, trace=True)
    for step in out.trace:
        scores = torch.tensor(step["scores"])
        assert (scores <= 0).all()
