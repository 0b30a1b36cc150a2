"""Greedy output in float32 is `model.generate`'s, token for token."""

import pytest


@pytest.mark.parametrize("policy", ["full", "window", "retrieval", "auto"])
def test_equals_generate(tiny_pair, prompt_of, policy):
    ids = prompt_of(300)
    out = tiny_pair.generate(ids, max_new_tokens=40, policy=policy, chunk_size=8)
    own = tiny_pair.target.generate(ids[None], max_new_tokens=40, do_sample=False)
    assert out.tokens == own[0, 300:].tolist()
