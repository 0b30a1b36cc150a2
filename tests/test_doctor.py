"""What `specx doctor` says of healthy and of mismatched pairs."""

import pytest
from click.testing import CliRunner

from specx import cli, doctor
from specx.api import SpeculativeModel, load

pytest_plugins = ["disk"]


def lines(target, draft, **options):
    return [(line.split()[0], line, good) for line, good in doctor.report(target, draft, True, options)]


def test_a_healthy_pair(disk):
    found = lines(disk.target, disk.draft)
    subjects = [subject for subject, _, _ in found]
    expected = "versions devices target backend self-check score draft context profile tokenizers probe"
    assert subjects == expected.split()
    assert all(good for _, _, good in found)
    text = {subject: line for subject, line, _ in found}
    assert "torch" in text["versions"]
    assert "4096 positions" in text["target"]
    assert "draft_context 4096, from its config's max_position_embeddings" in text["context"]
    assert "400 shared ids mean the same token" in text["tokenizers"]
    assert "tau 1.00" not in text["probe"]


def test_the_command(disk):
    result = CliRunner().invoke(cli.main, ["doctor", *disk.pair, "--dtype", "float32"])
    assert (result.exit_code, result.stderr) == (0, "")
    assert len(result.stdout.splitlines()) == 11
    result = CliRunner().invoke(cli.main, ["doctor", "--target", disk.target, "--draft", disk.other_tokenizer])
    assert result.exit_code == 1
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        ("other_tokenizer", "does not share the target's tokenizer: id 0 is '<s>' for the target"),
        (".", "has no config.json"),
    ],
)
def test_what_cannot_be_loaded(disk, draft, message):
    *_, (subject, line, good) = lines(disk.target, getattr(disk, draft, draft))
    assert (subject, good) == ("load", False)
    assert message in line


def test_no_draft(disk):
    assert lines(disk.target, None)[-1][1:] == ("draft       none: plain decoding", True)


def test_no_tokenizer(disk):
    found = {subject: line for subject, line, _ in lines(disk.no_tokenizer, disk.draft)}
    assert "not compared: the target brings none" in found["tokenizers"]
    assert "skipped" in found["probe"]


class TestMismatch:
    """tau exactly 1.0: of what?"""

    @pytest.fixture
    def model(self, disk, monkeypatch):
        """A pair whose draft is never accepted."""
        model = load(disk.target, disk.draft)
        real = SpeculativeModel.generate

        def generate(this, *args, **options):
            return real(this, *args, plain=this.draft is model.draft, **options)

        monkeypatch.setattr(SpeculativeModel, "generate", generate)
        return model

    def verdict(self, model):
        line, good = doctor._probe(model)
        assert not good
        assert "tau 1.00, no drafted token was accepted" in line
        return line

    def test_random_weights(self, model):
        assert "the target does not know text" in self.verdict(model)

    def test_a_draft_that_does_not_know_text(self, model, monkeypatch):
        monkeypatch.setattr(doctor, "_loss", lambda engine, ids: 1.0 if engine is model.engine else float("nan"))
        assert "the draft does not know text" in self.verdict(model)

    def test_a_draft_of_another_target(self, model, monkeypatch):
        monkeypatch.setattr(doctor, "_loss", lambda engine, ids: 1.0)
        assert "made for another target or for another chat template" in self.verdict(model)

    def test_specx_itself(self, model, monkeypatch):
        real = SpeculativeModel.generate
        monkeypatch.setattr(
            SpeculativeModel, "generate", lambda *args, **options: real(*args, **options | {"nodes": 1})
        )
        assert "neither when the target drafts for itself" in self.verdict(model)


def test_the_probe_fits_short_targets(disk, monkeypatch):
    model = load(disk.target, disk.draft)
    monkeypatch.setattr(doctor, "positions_of", lambda config: 100)
    line, good = doctor._probe(model)
    assert good
    assert "tau" in line
    monkeypatch.setattr(doctor, "positions_of", lambda config: 40)
    assert "fewer than 48 positions" in doctor._probe(model)[0]


def test_a_target_that_ends_at_once(disk, monkeypatch):
    model = load(disk.target, disk.draft)
    model.settings = model.settings.override(max_new_tokens=1)
    monkeypatch.setattr(doctor, "_NEW", 1)
    assert doctor._probe(model) == ("probe       the target ended at once; no step was drafted", True)
