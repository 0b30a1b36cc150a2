"""Trees of the official EAGLE implementation, round by round: same paths, same scores, same cache lengths."""

import json

import pytest
from conftest import shared

from specx.api import load

FOLDER = shared("conformance", "eagle")
NAMES = pytest.mark.parametrize("name", ["eagle1", "eagle3"])
pytestmark = pytest.mark.skipif(FOLDER is None, reason="no conformance data beside the checkout (or in SPECX_SHARED)")


@pytest.fixture(scope="module", params=["eagle1", "eagle3"])
def golden(request):
    model = load(str(FOLDER / "target"), str(FOLDER / request.param), dtype="float32", specextend=False)
    return model, json.loads((FOLDER / f"golden_{request.param}.json").read_text())


def paths(tokens, parents, scores):
    """Every root-to-node path of tokens, with its score."""
    found = {}
    for node in range(len(tokens)):
        path, at = [], node
        while at >= 0:
            path.append(tokens[at])
            at = parents[at]
        found[tuple(path[::-1])] = scores[node]
    return found


@pytest.mark.parametrize("run", range(5))
def test_trees_equal_the_official_ones(golden, run):
    model, (expected, settings) = golden[0], (golden[1]["runs"][run], golden[1]["meta"]["arguments"])
    # With tokens to spare: near the end our trees are cut to the tokens still wanted.
    options = {"nodes": settings["total_token"], "depth": settings["depth"], "beam": settings["top_k"]}
    out = model.generate(expected["prompt"], max_new_tokens=80, policy="full", trace=True, **options)
    assert out.tokens[: len(expected["output"])] == expected["output"]
    assert len(out.trace) >= len(expected["steps"]) > 5
    cached = len(expected["prompt"])
    for ours, theirs in zip(out.trace, expected["steps"], strict=False):
        mine = paths(ours["tokens"], ours["parents"], ours["scores"])
        official = paths(theirs["tokens"], theirs["parents"], theirs["scores"])
        assert mine.keys() == official.keys()
        assert max(abs(mine[path] - official[path]) for path in mine) < 1e-4
        assert len(ours["path"]) - 1 == theirs["accept_length"]
        assert cached == theirs["draft_kv_len"]
        cached += len(ours["path"])
