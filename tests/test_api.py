"""What `import specx` offers: prompts, options and models as people give them."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import specx
from specx.hf_config import positions_of

pytest_plugins = ["disk"]
TEXT = "def stream(steps, coloured):"


@pytest.fixture(scope="module")
def model(disk):
    return specx.load(disk.target, disk.draft)


class TestPrompts:
    def test_text_and_ids_are_the_same(self, model):
        ids = model.tokenizer(TEXT)["input_ids"]
        expected = model.generate(TEXT, max_new_tokens=8).tokens
        forms = (ids, tuple(ids), torch.tensor(ids), torch.tensor([ids]), [ids], np.array(ids), torch.tensor(ids).int())
        for prompt in forms:
            assert model.generate(prompt, max_new_tokens=8).tokens == expected

    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            ("", "the prompt is empty"),
            ([], "the prompt is empty"),
            (torch.empty(1, 0, dtype=torch.long), "the prompt is empty"),
            ("a \udcff", "not valid Unicode"),
            ([[1, 2], [3, 4]], r"one prompt at a time: token ids must have shape \[L\] or \[1, L\]; got \[2, 2\]"),
            (torch.ones(1, 2, 3, dtype=torch.long), r"got \[1, 2, 3\]"),
            ([[1, 2], [3]], "the batch must be 1, got 2 rows"),
            (["a", "b"], "the batch must be 1, got 2 rows"),
            (5, r"got \[\]"),
            (None, "a prompt is text or token ids; got NoneType"),
            ({"input_ids": [1]}, "got dict"),
            (b"text", "a prompt is text or token ids|integer token ids"),
            ([1.5, 2.0], "integer token ids; got torch.float32"),
            ([True], "integer token ids; got torch.bool"),
            ([1, -1], "between 0 and 399; the prompt holds -1"),
            ([1, 400], "between 0 and 399; the prompt holds 400"),
        ],
        ids=repr,
    )
    def test_that_cannot_be_served(self, model, prompt, message):
        with pytest.raises(ValueError, match=message):
            model.generate(prompt)

    def test_too_long(self, model):
        with pytest.raises(
            ValueError, match=r"prompt of 4000 tokens plus max_new_tokens 97 exceeds the target's 4096 "
        ):
            model.generate([1] * 4000, max_new_tokens=97)
        with pytest.raises(ValueError, match="at most 96 new tokens fit"):
            model.start([1] * 4000, max_new_tokens=97)
        with pytest.raises(ValueError, match="shorten the prompt"):
            model.start([1] * 4096, max_new_tokens=1)
        model.start([1] * 4000, max_new_tokens=96)

    def test_text_without_a_tokenizer(self, disk):
        bare = specx.load(disk.no_tokenizer)
        assert bare.generate([1, 2, 3], max_new_tokens=4).text == ""
        for call in (bare.generate, bare.stream, lambda prompt: bare.generate([1], stop="a")):
            with pytest.raises(ValueError, match="tokenizer"):
                call(TEXT)


class TestOptions:
    def test_may_be_overridden_per_call(self, disk):
        model = specx.load(disk.target, disk.draft, max_new_tokens=5, nodes=4)
        assert len(model.generate(TEXT).tokens) == 5
        assert len(model.generate(TEXT, max_new_tokens=7).tokens) == 7
        assert len(model.generate(TEXT).tokens) == 5

    def test_unknown_and_out_of_range(self, model, disk):
        with pytest.raises(ValueError, match="unknown option 'max_new_token'; did you mean 'max_new_tokens'"):
            model.generate(TEXT, max_new_token=5)
        with pytest.raises(ValueError, match="unknown option 'devise'"):
            specx.load(disk.target, disk.draft, devise="cpu")
        with pytest.raises(ValueError, match="temperature must be at least"):
            model.stream(TEXT, temperature=-1)

    def test_dtype_and_device_objects(self, disk):
        model = specx.load(disk.target, dtype=torch.bfloat16, device=torch.device("cpu"))
        assert model.target.dtype == torch.bfloat16


class TestModels:
    def test_paths_names_and_live_objects(self, disk, model):
        tokenizer = AutoTokenizer.from_pretrained(disk.target)
        expected = model.generate(TEXT, max_new_tokens=8).tokens
        live = specx.load(model.target, model.draft.model.model, tokenizer=tokenizer)
        mixed = specx.load(Path(disk.target), Path(disk.draft))
        for other in (
            live,
            mixed,
            specx.load(disk.target),
            specx.load(model.target, model.target, tokenizer=tokenizer),
        ):
            assert other.generate(TEXT, max_new_tokens=8).tokens == expected
        assert live.target is model.target

    def test_that_are_none(self, disk):
        with pytest.raises(ValueError, match="target must be a name, a directory or a transformers model; got int"):
            specx.load(5)
        with pytest.raises(ValueError, match="draft must be a name, a directory or a transformers model; got Linear"):
            specx.load(disk.target, torch.nn.Linear(1, 1))

    def test_a_draft_needs_a_target(self, model):
        with pytest.raises(ValueError, match="needs a target"):
            specx.load(None, model.target)

    def test_in_training_mode(self, disk):
        model = specx.load(disk.target)
        model.target.train()
        with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
            specx.load(model.target)


class TestStream:
    def test_gives_the_text_in_pieces(self, model):
        out = model.generate(TEXT, max_new_tokens=30)
        pieces = list(model.stream(TEXT, max_new_tokens=30))
        assert "".join(pieces) == out.text
        assert len(pieces) > 5
        assert all(pieces)

    def test_abandoned(self, model):
        out, steps = model.start(TEXT, max_new_tokens=30)
        shown = "".join(each.text for each in next(steps) + next(steps))
        steps.close()
        assert out.finish_reason == "interrupted"
        assert out.text == shown
        assert 0 < len(out.tokens) < 30
        assert model.generate(TEXT, max_new_tokens=30).tokens[: len(out.tokens)] == out.tokens

    def test_the_trace_has_a_record_a_step(self, model):
        out = model.generate(TEXT, max_new_tokens=20, trace=True)
        assert len(out.trace) == out.stats["steps"]
        keys = {"tokens", "parents", "scores", "path", "sources", "kept_chunks"}
        assert all(record.keys() == keys for record in out.trace)
        assert all(len(record["sources"]) == len(record["path"]) for record in out.trace)
        for record in out.trace:
            assert record["parents"][0] == -1
            assert len(record["tokens"]) == len(record["parents"]) == len(record["scores"])
        accepted = [record["tokens"][node] for record in out.trace for node in record["path"]]
        assert accepted == [*out.tokens[: len(accepted)]]
        assert model.generate(TEXT, max_new_tokens=20).trace is None


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 2048}, 2048),
        ({}, None),
        ({"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "linear", "factor": 4.0}}, 16384),
        ({"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, 4096),
        ({"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "default"}}, 4096),
        ({"max_position_embeddings": 131072, "rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, 131072),
        ({"max_position_embeddings": 2048, "max_sequence_length": 16384}, 16384),
        (
            {
                "max_position_embeddings": 32768,
                "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            },
            131072,
        ),
        ({"max_position_embeddings": 8192, "rope_parameters": {"full_attention": {"rope_type": "linear"}}}, 8192),
    ],
)
def test_positions(config, expected):
    assert positions_of(SimpleNamespace(**config)) == expected
