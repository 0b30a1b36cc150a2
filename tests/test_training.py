"""The bundled pair's training: seeded, resumable, on text without the held-out modules."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from heads import tiny_target

from specx.api import load
from specx.data import stdlib
from specx.training import demo
from specx.training.corpus import WindowSampler, encode_groups, train_tokenizer
from specx.training.demo import batches, build, export_head, learning_rate, train
from specx.training.loop import Loop, read_log
from specx.training.recipes import DRAFT, RECIPES

SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 1, "num_key_value_heads": 1}
TINY = replace(
    DRAFT,
    model=DRAFT.model | SMALL,
    tokens=6 * 4 * 64,
    phases=((0.5, 2, 128), (1.0, 4, 64)),
)
SECOND = replace(TINY, sharpen=1.3, seed=1)
GROUPS = [np.arange(1, 300, dtype=np.uint16), np.arange(300, 700, dtype=np.uint16)]


class Killed(Exception):
    """Ends a training between two steps, as a lost machine would."""


def logged(folder):
    return [row["loss"] for row in read_log(folder / "log.jsonl")]


def test_a_resumed_run_continues_exactly(tmp_path, monkeypatch):
    whole = train((TINY, SECOND), GROUPS, tmp_path / "whole", "cpu").model
    assert len(logged(tmp_path / "whole")) == 12
    monkeypatch.setattr(demo, "SAVE_SECONDS", 0)
    step = Loop._step

    def until(steps):
        def limited(loop, course, batch, asked):
            if (loop.progress.run, loop.progress.step) == steps:
                raise Killed
            return step(loop, course, batch, asked)

        monkeypatch.setattr(Loop, "_step", limited)

    for ends in ((0, 3), (1, 2)):  # in each run once
        until(ends)
        with pytest.raises(Killed):
            train((TINY, SECOND), GROUPS, tmp_path / "parts", "cpu")
    until(None)
    parts = train((TINY, SECOND), GROUPS, tmp_path / "parts", "cpu").model
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


def test_a_finished_training_does_nothing_more(tmp_path):
    model = train((TINY,), GROUPS, tmp_path / "draft", "cpu").model
    assert len(logged(tmp_path / "draft")) == 6
    again = train((TINY,), GROUPS, tmp_path / "draft", "cpu").model
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert len(logged(tmp_path / "draft")) == 6


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@torch.no_grad()
@pytest.mark.parametrize("name", ["eagle1", "eagle3", "longspec"])
def test_heads_are_trained_and_exported(name, tmp_path, monkeypatch):
    """A few steps of each recipe, over a target with the demo's names but not its size."""
    monkeypatch.setattr(
        demo, "RECIPES", {name: (replace(RECIPES[name][0], tokens=256, until=None, phases=((1.0, 2, 64),)),)}
    )
    target = tiny_target("Llama", vocab_size=700, max_position_embeddings=4096)
    with torch.enable_grad():
        task = train(demo.RECIPES[name], GROUPS, tmp_path / name, "cpu", target)
    assert len(logged(tmp_path / name)) == 2
    export_head(name, task, tmp_path / "demo")
    model = load(target, str(tmp_path / "demo"))
    out = model.generate(torch.arange(1, 30), max_new_tokens=12)
    assert out.tokens == target.generate(torch.arange(1, 30)[None], max_new_tokens=12, do_sample=False)[0, 29:].tolist()


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
