"""Documents from the standard library, files and folders, and lengths as people write them."""

import json
from pathlib import Path

import pytest
import torch

from specx.data import documents, stdlib
from specx.data.documents import length_name, parse_length, parse_lengths, read_documents, short_length

ROOT = Path(__file__).resolve().parent.parent


class Bytes:
    """A tokenizer whose ids are the text's bytes."""

    def __call__(self, text, **options):
        assert options == {"verbose": False}
        return {"input_ids": list(text.encode())}


def text_of(document):
    return bytes(document.ids.tolist()).decode()


def write_rows(file, *texts):
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


class TestFile:
    def test_each_row_is_a_document(self, tmp_path):
        write_rows(tmp_path / "some_2K.jsonl", "one", "two")
        found = read_documents(str(tmp_path / "some_2K.jsonl"), Bytes())
        assert [(each.name, text_of(each), each.label) for each in found] == [
            ("some_2K.jsonl:1", "one", 2048),
            ("some_2K.jsonl:2", "two", 2048),
        ]
        assert all(each.ids.dtype == torch.int64 and each.ids.ndim == 1 for each in found)

    def test_limit(self, tmp_path):
        write_rows(tmp_path / "a.jsonl", "one", "two", "three")
        assert [text_of(each) for each in read_documents(str(tmp_path / "a.jsonl"), Bytes(), 2)] == ["one", "two"]

    def test_plain_text_is_one_document(self, tmp_path):
        (tmp_path / "book.txt").write_text("one\ntwo\n")
        (found,) = read_documents(str(tmp_path / "book.txt"), Bytes())
        assert (found.name, text_of(found), found.label) == ("book.txt:1", "one\ntwo\n", None)

    def test_errors_are_those_of_prompts(self, tmp_path):
        (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}')
        with pytest.raises(ValueError, match=r'bad.jsonl line 1 has no "text" key'):
            read_documents(str(tmp_path / "bad.jsonl"), Bytes())

    def test_home_is_expanded(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "a.txt").write_text("a")
        assert text_of(read_documents("~/a.txt", Bytes())[0]) == "a"


class TestFolder:
    def test_order_is_by_label_then_name(self, tmp_path):
        names = ["z_512", "a_16k", "b_2K", "a_2K", "plain", "c_1.5K", "a_b"]
        for name in names:
            write_rows(tmp_path / f"{name}.jsonl", name, "second")
        (tmp_path / "notes.txt").write_text("not read")
        found = read_documents(str(tmp_path), Bytes(), limit=1)
        assert [(text_of(each), each.label) for each in found] == [
            ("z_512", 512),
            ("c_1.5K", 1536),
            ("a_2K", 2048),
            ("b_2K", 2048),
            ("a_16k", 16384),
            ("a_b", None),
            ("plain", None),
        ]
        assert len(read_documents(str(tmp_path), Bytes())) == 2 * len(names)

    @pytest.mark.parametrize("name", ["512", "pg-19", "a_0", "a_K", "a_2KB", "a_2M", "a_", "2K_a", "a_0.3K"])
    def test_names_without_a_label(self, tmp_path, name):
        write_rows(tmp_path / f"{name}.jsonl", "text")
        assert read_documents(str(tmp_path), Bytes())[0].label is None

    def test_without_jsonl(self, tmp_path):
        (tmp_path / "a.txt").write_text("a")
        with pytest.raises(ValueError, match=r"data must be stdlib, a JSONL file or .* without .jsonl files; put some"):
            read_documents(str(tmp_path), Bytes())


@pytest.mark.parametrize("source", ["", "-", "stdlob", "no/such.jsonl", "a\0b", "x" * 5000, "~nobody-of-that-name/a"])
def test_nothing_of_that_name(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="data must be stdlib, a JSONL file or a folder of them; got"):
        read_documents(source, Bytes())


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ValueError, match=r"got .*, which cannot be read: Permission denied"):
        read_documents(str(tmp_path), Bytes())


class TestStdlib:
    def test_a_module_is_followed_by_its_tests(self):
        found = read_documents("stdlib", Bytes())
        names = [each.name for each in found]
        assert names == sorted(names)
        assert names == [name for name, _ in stdlib.held_out_files()]
        assert all(each.label is None for each in found)
        paths = dict(stdlib.files(held_out=True))
        text = text_of(found[names.index("argparse.py")])
        own, tests = (paths[name].read_text(encoding="utf-8") for name in ("argparse.py", "test/test_argparse.py"))
        assert text == f"{own}\n{tests}"
        assert len(found) == len(names) >= 20

    def test_groups_hold_only_held_out_files_and_each_once(self):
        relative = {path: name for name, path in stdlib.files(held_out=True)}
        own = [(name, [relative[path] for path in paths]) for name, paths in stdlib.held_out_groups()]
        used = [name for _, names in own for name in names]
        assert len(used) == len(set(used))
        assert all(stdlib.is_held_out(name) for name in used)
        for name, names in own:
            assert names == [name, *sorted(names[1:])]
            assert {stdlib.group_of(each) for each in names} == {stdlib.group_of(name)}
        assert "test/test_argparse.py" in dict(own)["argparse.py"]

    def test_an_interpreter_without_its_source(self, monkeypatch):
        monkeypatch.setattr(stdlib, "held_out_groups", list)
        with pytest.raises(ValueError, match=r"none that can be read; give a JSONL file or a folder"):
            read_documents("stdlib", Bytes())


class TestLengths:
    @pytest.mark.parametrize(
        ("text", "tokens"),
        [("512", 512), ("2K", 2048), ("2k", 2048), ("1.5K", 1536), ("1", 1), (" 8K ", 8192), ("0.5K", 512)],
    )
    def test_parse(self, text, tokens):
        assert parse_length(text) == tokens

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "0",
            "0K",
            "-1",
            "-2K",
            "nan",
            "inf",
            "1e3",
            "1.5",
            "0.3K",
            "2M",
            "2KB",
            "K",
            "2 K",
            "9" * 400,
            "٣",
            "1_0",
        ],
    )
    def test_what_is_no_length(self, text):
        with pytest.raises(ValueError, match=r"whole number of tokens like 512, 2K or 1.5K; got '"):
            parse_length(text)

    def test_lists_are_sorted_and_unique(self):
        assert parse_lengths("8K,512, 2K,2048") == [512, 2048, 8192]

    @pytest.mark.parametrize("text", ["", "512,", "512;2K", "512,two"])
    def test_bad_lists(self, text):
        with pytest.raises(ValueError, match="a length must be"):
            parse_lengths(text)

    @pytest.mark.parametrize(("tokens", "name"), [(512, "512"), (2048, "2K"), (1536, "1536"), (1024, "1K")])
    def test_names(self, tokens, name):
        assert length_name(tokens) == name
        assert parse_length(name) == tokens

    @pytest.mark.parametrize(("tokens", "name"), [(512, "512"), (2048, "2K"), (15872, "15.5K"), (15870, "15870")])
    def test_short_names(self, tokens, name):
        assert short_length(tokens) == name
        assert parse_length(name) == tokens


@pytest.mark.parametrize("name", ["govreport", "pg-19"])
def test_data_that_other_projects_publish(name):
    folder = ROOT.parent / "shared" / "data" / name
    if not folder.is_dir():
        pytest.skip(f"no {name} data beside the repository")
    found = read_documents(str(folder), Bytes(), limit=2)
    assert [each.label for each in found] == [label for label in (512, 1024, 2048, 4096, 8192, 16384) for _ in (1, 2)]


def test_the_bundled_tokenizer():
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "data" / "models" / "demo-target")
    (found,) = read_documents(documents.__file__, tokenizer)
    assert tokenizer.decode(found.ids, skip_special_tokens=True) == Path(documents.__file__).read_text()
