"""Prompts from files, standard input, chat templates and the standard library."""

import io
import json
import sys
import sysconfig
from pathlib import Path

import pytest

from specx.data import prompts, stdlib
from specx.data.prompts import chat_ids, check_text, demo_prompt, read_prompts

pytest_plugins = ["disk"]


@pytest.fixture
def reads(tmp_path, monkeypatch):
    """reads(data, name) reads a file of these bytes, or standard input for name "-"."""

    def read(data, name="prompts.txt", limit=None):
        data = data if isinstance(data, bytes) else data.encode()
        if name == "-":
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
            return read_prompts("-", limit)
        file = tmp_path / name
        file.write_bytes(data)
        return read_prompts(str(file), limit)

    return read


@pytest.mark.parametrize("name", ["prompts.txt", "-"])
class TestText:
    def test_is_one_prompt(self, reads, name):
        assert reads("one\ntwo\n", name) == ["one\ntwo\n"]

    def test_of_other_systems(self, reads, name):
        assert reads(b"\xef\xbb\xbfone\r\ntwo", name) == ["one\ntwo"]  # byte order mark, line ends

    @pytest.mark.parametrize("text", ['{"a": 1}\n{"a": 2}', "{not json}", '{"text"', "[1, 2]", '"text"', "{"])
    def test_that_looks_like_json(self, reads, name, text):
        assert reads(text, name) == [text]

    def test_with_json_lines_in_it(self, reads, name):
        assert reads('{"text": "a"}\n{"text": "b", "more": 1}\n', name) == ["a", "b"]

    def test_limit(self, reads, name):
        assert reads('{"text": "a"}\n\n{"text": "b"}\nbroken', name, limit=2) == ["a", "b"]

    @pytest.mark.parametrize("data", [b"\x80abc", b"a\0b", "ü".encode("utf-16"), b"\x7fELF\x02\x01\0"])
    def test_binary(self, reads, name, data):
        with pytest.raises(ValueError, match=r"is not UTF-8 text \(.*\); give a text or a JSONL file"):
            reads(data, name)

    @pytest.mark.parametrize("data", [b"", b" \n\t\n", b"\xef\xbb\xbf"])
    def test_empty(self, reads, name, data):
        with pytest.raises(ValueError, match="is empty"):
            reads(data, name)


class TestJsonLines:
    def test_characters_that_other_line_splitters_split_at(self, reads):
        text = "a\u2028b\u0085c\u000bd"
        assert reads(json.dumps({"text": text}, ensure_ascii=False) + "\r\n", "p.jsonl") == [text]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("not json", "line 3 is not JSON: Expecting value"),
            ('{"text": "cut', "line 3 is not JSON: Unterminated string"),
            ("[" * 100_000, "line 3 is not JSON"),
            ('{"prompt": "a"}', 'line 3 has no "text" key'),
            ('{"text": 1}', 'line 3 has no "text" key with a string'),
            ('["text"]', 'line 3 has no "text" key'),
            ("null", 'line 3 has no "text" key'),
            ('{"text": " "}', "line 3 is empty"),
            ('{"text": "\\ud800"}', "line 3 is not valid Unicode"),
        ],
    )
    def test_bad_lines_have_their_number(self, reads, line, message):
        with pytest.raises(ValueError, match=message):
            reads('{"text": "a"}\n\n' + line, "p.jsonl")

    def test_the_name_decides(self, reads):
        with pytest.raises(ValueError, match=r"p.jsonl line 1 is not JSON"):
            reads("text", "p.jsonl")


def test_files_that_cannot_be_read(tmp_path):
    for name, reason in ((str(tmp_path / "no.txt"), "No such file"), (str(tmp_path), "Is a directory")):
        with pytest.raises(ValueError, match=reason):
            read_prompts(name)
    with pytest.raises(ValueError, match="name of the input file is empty"):
        read_prompts("")


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("a")
    assert read_prompts("~/a.txt") == ["a"]


def test_check_text_returns_the_text():
    assert check_text(" a ", "it") == " a "


class Words:
    """A tokenizer of words."""

    chat_template = None

    def __call__(self, text, **options):
        return {"input_ids": text.split()}


class TestDemo:
    def test_is_the_beginning_of_a_held_out_module(self):
        name, ids = demo_prompt(Words(), 50)
        assert stdlib.is_held_out(name)
        assert ids == (Path(sysconfig.get_paths()["stdlib"]) / name).read_text().split()[:50]
        assert len(demo_prompt(Words())[1]) >= 6000

    def test_without_that_module_another_one(self, monkeypatch, tmp_path):
        monkeypatch.setattr(prompts, "_DEMO_MODULE", "nowhere.py")
        for name, size in (("short.py", 10), ("long.py", 20)):
            (tmp_path / name).write_text("word " * size)
        found = [(name, tmp_path / name) for name in ("short.py", "long.py")]
        monkeypatch.setattr(stdlib, "held_out_files", lambda: found)
        assert demo_prompt(Words(), 5) == ("long.py", ["word"] * 5)
        found.clear()
        with pytest.raises(RuntimeError, match="no readable standard library"):
            demo_prompt(Words())


class TestChat:
    def test_one_turn_and_no_second_beginning(self, disk):
        tokenizer = tokenizer_of(disk.target)
        ids = chat_ids(tokenizer, "hello")
        assert tokenizer.decode(ids) == "<s>user: hello\nassistant: "
        assert ids.count(tokenizer.bos_token_id) == 1

    def test_no_template(self):
        with pytest.raises(ValueError, match="use --no-chat"):
            chat_ids(Words(), "hello")

    @pytest.mark.parametrize("template", ["{{ raise_exception('not so') }}", "{% broken", "{{ nothing.at.all }}"])
    def test_a_template_that_fails(self, disk, template):
        tokenizer = tokenizer_of(disk.target)
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=r"chat template fails: .*; use --no-chat"):
            chat_ids(tokenizer, "hello")


def tokenizer_of(directory):
    from specx.adapters.checkpoints import load_tokenizer

    return load_tokenizer(directory)


def test_held_out_prompts_are_long_enough_and_differ():
    def tokenizer(text, verbose):
        return {"input_ids": [ord(letter) for letter in text[: len(text) // 4]]}

    first, second = (prompts.held_out_prompt(tokenizer, 2000, number) for number in range(2))
    assert len(first) == len(second) == 2000
    assert first != second
    with pytest.raises(RuntimeError, match="has 0 held-out modules of 100000000 tokens or more"):
        prompts.held_out_prompt(tokenizer, 100_000_000)
