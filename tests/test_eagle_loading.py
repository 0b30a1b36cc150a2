"""EAGLE heads as users name them: loading, the command line, doctor, known names."""

import json
from collections import Counter

import pytest
import torch
from click.testing import CliRunner
from heads import EAGLE1, flat_config, head_tensors, prompt_of, save, tiny_target
from test_lossless import own_tokens

import specx
from specx import cli, doctor
from specx.adapters.eagle import EagleModel
from specx.adapters.names import DRAFTS, TARGETS, known_draft
from specx.adapters.weights import kind_of
from specx.api import load
from specx.config import DRAFT_ALONE

pytest_plugins = ["disk"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, disk):
    """A target of the heads' size on disk with the disk plugin's tokenizer, and heads for it."""
    root = tmp_path_factory.mktemp("eagle")
    target = tiny_target(vocab_size=400, initializer_range=0.1)
    tokenizer = specx.api.load_tokenizer(disk.target)
    tensors = head_tensors()
    tensors.pop("t2d")
    return {
        "target": disk.save("eagle_target", target, tokenizer),
        "eagle3": save(root / "eagle3", flat_config(vocab_size=400, max_position_embeddings=40960), tensors),
        "eagle1": save(root / "eagle1", flat_config(vocab_size=400), head_tensors(EAGLE1)),
        "broken": save(root / "broken", flat_config(), {n: t for n, t in tensors.items() if n != "fc.weight"}),
        "classic": disk.draft,
    }


@pytest.mark.parametrize("kind", ["eagle3", "eagle1"])
def test_load_recognises_heads_by_their_content(folders, kind):
    model = load(folders["target"], folders[kind])
    assert isinstance(model.draft, EagleModel)
    ids = prompt_of(40)
    assert model.generate(ids, max_new_tokens=12).tokens == own_tokens(model.target, ids, 12)
    assert kind_of(folders[kind]) == "eagle"
    assert kind_of(folders["classic"]) == kind_of(folders["target"]) == "classic"


def test_a_live_target(folders):
    target = tiny_target(vocab_size=400)
    out = load(target, folders["eagle3"]).generate(prompt_of(20), max_new_tokens=5)
    assert out.tokens == own_tokens(target, prompt_of(20), 5)


def test_the_heads_dtype_is_the_targets(folders):
    model = load(folders["target"], folders["eagle3"], dtype="bfloat16")
    assert model.draft.head.fc.weight.dtype == torch.bfloat16
    assert model.draft.head.rotation.inv_freq.dtype == torch.float32
    assert len(model.generate(prompt_of(300), max_new_tokens=20, draft_context=96).tokens) == 20


@pytest.mark.parametrize("kind", ["eagle3", "eagle1"])
def test_the_command_line(folders, kind):
    command = [
        "run",
        "--target",
        folders["target"],
        "--draft",
        folders[kind],
        "--prompt",
        "def f(",
        "--max-new-tokens",
        "8",
    ]
    result = CliRunner().invoke(cli.main, command)
    assert (result.exit_code, "Traceback" in result.output) == (0, False), result.output
    expected = "draft context" if kind == "eagle3" else "context 2048"
    assert (folders[kind] in result.stderr, "Error" in result.stderr) == (True, False)
    assert expected in result.stderr or "context 4096" in result.stderr


def test_a_broken_head_is_no_traceback(folders):
    command = ["run", "--target", folders["target"], "--draft", folders["broken"], "--prompt", "a"]
    result = CliRunner().invoke(cli.main, command)
    assert result.exit_code == 1
    assert "lacks fc.weight, read as an EAGLE-3 head in the official dialect" in result.stderr
    assert "Traceback" not in result.output


class TestDoctor:
    def lines(self, *pair):
        return [(line.split()[0], line, good) for line, good in doctor.report(*pair, True, {})]

    def test_explains_a_head_with_its_target(self, folders):
        found = self.lines(folders["target"], folders["eagle3"])
        heads = [line for subject, line, _ in found if subject == "head"]
        assert "EAGLE-3 in the official dialect: 1 layer of hidden size 48, 4 heads of 12 (2 key/value)" in heads[0]
        assert "a vocabulary of its own of 56 tokens; its config claims 40960 positions" in heads[1]
        assert "the outputs of the target's layers 1, 3, 4 (of 0 to 7)" in heads[2]
        text = {subject: line for subject, line, _ in found}
        assert "draft_context 4096, from the 4096 that EAGLE heads are trained for at most" in text["context"]
        assert "tau" in text["probe"]

    def test_explains_a_head_alone(self, folders):
        found = self.lines(None, folders["eagle1"])
        assert [subject for subject, _, _ in found] == ["versions", "devices", "draft", "head", "head", "target"]
        assert "EAGLE-1/2: 1 layer" in found[3][1]
        assert all(good for _, _, good in found)

    def test_says_what_is_wrong_with_one(self, folders):
        *_, (subject, line, good) = self.lines(None, folders["broken"])
        assert (subject, good) == ("draft", False)
        assert "lacks fc.weight" in line

    def test_a_classic_draft_alone_still_needs_its_target(self, folders):
        *_, (subject, line, good) = self.lines(None, folders["classic"])
        assert (subject, good) == ("load", False)
        assert "needs a target" in line


class TestNames:
    def test_every_published_head_has_its_target(self):
        heads = {name: known for name, known in DRAFTS.items() if known.kind == "eagle"}
        assert len(heads) > 15
        assert all(known.target in TARGETS and "/" in known.repo for known in heads.values())
        assert DRAFTS["eagle3-llama3.1-8b"].repo == "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B"
        assert TARGETS[DRAFTS["eagle3-llama3.1-8b"].target] == "meta-llama/Llama-3.1-8B-Instruct"
        assert known_draft("yuhuili/EAGLE3-LLaMA3.1-Instruct-8B") is DRAFTS["eagle3-llama3.1-8b"]

    def test_the_table_goes_before_the_config(self, folders, monkeypatch):
        """A published head that claims 40960 positions and was trained on 2048."""
        monkeypatch.setattr("specx.api.locate", lambda name, role: folders.get(name, name))
        monkeypatch.setitem(folders, "eagle3-llama3.1-8b", folders["eagle3"])
        model = load(folders["target"], "eagle3-llama3.1-8b")
        assert (model.draft.draft_context, model.draft.context_source) == (2048, "the table of known names")
        asked = load(folders["target"], "eagle3-llama3.1-8b", draft_context=512).draft
        assert (asked.draft_context, asked.context_source) == (512, "asked for")


class TestPrunedVocabularies:
    def test_only_these_tokens_are_drafted(self, folders, tmp_path):
        kept = sorted(range(3, 400, 7))
        (tmp_path / "ids.json").write_text(json.dumps(kept[::-1]))
        torch.save(torch.tensor(kept), tmp_path / "ids.pt")
        for file in ("ids.json", "ids.pt"):
            model = load(folders["target"], folders["eagle1"], draft_vocab=str(tmp_path / file))
            out = model.generate(prompt_of(40), max_new_tokens=20, trace=True, **DRAFT_ALONE)
            assert out.tokens == own_tokens(model.target, prompt_of(40), 20)
            assert {token for step in out.trace for token in step["tokens"][1:]} <= set(kept)
            assert "drafts 57 of the target's 400 tokens" in model.draft.about[-1]

    def test_scores_are_those_of_the_kept_rows(self, folders, tmp_path):
        (tmp_path / "ids.json").write_text(json.dumps(list(range(0, 400, 2))))
        whole = load(folders["target"], folders["eagle1"]).draft.head
        pruned = load(folders["target"], folders["eagle1"], draft_vocab=str(tmp_path / "ids.json")).draft.head
        read = torch.randn(3, 48)
        torch.testing.assert_close(pruned.logits(read), whole.logits(read)[:, ::2])

    def test_of_a_text_the_most_frequent(self, folders, tmp_path):
        (tmp_path / "text.txt").write_text("aaa bbb " * 50 + "c d e f g h")
        model = load(folders["target"], folders["eagle1"], draft_vocab=str(tmp_path / "text.txt"), draft_vocab_size=3)
        counts = Counter(model.tokenizer((tmp_path / "text.txt").read_text())["input_ids"])
        assert set(model.draft.vocabulary.tolist()) == {token for token, _ in counts.most_common(3)}

    @pytest.mark.parametrize(
        ("draft", "file", "content", "message"),
        [
            ("eagle1", "no.json", None, "does not exist"),
            ("eagle1", "a.json", '{"a": "b"}', "no list of token ids"),
            ("eagle1", "a.json", "[1, 1]", "names a token twice"),
            ("eagle1", "a.json", "[]", "names no tokens"),
            ("eagle1", "a.json", "[400, 500]", "no token that the target knows; its ids are below 400"),
            ("eagle3", "a.json", "[1, 2]", "has an LM head of its own"),
            ("classic", "a.json", "[1, 2]", "has an LM head of its own"),
        ],
    )
    def test_refusals(self, folders, tmp_path, draft, file, content, message):
        if content is not None:
            (tmp_path / file).write_text(content)
        with pytest.raises(ValueError, match=message):
            load(folders["target"], folders[draft], draft_vocab=str(tmp_path / file))
