"""Sampled output has exactly the target's law, by chi-square tests against enumeration with the Hugging Face model.

The tests draw from seeds that are fixed, so they never flake; and the same tests turn down three rules of acceptance
that look harmless and are wrong.
"""

import itertools
import random
from collections import Counter

import pytest
import torch
from conftest import noised, pair, tiny_llama
from scipy.stats import chi2
from transformers import LogitsProcessorList

from specx import decoding, sampling
from specx.acceptance import Walk, walk
from specx.config import SamplingConfig
from specx.sampling import TokenChooser
from specx.tree import DraftTree

VOCAB, SAMPLES = 6, 1200
PROMPT = [1, 4, 2, 2, 5]
CERTAIN, IMPOSSIBLE = 1e-3, 1e-9
SETTINGS = {
    "temperature 0.5": {"temperature": 0.5},
    "temperature 1": {"temperature": 1.0},
    "temperature 1.5": {"temperature": 1.5},
    "top_p": {"temperature": 1.0, "top_p": 0.8},
    "repetition penalty": {"temperature": 1.0, "repetition_penalty": 1.8},
}


@pytest.fixture(scope="module")
def model():
    """A target neither flat nor peaked, and a draft that errs about half of the time."""
    target = tiny_llama(
        seed=3,
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.35,
    )
    return pair(target, noised(target, 0.1))


def processed(logits, running, temperature, top_p=1.0, repetition_penalty=1.0):
    """The sampling options written out, float64: logits [N, V] after the ids `running` [N, L] -> probabilities."""
    logits = logits.double()
    seen = torch.zeros(logits.shape, dtype=torch.bool).scatter_(1, running, True)
    penalised = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
    probabilities = torch.softmax(torch.where(seen, penalised, logits) / temperature, -1)
    ranked = probabilities.sort(descending=True)
    needed = (ranked.values.cumsum(-1) - ranked.values) < top_p  # what comes before does not reach top_p yet
    kept = torch.zeros_like(needed).scatter_(1, ranked.indices, needed)
    probabilities = probabilities * kept
    return probabilities / probabilities.sum(-1, keepdim=True)


def exact_law(target, options):
    """The law of new tokens 2, 3, 4 (token 1 summed out): {(b, c, d): probability}, by running every sequence."""
    prefixes = torch.tensor([[*PROMPT, *path] for path in itertools.product(range(VOCAB), repeat=3)])
    with torch.no_grad():
        logits = target(input_ids=prefixes).logits
    first = len(PROMPT)
    steps = [processed(logits[:, first - 1 + i], prefixes[:, : first + i], **options) for i in range(4)]
    law = Counter()
    for row, (a, b, c) in enumerate(itertools.product(range(VOCAB), repeat=3)):
        before = float(steps[0][row, a] * steps[1][row, b] * steps[2][row, c])
        for d in range(VOCAB):
            law[b, c, d] += before * float(steps[3][row, d])
    assert sum(law.values()) == pytest.approx(1)
    return law


def drawn(model, options, samples, new=4):
    """Counts of new tokens 2, 3, 4 over that many generations, and the share of emitted tokens that were drafted."""
    counts, drafted = Counter(), 0
    for seed in range(samples):
        out = model.generate(PROMPT, max_new_tokens=new, seed=seed, nodes=12, depth=2, beam=3, **options)
        counts[tuple(out.tokens[1:4])] += 1
        drafted += sum(accepted * steps for accepted, steps in out.accepted.items())
    return counts, drafted / ((new - 1) * samples)


def p_value(counts, law):
    """Chi-square test of goodness of fit; cells that expect fewer than five are pooled."""
    samples = sum(counts.values())
    if any(law[cell] == 0 for cell in counts):
        return 0.0
    cells, pooled = [], [0, 0.0]
    for cell, probability in law.items():
        if samples * probability >= 5:
            cells.append((counts[cell], samples * probability))
        else:
            pooled[0] += counts[cell]
            pooled[1] += samples * probability
    if pooled[1] >= 5:
        cells.append(pooled)
    assert len(cells) > 20
    statistic = sum((found - expected) ** 2 / expected for found, expected in cells)
    return float(chi2.sf(statistic, len(cells) - 1))


@pytest.mark.parametrize("name", SETTINGS)
def test_output_has_the_target_s_law(model, name):
    counts, drafted = drawn(model, SETTINGS[name], SAMPLES)
    assert 0.3 < drafted < 0.8
    assert p_value(counts, exact_law(model.target, SETTINGS[name])) > CERTAIN


def test_law_where_all_three_tokens_may_be_drafted_at_once(model):
    """With one more token wanted, the tree has a third level."""
    options = SETTINGS["temperature 1"]
    counts, drafted = drawn(model, options, SAMPLES, new=5)
    assert 0.3 < drafted < 0.8
    assert p_value(counts, exact_law(model.target, options)) > CERTAIN


def test_law_along_the_walk(model, monkeypatch):
    """Processors that must be called node by node: the repetition penalty, taken for an unknown one."""
    monkeypatch.setattr(sampling, "_LEVEL_WISE", set())
    options = SETTINGS["repetition penalty"]
    assert model.generate(PROMPT, max_new_tokens=1, **options).stats["processors"] == "walk"
    counts, drafted = drawn(model, options, SAMPLES)
    assert 0.3 < drafted < 0.8
    assert p_value(counts, exact_law(model.target, options)) > CERTAIN


def children_of(tree, node):
    return [child for child, parent in enumerate(tree.parents.tolist()) if parent == node]


def trust_a_confident_draft(monkeypatch):
    """Accept the best child unseen where the draft gives it more than half."""

    def confident_walk(tree, chosen):
        chosen, scores = list(chosen), tree.scores.exp().tolist()
        for node in range(len(tree)):
            best = max(children_of(tree, node), key=lambda child: scores[child], default=None)
            if best is not None and scores[best] > 0.5 * scores[node]:
                chosen[node] = int(tree.tokens[best])
        return walk(tree, chosen)

    monkeypatch.setattr(decoding, "walk", confident_walk)


def draw_the_bonus_from_the_draft(monkeypatch):
    """Where the target's token is not drafted, emit another one that the draft would have said there."""
    generator = random.Random(0)

    def drafted_bonus(tree, chosen):
        found = walk(tree, chosen)
        children = children_of(tree, found.path[-1])
        if not children:
            return found
        weights = [float(tree.scores[child].exp()) for child in children]
        bonus = int(tree.tokens[generator.choices(children, weights)[0]])
        return Walk(found.path, (*found.tokens[:-1], bonus), found.drafted)

    monkeypatch.setattr(decoding, "walk", drafted_bonus)


def accept_what_the_target_finds_likely(monkeypatch):
    """Accept a drafted token that is among the target's two best."""
    choose = TokenChooser.choose

    def lenient(self, logits, tree, ids):
        chosen, best = choose(self, logits, tree, ids), logits.topk(2).indices.tolist()
        for node in range(len(tree)):
            liked = [int(tree.tokens[child]) for child in children_of(tree, node) if tree.tokens[child] in best[node]]
            chosen[node] = liked[0] if liked else chosen[node]
        return chosen

    monkeypatch.setattr(TokenChooser, "choose", lenient)


@pytest.mark.parametrize(
    "rule", [trust_a_confident_draft, draw_the_bonus_from_the_draft, accept_what_the_target_finds_likely]
)
def test_wrong_rules_are_found_out(model, monkeypatch, rule):
    options = SETTINGS["temperature 1"]
    rule(monkeypatch)
    counts, _ = drawn(model, options, 600)
    assert p_value(counts, exact_law(model.target, options)) < IMPOSSIBLE


def test_walk_alone_has_the_law_of_its_nodes():
    """100,000 draws at the nodes of one tree: every way to leave it comes as often as the product says."""
    #        0
    #      /   \
    #    1:0   2:1
    #   /  \
    # 3:0  4:2
    tree = DraftTree(
        torch.tensor([1, 0, 1, 0, 2]),
        torch.tensor([-1, 0, 0, 1, 1]),
        torch.tensor([0, 1, 1, 2, 2]),
        torch.zeros(5),
    )
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    law, children = {}, {(0, 0): 1, (0, 1): 2, (1, 0): 3, (1, 2): 4}

    def leave(node, tokens, probability):
        for token, chance in enumerate(torch.softmax(logits[node].double(), -1).tolist()):
            child, emitted = children.get((node, token)), (*tokens, token)
            if child is None:
                law[emitted] = probability * chance
            else:
                leave(child, emitted, probability * chance)

    leave(0, (), 1.0)
    chooser = TokenChooser(LogitsProcessorList(), SamplingConfig(temperature=1.0), torch.device("cpu"))
    # One tree behind the other, at positions of their own, as steps are.
    depths = tree.depths.repeat(100_000) + 3 * torch.arange(100_000).repeat_interleave(5)
    many = DraftTree(tree.tokens.repeat(100_000), tree.parents.repeat(100_000), depths, tree.scores.repeat(100_000))
    draws = chooser.choose(logits.repeat(100_000, 1), many, torch.empty(0, dtype=torch.long))
    counts = Counter(walk(tree, draws[first : first + 5]).tokens for first in range(0, len(draws), 5))
    assert len(law) == 2 + 2 + 4 + 4 + 4
    samples = sum(counts.values())
    assert samples == 100_000
    statistic = sum((counts[way] - samples * chance) ** 2 / (samples * chance) for way, chance in law.items())
    assert chi2.sf(statistic, len(law) - 1) > CERTAIN
