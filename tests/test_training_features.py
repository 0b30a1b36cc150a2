"""The target's features on disk: the same losses, files for whatever they depend on, a bound that holds."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import tiny_llama
from test_train import CONFIG, byte_level_bpe, job, losses

from specx import cli
from specx.training.features import FeatureCache, fingerprint
from specx.training.options import ClassicConfig, LongSpecConfig
from specx.training.run import train

pytest_plugins = ["disk"]


@pytest.fixture(scope="module")
def deep(disk):
    """A target of six layers, as EAGLE-3 needs."""
    import disk as made

    return disk.save("deep-features", made.llama(num_hidden_layers=6), byte_level_bpe())


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text(Path(__file__).read_text(encoding="utf-8") * 3)
    return str(folder)


def files(folder):
    return sorted(each.name for each in Path(folder).iterdir())


SMALL = ClassicConfig(hidden=32, heads=2, layers=1, distill=True)


@pytest.mark.parametrize("kind", ["longspec", "eagle3", "classic"])
def test_the_same_losses(kind, deep, text, tmp_path, monkeypatch):
    own = SMALL if kind == "classic" else None
    cached = replace(CONFIG, feature_cache=str(tmp_path / "cache"))
    train(job(kind, deep, text, tmp_path / "without", own=own))
    train(job(kind, deep, text, tmp_path / "writing", cached, own))
    written = files(tmp_path / "cache")
    assert len(written) == CONFIG.steps * CONFIG.batch
    stamps = [(tmp_path / "cache" / name).stat().st_mtime_ns for name in written]
    monkeypatch.setattr(FeatureCache, "_write", None)  # nothing is computed, let alone written
    train(job(kind, deep, text, tmp_path / "reading", cached, own))
    assert losses(tmp_path / "without") == losses(tmp_path / "writing") == losses(tmp_path / "reading")
    assert [(tmp_path / "cache" / name).stat().st_mtime_ns for name in written] == stamps


def test_switches_that_leave_the_target_alone_share_its_features(deep, text, tmp_path):
    cached = replace(CONFIG, steps=2, feature_cache=str(tmp_path / "cache"))
    for number, own in enumerate((LongSpecConfig(), LongSpecConfig(noisy=False), LongSpecConfig(distill=True))):
        train(job("longspec", deep, text, tmp_path / str(number), cached, own))
        assert len(files(tmp_path / "cache")) == 8
    train(job("longspec", deep, text, tmp_path / "other", cached, LongSpecConfig(anchor_offset=False)))
    assert len(files(tmp_path / "cache")) == 16  # other positions


class TestCache:
    TOKENS = torch.arange(12).reshape(3, 4)

    def compute(self, tokens, *shared):
        self.calls = getattr(self, "calls", 0) + 1
        return tokens * 2.0, tokens + sum(each.sum() for each in shared)

    @pytest.mark.parametrize("change", ["tokens", "positions", "about", "nothing"])
    def test_what_it_depends_on(self, change, tmp_path):
        positions = torch.arange(4)
        FeatureCache(tmp_path, 1 << 20, {"target": "a"})(self.compute, self.TOKENS, positions)
        again = FeatureCache(tmp_path, 1 << 20, {"target": "b" if change == "about" else "a"})
        tokens, shared = self.TOKENS + (change == "tokens"), positions + (change == "positions")
        found = again(self.compute, tokens, shared)
        assert self.calls == 1 + (change != "nothing")
        for one, other in zip(found, self.compute(tokens, shared), strict=True):
            assert torch.equal(one, other)

    def test_a_row_that_is_there_serves_any_batch(self, tmp_path):
        cache = FeatureCache(tmp_path, 1 << 20, {})
        cache(self.compute, self.TOKENS)
        (found, _) = cache(self.compute, self.TOKENS[[2, 0]])
        assert (self.calls, cache.found, cache.written) == (1, 2, 3)
        assert torch.equal(found, self.TOKENS[[2, 0]] * 2.0)

    def test_the_bound_holds(self, tmp_path):
        def large(tokens):
            return (torch.ones(len(tokens), 1000),)

        cache = FeatureCache(tmp_path, 20000, {})
        for number in range(6):
            cache(large, torch.full((1, 4), number))
        before = files(tmp_path)
        assert 0 < len(before) == cache.written < 6
        assert sum(each.stat().st_size for each in tmp_path.iterdir()) <= 20000
        FeatureCache(tmp_path, 20000, {}, processes=2)(large, torch.full((1, 4), 9))
        assert files(tmp_path) == before  # what other trainings wrote counts

    def test_a_broken_file_is_computed_again(self, tmp_path):
        cache = FeatureCache(tmp_path, 1 << 20, {})
        cache(self.compute, self.TOKENS[:1])
        (file,) = tmp_path.iterdir()
        file.write_bytes(file.read_bytes()[:20])
        for _ in range(2):
            found, _ = cache(self.compute, self.TOKENS[:1])
            assert torch.equal(found, self.TOKENS[:1] * 2.0)
        assert self.calls == 2

    def test_a_full_disk_ends_the_writing_only(self, tmp_path, monkeypatch):
        def full(tensors, file):
            file.write_bytes(b"some")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("specx.training.features.save_file", full)
        found, _ = FeatureCache(tmp_path, 1 << 20, {})(self.compute, self.TOKENS)
        assert torch.equal(found, self.TOKENS * 2.0)
        assert files(tmp_path) == []


def test_targets_are_told_apart():
    one, other = tiny_llama(0), tiny_llama(0)
    assert fingerprint(one) == fingerprint(other)
    other.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    assert fingerprint(one) != fingerprint(other)


def test_a_folder_that_cannot_be_written(deep, text, tmp_path):
    (tmp_path / "file").write_text("x")
    options = ["longspec", "--target", deep, "--data", text, "--out", str(tmp_path / "out"), "--length", "64"]
    result = CliRunner().invoke(cli.main, ["train", *options, "--feature-cache", str(tmp_path / "file" / "cache")])
    assert result.exit_code == 2
    assert "--feature-cache" in result.stderr
    assert "cannot be written (Not a directory): give a folder of your own" in result.stderr
    assert files(tmp_path) == ["file"]
