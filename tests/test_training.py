"""The bundled pair's training: seeded, resumable, on text without the held-out modules."""

from dataclasses import replace

import numpy as np
import pytest

from specx.data import stdlib
from specx.training.corpus import WindowSampler, encode_groups, train_tokenizer
from specx.training.demo import Trainer, batches, build, learning_rate, train
from specx.training.recipes import DRAFT, RECIPES

SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 1, "num_key_value_heads": 1}
TINY = replace(
    DRAFT,
    model=DRAFT.model | SMALL,
    tokens=6 * 4 * 64,
    phases=((0.5, 2, 128), (1.0, 4, 64)),
)
GROUPS = [np.arange(1, 300, dtype=np.uint16), np.arange(300, 700, dtype=np.uint16)]


def test_a_resumed_run_continues_exactly(tmp_path):
    sampler = WindowSampler(GROUPS, 0, 0.5, 0)
    whole = Trainer(TINY, "cpu")
    losses = [whole.step(*batch) for batch in batches(TINY, sampler, 0, 0)]
    first = Trainer(TINY, "cpu")
    for number, batch in enumerate(batches(TINY, sampler, 0, 0)):
        if number == 3:
            break
        first.step(*batch)
    first.save(tmp_path / "state.pt")
    second = Trainer(TINY, "cpu")
    second.resume(tmp_path / "state.pt")
    rest = [second.step(*batch) for batch in batches(TINY, sampler, second.steps, second.tokens)]
    assert rest == losses[3:]


def test_train_writes_a_state_and_a_log(tmp_path):
    model = train((TINY,), GROUPS, tmp_path / "draft", "cpu")
    assert (tmp_path / "draft" / "state.pt").exists()
    assert len((tmp_path / "draft" / "log.jsonl").read_text().splitlines()) == 6
    again = train((TINY,), GROUPS, tmp_path / "draft", "cpu")  # nothing left to do
    assert all((a == b).all() for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_phases_and_learning_rate():
    lengths = [ids.shape for ids, _ in batches(TINY, WindowSampler(GROUPS, 0, 0.0, 0), 0, 0)]
    assert lengths == [(2, 129)] * 3 + [(4, 65)] * 3
    rates = [learning_rate(TINY, done) for done in range(0, TINY.tokens, 16)]
    assert max(rates) <= TINY.learning_rate
    assert rates[-1] < 0.1 * TINY.learning_rate


def test_long_windows_take_their_share():
    recipe = RECIPES["target"][0]
    stream = [np.ones(20_000, dtype=np.uint16)]
    sizes = [ids.shape[1] - 1 for ids, _ in batches(recipe, WindowSampler(stream, 0, 0.0, 0), 0, 0)]
    tail = [recipe.long_length] * recipe.long_tail
    assert sizes[-len(tail) :] == tail
    share = sum(size for size in sizes[: -len(tail)] if size == recipe.long_length) / recipe.tokens
    assert share == pytest.approx(recipe.long_share, abs=0.02)


def test_windows_recur_and_stretch():
    sampler = WindowSampler([np.arange(1, 5000, dtype=np.uint16)], 0, 1.0, 4096)
    ids, positions = sampler.batch(0, 8, 256)
    assert all(len(np.unique(row)) < len(row) for row in ids)  # a copied span
    assert (np.diff(positions, axis=1) >= 1).all()
    assert positions.max() < 4096
    assert (positions[:, -1] - positions[:, 0] > 256).any()
    again, _ = sampler.batch(0, 8, 256)
    assert (ids == again).all()


def test_the_target_shape_is_what_the_design_asks():
    model = build(RECIPES["target"][0])
    assert 9e6 < model.num_parameters() < 10e6
    assert model.config.num_hidden_layers >= 12


def test_tokenizer_writes_any_bytes():
    tokenizer = train_tokenizer(["def f(x):\n    return x\n"] * 3, 300, 128)
    text = "größe = '\U0001f600'\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert encode_groups(tokenizer, [["a", "b"]])[0].tolist()[-1] == 0


def test_held_out_modules_stay_out():
    seen = {name for name, _ in stdlib.training_files()}
    assert seen
    for name in ("argparse.py", "test/test_argparse.py", "tarfile.py", "turtle.py", "unittest/mock.py", "zipfile.py"):
        assert name not in seen
    assert not seen & {name for name, _ in stdlib.held_out_files()}
    assert stdlib.group_of("test/test_asyncio/test_base_events.py") == "asyncio_base_events"
    assert not stdlib.is_held_out("json/decoder.py")
