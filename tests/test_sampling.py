"""The target's token at each node: three ways to call the processors, one result."""

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specx import sampling
from specx.acceptance import walk
from specx.config import SamplingConfig
from specx.hf_config import end_ids, logits_processors
from specx.sampling import TokenChooser
from specx.tree import DraftTree

CPU = torch.device("cpu")
VOCAB = 12
ID_FREE = {
    "none": [],
    "temperature": [TemperatureLogitsWarper(0.7)],
    "top_k and top_p": [TopKLogitsWarper(5), TopPLogitsWarper(0.8)],
    "suppressed": [SuppressTokensLogitsProcessor([1, 2, 3])],
}
BY_IDS = {
    "repetition": [RepetitionPenaltyLogitsProcessor(2.5)],
    "no bigram twice": [NoRepeatNGramLogitsProcessor(2)],
    "no early end": [MinNewTokensLengthLogitsProcessor(6, 3, 4)],
    "not at the beginning": [SuppressTokensAtBeginLogitsProcessor([0, 4, 5], 8)],
    "repetition, top_k": [RepetitionPenaltyLogitsProcessor(1.5), TopKLogitsWarper(3)],
}


class Shift(LogitsProcessor):
    """Nobody knows this one: it must be called along the walk, one node at a time."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        assert input_ids.shape[0] == scores.shape[0] == 1
        self.seen.append(input_ids[0].tolist())
        return scores.roll(int(input_ids[0, -1]), -1)


def chooser(processors, temperature=0.0, seed=0):
    return TokenChooser(LogitsProcessorList(processors), SamplingConfig(temperature=temperature, seed=seed), CPU)


def greedy_tree(logits_after, processors, ids, width=2, levels=3):
    """A tree that drafts the processed argmax and other tokens below every node, and the raw logits of its nodes."""
    tokens, parents, depths, rows = [int(ids[-1])], [-1], [0], []
    for node in range(1000):
        if node >= len(tokens):
            break
        path, at = [], node
        while at >= 0:
            path.append(tokens[at])
            at = parents[at]
        running = torch.cat([ids[:-1], torch.tensor(path[::-1])])
        raw = logits_after(running)
        rows.append(raw)
        if depths[node] < levels:
            ranked = LogitsProcessorList(processors)(running[None], raw[None].clone())[0].argsort(descending=True)
            for token in ranked[:width].tolist():
                tokens.append(token)
                parents.append(node)
                depths.append(depths[node] + 1)
    tree = DraftTree(*(torch.tensor(part) for part in (tokens, parents, depths)), torch.zeros(len(tokens)))
    return tree, torch.stack(rows)


def table(seed):
    """Logits that are a function of the running ids."""

    def logits_after(running):
        generator = torch.Generator().manual_seed(hash((seed, *running.tolist())) % 2**31)
        return 2 * torch.randn(VOCAB, generator=generator)

    return logits_after


def one_by_one(logits_after, processors, ids, count):
    """Plain greedy decoding."""
    found = []
    for _ in range(count):
        scores = LogitsProcessorList(processors)(ids[None], logits_after(ids)[None].clone())
        found.append(int(scores.argmax()))
        ids = torch.cat([ids, torch.tensor(found[-1:])])
    return found


@pytest.mark.parametrize("name", [*ID_FREE, *BY_IDS])
@pytest.mark.parametrize("seed", range(5))
def test_all_modes_choose_the_same_greedy_tokens(seed, name):
    processors = (ID_FREE | BY_IDS)[name]
    ids = torch.randint(0, VOCAB, (6,), generator=torch.Generator().manual_seed(seed))
    tree, logits = greedy_tree(table(seed), processors, ids)
    own = chooser(processors)
    assert own.mode == ("batch" if name in ID_FREE else "level")
    expected = tuple(one_by_one(table(seed), processors, ids, 4))
    modes = ["batch", "level", "walk"] if name in ID_FREE else ["level", "walk"]
    for mode in modes:
        own.mode = mode
        found = walk(tree, own.choose(logits, tree, ids[:-1]))
        assert found.tokens == expected
        assert found.drafted == 3


@pytest.mark.parametrize("name", [*ID_FREE, *BY_IDS])
def test_level_mode_agrees_at_every_node(name):
    """Not only on the walk: each node's token is what its own path gives."""
    processors = (ID_FREE | BY_IDS)[name]
    ids = torch.tensor([3, 1, 4, 1, 5])
    tree, logits = greedy_tree(table(9), processors, ids, width=3)
    own = chooser(processors)
    own.mode = "level"
    for node, token in enumerate(own.choose(logits, tree, ids[:-1])):
        running = torch.cat([ids[:-1], tree.tokens[tree.path(node)]])
        assert token == one_by_one(table(9), processors, running, 1)[0]


def test_choice_without_tokens_before_the_root():
    tree = DraftTree.single(3)
    empty = torch.empty(0, dtype=torch.long)
    logits = table(0)(torch.tensor([3]))[None]
    expected = [int(logits.argmax())]
    for mode in ("batch", "level", "walk"):
        own = chooser([])
        own.mode = mode
        assert own.choose(logits, tree, empty).tolist() == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_unknown_processor_goes_along_the_walk(temperature):
    shift = Shift()
    own = chooser([TemperatureLogitsWarper(0.5), shift], temperature)
    assert own.mode == "walk"
    ids = torch.tensor([3, 1, 4])
    tree, logits = greedy_tree(table(1), [Shift()], ids, width=VOCAB, levels=2)
    chosen = own.choose(logits, tree, ids[:-1])
    found = walk(tree, chosen)
    assert found.drafted == 2  # every token is drafted, down to the last level
    running = [3, 1, 4]
    assert shift.seen == [running, [*running, found.tokens[0]], [*running, *found.tokens[:2]]]
    assert [node for node, token in enumerate(chosen) if token >= 0] == sorted(found.path)


def test_known_name_of_a_subclass_is_unknown():
    class Own(RepetitionPenaltyLogitsProcessor):
        pass

    assert chooser([Own(1.2)]).mode == "walk"


@pytest.mark.parametrize("mode", ["batch", "level", "walk"])
def test_seeds_reproduce(mode):
    ids = torch.tensor([3, 1, 4])
    tree, logits = greedy_tree(table(2), [], ids, width=VOCAB, levels=1)

    def draws(seed):
        own = chooser([], temperature=1.0, seed=seed)
        own.mode = mode
        texts = (torch.cat([ids, torch.zeros(more, dtype=torch.long)]) for more in range(10))
        return [walk(tree, own.choose(logits, tree, text)).tokens for text in texts]

    assert draws(5) == draws(5)
    assert draws(5) != draws(6)
    assert len(set(draws(5))) > 1, "every position has a number of its own"


def test_draws_at_different_depths_are_independent():
    """Same logits at all nodes of a chain: if one number decided all of them, their tokens would be equal."""
    logits, nodes = torch.zeros(1, 4).expand(4000, 4), torch.arange(4000)
    chain = DraftTree(nodes, nodes - 1, nodes, torch.zeros(4000))
    tokens = chooser([], temperature=1.0).choose(logits, chain, torch.empty(0, dtype=torch.long))
    pairs = torch.bincount(tokens[::2] * 4 + tokens[1::2], minlength=16)
    assert (pairs - 125).abs().max() < 60  # 2000 pairs over 16 cells, five standard deviations


def test_the_number_of_a_position_stays():
    """Whatever trees are verified on the way: what one step did not emit, the next one draws again."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 50, generator=generator)
    own, chain = (
        chooser([], temperature=1.0),
        DraftTree(*(torch.arange(9) + offset for offset in (0, -1, 0)), torch.zeros(9)),
    )
    ids = torch.arange(600)
    whole = [int(own.choose(logits, DraftTree.single(0), ids[:at])) for at in range(20, 600)]
    for at in (20, 33, 501, 590):
        assert own.choose(logits.expand(9, 50), chain, ids[:at]).tolist()[: 600 - at] == whole[at - 20 :][:9]
    assert len(set(whole)) > 20


def test_impossible_tokens_are_never_drawn():
    logits, nodes = torch.full((5000, 6), -torch.inf), torch.arange(5000)
    logits[:, [1, 4]] = 0.0
    chain = DraftTree(nodes, nodes - 1, nodes, torch.zeros(5000))
    drawn = chooser([], temperature=1.0).choose(logits, chain, torch.empty(0, dtype=torch.long))
    assert set(drawn.tolist()) == {1, 4}


def test_global_random_state_is_left_alone():
    state = torch.get_rng_state()
    chooser([], temperature=1.0).choose(torch.zeros(1, 4), DraftTree.single(0), torch.empty(0, dtype=torch.long))
    assert torch.get_rng_state().equal(state)


def test_caller_s_logits_are_left_alone():
    ids = torch.tensor([3, 1, 4])
    for processors in [*ID_FREE.values(), *BY_IDS.values(), [Shift()]]:
        tree, logits = greedy_tree(table(3), processors, ids)
        before = logits.clone()
        chooser(processors).choose(logits, tree, ids[:-1])
        assert logits.equal(before)


def test_known_names_exist_in_transformers():
    import transformers.generation.logits_process as theirs

    for name in sampling._ID_FREE | sampling._LEVEL_WISE:
        assert hasattr(theirs, name)


def test_processors_come_from_the_sampling_options(tiny):
    prompt = torch.tensor([1, 2, 3])
    names = [type(each).__name__ for each in logits_processors(tiny, SamplingConfig(), prompt, 5)]
    assert names == []
    options = SamplingConfig(temperature=0.5, top_k=4, top_p=0.5, repetition_penalty=1.1)
    names = {type(each).__name__ for each in logits_processors(tiny, options, prompt, 5)}
    assert names == {
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "RepetitionPenaltyLogitsProcessor",
    }
    assert end_ids(tiny) == frozenset()
