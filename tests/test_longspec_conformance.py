"""The calls of LongSpec's own program, one by one: same logits, same trees, same tokens."""

import pytest
import torch
from conftest import shared

from specx.api import load
from specx.config import DRAFT_ALONE

FOLDER = shared("conformance", "longspec")
pytestmark = pytest.mark.skipif(FOLDER is None, reason="no conformance data beside the checkout (or in SPECX_SHARED)")
CHAIN, TREE = (
    ("tr_llama03_64_seq.pt", {"nodes": 5, "depth": 3, "beam": 1}),
    (
        "tr_llama03_700_tree.pt",
        {"tree_shape": "4,16,16,16,16"},
    ),
)


def traced(file, options, alignment, monkeypatch):
    """What their program did, what ours does, and the logits of each call of our draft."""
    theirs = torch.load(FOLDER / file, weights_only=True)
    folder = FOLDER / "llama03"
    model = load(str(folder / "target"), str(folder / "draft"), dtype="float32", window_alignment=alignment)
    found, own = [], model.draft.logits

    def logits(hidden):
        found.append(own(hidden))
        return found[-1]

    monkeypatch.setattr(model.draft, "logits", logits)
    # With tokens to spare: near the end our trees are cut to the tokens still wanted.
    return theirs, model.generate(theirs["prompt"], max_new_tokens=80, trace=True, **DRAFT_ALONE, **options), found


def differences(calls, found):
    """The largest difference of each call's last rows: their program also recomputes accepted tokens before these."""
    calls = [each["logits"][0] for each in calls if each["exec_type"] != "prefill"]
    assert len(found) >= len(calls) > 20
    return [(call[-len(own) :] - own).abs().max().item() for call, own in zip(calls, found, strict=False)]


@pytest.mark.parametrize(("file", "options"), [CHAIN, TREE], ids=["chain", "tree"])
def test_logits_and_tokens_equal_theirs(file, options, monkeypatch):
    theirs, out, found = traced(file, options, "reference", monkeypatch)
    expected = theirs["result"]["tokens"]
    assert out.tokens[: len(expected)] == expected
    assert max(differences(theirs["calls"], found)) < 1e-4


def test_trees_equal_theirs(monkeypatch):
    theirs, out, _ = traced(*TREE, "reference", monkeypatch)
    for ours, each in zip(out.trace, theirs["rounds"], strict=False):
        assert ours["tokens"] == each["tree_ids"][0].tolist()
        assert (torch.tensor(ours["scores"]) - each["cum_logp"][0]).abs().max() < 1e-4
        assert len(ours["path"]) == each["acc_num"]


def test_the_exact_window_is_another_one(monkeypatch):
    """Beyond the window their program shows a tree's nodes a few keys more; the tokens are the same."""
    theirs, out, found = traced(*TREE, "exact", monkeypatch)
    expected = theirs["result"]["tokens"]
    assert out.tokens[: len(expected)] == expected
    found = differences(theirs["calls"], found)
    assert max(found[::5]) < 1e-4  # the first call of a round, of the root
    assert max(found) > 1e-3
