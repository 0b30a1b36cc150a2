"""Trees of two sources: equal paths are one node, the best are kept whoever proposed them, output is unchanged."""

import math
import random

import pytest
import torch
from conftest import noised, pair, tiny_llama
from heads import EAGLE1, EAGLE3, fitted, tiny_target
from heads import couple as eagle_couple
from test_lossless import assert_same, couple, family, own_tokens
from test_tree import TableDraft, path_tokens

from specx.branches import Branches, Calibration, Origin, source_of
from specx.config import RoundConfig, Settings
from specx.lookup import Lookup
from specx.tree import DraftTree, Plan, grow

SEEDS = pytest.mark.parametrize("seed", range(20))
MERGED = Settings(rounds=RoundConfig(lookup=True, controller="off"))
Path = tuple[int, ...]


def offered(rng: random.Random, alphabet: int, nodes: int, depth: int) -> Branches:
    """What a context of few different tokens offers, so that much of it is what the draft proposes as well."""
    lookup = Lookup()
    lookup.extend([rng.randrange(alphabet) for _ in range(150)])
    for length in range(2, 17):
        for _ in range(rng.randrange(20)):
            lookup.rates.count(length, rng.random() < 0.5)
    return lookup.branches(nodes - 1, depth)


def corrected(rng: random.Random) -> Calibration:
    scale = Calibration()
    for _ in range(100):
        scale.count(rng.randrange(13), rng.random() < 0.5)
    return scale


def paths_of(branches: Branches) -> list[Path]:
    found: list[Path] = [()]
    for token, parent in zip(branches.tokens, branches.parents, strict=True):
        found.append((*found[parent], token))
    return found[1:]


def candidates(draft: TableDraft, plan: Plan) -> dict[Path, float]:
    """The draft's candidates and their corrected log-probabilities given their parents, by Python loops."""
    beam = min(plan.beam, draft.vocab)
    found: dict[Path, float] = {}
    level: list[tuple[float, Path]] = [(0.0, ())]
    for _ in range(plan.depth + 1):
        frontier, level = sorted(level, reverse=True)[:beam], []
        for score, path in frontier:
            odds = torch.log_softmax(draft.logits(path), -1)
            for token in sorted(range(draft.vocab), key=lambda token, odds=odds: -float(odds[token]))[:beam]:
                value, _ = plan.scale.apply(odds[token : token + 1])
                found[*path, token] = float(value)
                level.append((score + float(odds[token]), (*path, token)))
    return found


def merged_by_hand(draft: TableDraft, plan: Plan) -> dict[Path, float]:
    """Every path that either source proposes, and its log-probability."""
    odds = candidates(draft, plan)
    for path, own in zip(paths_of(plan.branches), map(math.log, plan.branches.chances), strict=True):
        both = math.log(1 - (1 - math.exp(odds[path])) * (1 - math.exp(own))) if path in odds else own
        odds[path] = min(both, -0.005) if path in odds else own
    return {path: sum(odds[path[:end]] for end in range(1, len(path) + 1)) for path in odds}


@SEEDS
@pytest.mark.parametrize(("nodes", "depth", "beam"), [(16, 3, 4), (40, 3, 3), (8, 5, 1), (6, 0, 3)])
def test_the_best_are_kept_whoever_proposed_them(seed, nodes, depth, beam):
    rng, draft = random.Random(seed), TableDraft(6, seed)
    branches = offered(rng, 6, nodes, 12)
    plan = Plan(nodes, depth, beam, branches=branches, scale=corrected(rng))
    tree, truth = grow(7, draft.logits(()), draft.expand, plan), merged_by_hand(TableDraft(6, seed), plan)
    kept = [path_tokens(tree, node) for node in range(len(tree))]
    assert len(set(kept)) == len(kept) <= nodes, "equal paths are one node"
    assert tree.scores[1:].tolist() == pytest.approx([truth[path] for path in kept[1:]], abs=1e-4)
    rest = [score for path, score in truth.items() if path not in kept]
    assert not rest or min(truth[path] for path in kept[1:]) >= max(rest) - 1e-4
    deep = sum(at > depth + 1 for at in branches.depths)
    assert len(tree) - 1 >= min(nodes - 1, len(truth), beam + depth * beam**2 + deep)


@SEEDS
def test_nodes_know_who_proposed_them(seed):
    rng, draft = random.Random(seed), TableDraft(6, seed)
    plan = Plan(24, 2, 3, branches=offered(rng, 6, 24, 9), scale=Calibration())
    tree = grow(7, draft.logits(()), draft.expand, plan)
    drafted, context = set(candidates(TableDraft(6, seed), plan)), set(paths_of(plan.branches))
    lists = tree.lists()
    assert lists[3][0] == 0
    for node in range(1, len(tree)):
        path, origin = path_tokens(tree, node), Origin.read(lists[3][node])
        sources = {(True, False): "draft", (False, True): "context", (True, True): "both"}
        assert source_of(lists[3][node]) == sources[path in drafted, path in context]
        assert (origin.bucket is not None, origin.match > 0) == (path in drafted, path in context)
        assert lists[2][node] < len(draft.rows)
        if path not in drafted:
            assert lists[2][node] == -1, "never fed to the draft"
        elif lists[2][node] >= 0:
            assert draft.rows[lists[2][node]] == path[-1]
        assert int(tree.parents[node]) < node
        assert tree.scores[node] < tree.scores[tree.parents[node]], "a child never outranks its parent"
    for parent in range(len(tree)):
        own = [n for n in range(1, len(tree)) if tree.parents[n] == parent and Origin.read(lists[3][n]).draft_first]
        assert len(own) <= 1
        if own:
            logits = TableDraft(6, seed).logits(path_tokens(tree, parent))
            assert int(tree.tokens[own[0]]) == int(logits.argmax()), "the draft's own first choice"
    ranks = [Origin.read(code).rank for code in lists[3][1:]]
    assert sorted(ranks) == list(range(1, len(tree)))
    by_rank = [tree.scores[1:][ranks.index(rank)] for rank in sorted(ranks)]
    assert by_rank == sorted(by_rank, reverse=True)


def test_scores_of_impossible_tokens_are_numbers():
    draft, rng = TableDraft(12, 1, "one-hot"), random.Random(0)
    plan = Plan(30, 2, 4, branches=offered(rng, 4, 30, 9), scale=Calibration())
    tree = grow(7, draft.logits(()), draft.expand, plan)
    assert len(tree) == 30
    assert not tree.scores.isnan().any()
    assert len({path_tokens(tree, node) for node in range(30)}) == 30


def test_calibration_follows_what_happens():
    scale, odds = Calibration(), torch.tensor([0.95, 0.75, 0.005]).log()
    same, buckets = scale.apply(odds)
    assert same.exp().tolist() == pytest.approx([0.95, 0.75, 0.005], rel=1e-5)
    assert buckets.tolist() == [11, 9, 0]
    for _ in range(200):
        scale.count(11, False)
        scale.count(9, True)
    found = scale.apply(odds)[0].exp().tolist()
    assert found[0] < 0.1
    assert found[1] > 0.9
    assert found[2] == pytest.approx(0.005)


def test_the_offer_is_a_tree_however_few_are_taken():
    branches = offered(random.Random(3), 5, 40, 12)
    assert len(branches) > 20
    for count in range(len(branches)):
        part = branches.best(count)
        assert len(part) == count
        assert all(parent <= place for place, parent in enumerate(part.parents))
        tree = DraftTree.of_branches(7, part, torch.device("cpu"))
        assert [path_tokens(tree, node) for node in range(1, len(tree))] == paths_of(branches)[:count]
    assert branches.expected()[-1] == pytest.approx(sum(branches.paths))
    assert branches.expected()[3] == pytest.approx(sum(branches.paths[:3]))
    assert branches.leading() == pytest.approx(
        sum(p for p, d in zip(branches.paths, branches.depths, strict=True) if d == 1)
    )


def echoing(prompt_of, length: int) -> torch.Tensor:
    """A prompt that says everything twice: the context always has something to offer."""
    return torch.cat([prompt_of(length // 2), prompt_of(length // 2)])


@pytest.fixture(scope="module")
def forgetful():
    """A target whose next token hardly depends on more than the newest one: its output repeats itself."""
    model = tiny_llama(seed=2)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data *= 0.05
    return model


SHAPES = [{}, {"nodes": 48, "depth": 1}, {"beam": 1, "depth": 4, "nodes": 12}]


@pytest.mark.parametrize(
    ("policy", "refill", "shape"),
    [
        ("full", "gather", SHAPES[0]),
        ("full", "gather", SHAPES[2]),
        ("window", "gather", SHAPES[1]),
        ("window", "recompute", SHAPES[0]),
        ("retrieval", "gather", SHAPES[2]),
        ("retrieval", "recompute", SHAPES[1]),
        ("auto", "gather", SHAPES[0]),
        ("auto", "recompute", SHAPES[2]),
    ],
    ids=str,
)
def test_exact_with_a_classic_draft(forgetful, prompt_of, policy, refill, shape):
    model = pair(forgetful, noised(forgetful, 0.02), settings=MERGED)
    sources = dict.fromkeys(("draft", "context", "both"), 0)
    for length in (300, 40):
        ids = echoing(prompt_of, length)
        out = model.generate(ids, max_new_tokens=100, policy=policy, refill=refill, chunk_size=8, trace=True, **shape)
        assert_same(forgetful, ids, out.tokens, own_tokens(forgetful, ids, 100))
        for source in sources:
            sources[source] += out.sources[source]
        assert out.sources.total() == out.emitted
        assert out.stats["tau"] * out.steps == pytest.approx(sum(out.stats["tokens_by_source"].values()))
        assert [source for step in out.trace for source in step["sources"]].count("context") == out.sources["context"]
        if policy != "full":
            assert out.draft_kv_tokens <= 128
    assert all(sources.values()), f"every source must have its accepted tokens: {sources}"


@pytest.mark.parametrize("name", ["mistral-narrow", "gemma2", "gpt-oss", "opt", "deepseek-v3", "phi3-longrope"])
def test_exact_with_other_families(name, prompt_of):
    model = couple(family(name), 0.02, draft_context=96)
    ids = echoing(prompt_of, 120)
    out = model.generate(ids, max_new_tokens=60, lookup=True, nodes=24, chunk_size=8)
    assert_same(family(name), ids, out.tokens, own_tokens(family(name), ids, 60))


@pytest.mark.parametrize("policy", ["full", "window", "auto"])
@pytest.mark.parametrize("kind", [EAGLE3, EAGLE1])
def test_exact_with_heads(kind, policy, prompt_of, tmp_path_factory):
    target = tiny_target()
    for layer in target.model.layers:
        layer.self_attn.o_proj.weight.data *= 0.05
    folder = fitted(target, tmp_path_factory.mktemp("head"), kind, (200,))
    model = eagle_couple(target, folder, 96)
    for length in (250, 30):
        ids = echoing(prompt_of, length)
        out = model.generate(ids, max_new_tokens=80, policy=policy, lookup=True, chunk_size=8)
        assert_same(target, ids, out.tokens, own_tokens(target, ids, 80))
        assert out.sources["context"] + out.sources["both"] > 0
        if policy != "full":
            assert out.draft_kv_tokens <= 96


def test_the_context_goes_deeper_than_the_draft(forgetful, prompt_of):
    model = pair(forgetful, noised(forgetful, 0.05), settings=MERGED)
    out = model.generate(echoing(prompt_of, 200), max_new_tokens=100, depth=1, nodes=24)
    assert max(out.accepted) > 3, "more than the draft's two levels"


def test_output_is_the_same_without_a_token_to_spare(prompt_of):
    """A target with learned positions, filled to its last one by branches that would go on."""
    target = family("opt")
    model, most = couple(target, 0.001), family("opt").config.max_position_embeddings
    ids = echoing(prompt_of, most - 40)
    for new in (40, 39, 2, 1):
        out = model.generate(ids, max_new_tokens=new, lookup=True, nodes=40)
        assert_same(target, ids, out.tokens, own_tokens(target, ids, new))


def test_a_draft_that_is_none_needs_the_context():
    from specx.adapters.lookup import LookupModel
    from specx.api import SpeculativeModel
    from specx.hf import HFModel

    model = SpeculativeModel(HFModel(family("llama-gqa")), LookupModel(), None)
    with pytest.raises(ValueError, match="leave --no-lookup away"):
        model.generate([1, 2, 3], lookup=False)
