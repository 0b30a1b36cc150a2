"""Data sets by name, on files made in exactly the layouts of the published ones."""

import csv
import json
import sys
import zipfile

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from specx.data import files, needle, sets, source
from specx.data.framed import cut, frame
from specx.data.sets import DATA_SETS, read_set
from specx.data.source import NAMES, check_source, defaults_of, read_data
from specx.eval.chosen import choose_prompts, whole_prompts

LONGBENCH = ("govreport", "qmsum", "multi_news", "lcc", "repobench-p")


class Letters:
    """A tokenizer whose ids are characters, with a token before every text and perhaps a chat template."""

    eos_token_id = 2

    def __init__(self, chat_template=None):
        self.chat_template = chat_template

    def __call__(self, text, add_special_tokens=True, verbose=False):
        return {"input_ids": [1] * add_special_tokens + [ord(letter) for letter in text]}

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        (message,) = messages
        return self.chat_template.replace("TEXT", message["content"])


def letters(ids):
    return "".join(chr(each) if each > 2 else "^" for each in ids.tolist())


def longbench_row(number, **changes):
    """A row as LongBench's are, whose context is 10 * number words of code or prose."""
    return {
        "input": f"question {number}", "context": f"word{number} " * (10 * number), "answers": [f"answer {number}"],
        "length": 10 * number, "dataset": "x", "language": "en", "all_classes": None, "_id": f"{number:048x}",
    } | changes  # fmt: skip


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Stand-ins of the files on the hub, in the hub cache's folders; returns where a repository's files lie."""

    def place(repo):
        folder = tmp_path / f"datasets--{repo.replace('/', '--')}" / "snapshots" / f"{len(repo):040x}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    with zipfile.ZipFile(place("THUDM/LongBench") / "data.zip", "w") as archive:
        for task in ("gov_report", "qmsum", "multi_news", "lcc", "repobench-p", "gov_report_e"):
            lines = [json.dumps(longbench_row(number)) for number in range(1, 5)]
            archive.writestr(f"data/{task}.jsonl", "\n".join(lines) + "\n")
    with (place("kmfoda/booksum") / "test.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["bid", "is_aggregate", "source", "chapter", "summary_text", "chapter_length"])
        writer.writerow([1342, "False", "sparknotes", 'Two\nlines, "quoted" ' + "x" * 200_000, "A summary.", 3.0])

    def download(repo, file, repo_type, etag_timeout):
        assert repo_type == "dataset"
        path = place(repo) / file
        if not path.exists():
            raise LocalEntryNotFoundError("cannot find it")
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return place


def parquet(folder, file, columns):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: parquet files are not tested")
    from pyarrow import parquet as format_

    (folder / file).parent.mkdir(exist_ok=True)
    format_.write_table(pyarrow.table(columns), folder / file)


class TestLayouts:
    @pytest.mark.parametrize("name", LONGBENCH)
    def test_longbench_is_read_out_of_its_zip(self, published, name):
        samples, about = read_set(name)
        assert [each.name for each in samples] == [f"{name}:{number}" for number in range(1, 5)]
        assert samples[1].document == "word2 " * 20
        assert f"revision {len('THUDM/LongBench'):040x}" in about
        assert samples[1].answers == (() if name in ("lcc", "repobench-p") else ("answer 2",))
        asked = samples[1].after
        assert ("question 2" in asked) == (name in ("qmsum", "repobench-p"))
        assert "{" not in asked

    def test_booksum_is_a_csv_with_long_fields(self, published):
        ((sample,), about) = read_set("booksum")
        assert sample.document.startswith('Two\nlines, "quoted" xxx')
        assert sample.answers == ("A summary.",)
        assert "kmfoda/booksum test.csv, revision" in about

    def test_pg19_is_parquet(self, published):
        columns = {"short_book_title": ["A"], "publication_date": [1881], "url": ["u"], "text": ["Once. " * 30]}
        parquet(published("emozilla/pg19-test"), DATA_SETS["pg19"].file, columns)
        ((sample,), _) = read_set("pg19")
        assert (sample.before, sample.document, sample.after) == ("", "Once. " * 30, "")

    def test_aime_is_parquet(self, published):
        columns = {"id": [60], "problem": ["Find $x$."], "solution": ["s"], "answer": ["204"], "year": ["2024"]}
        parquet(published("HuggingFaceH4/aime_2024"), DATA_SETS["aime24"].file, columns)
        ((sample,), _) = read_set("aime24")
        assert sample.answers == ("204",)
        assert sample.after.endswith("\\boxed{}.")
        data = read_data("aime24", Letters(), "256", 1)
        assert not data.continues
        (prompt,) = choose_prompts("aime24", data.documents, [256], 1, 8, print)
        assert letters(prompt.ids).startswith("^Find $x$.\n")
        assert prompt.score == "boxed"

    def test_parquet_without_its_library(self, published, monkeypatch):
        file = published("emozilla/pg19-test") / DATA_SETS["pg19"].file
        file.parent.mkdir()
        file.write_bytes(b"PAR1")
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(RuntimeError, match=r"reading parquet needs pyarrow: pip install 'specx\[data\]'"):
            read_set("pg19")

    def test_a_file_that_is_no_parquet(self, published):
        pytest.importorskip("pyarrow", reason="pyarrow is not installed: parquet files are not tested")
        file = published("emozilla/pg19-test") / DATA_SETS["pg19"].file
        file.parent.mkdir()
        file.write_bytes(b"<html>")
        with pytest.raises(ValueError, match="is no parquet file that can be read"):
            read_set("pg19")


class TestBroken:
    def write(self, published, *lines):
        with zipfile.ZipFile(published("THUDM/LongBench") / "data.zip", "w") as archive:
            archive.writestr("data/qmsum.jsonl", "".join(line + "\n" for line in lines))

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            ([json.dumps(longbench_row(1)), '{"input": '], r"data/qmsum.jsonl line 2 is not JSON"),
            ([json.dumps(longbench_row(1)), "[]"], r"data/qmsum.jsonl line 2 is no JSON object"),
            ([json.dumps({"context": "a", "input": "b"})], r"data.zip line 1 has no field 'answers'; its fields: cont"),
            ([json.dumps(longbench_row(1, context=" "))], "field 'context' must be a text that is not blank"),
            ([], "data/qmsum.jsonl is empty: it holds no rows"),
        ],
        ids=range(5),
    )
    def test_rows(self, published, lines, message):
        self.write(published, *lines)
        with pytest.raises(ValueError, match=message):
            read_set("qmsum")

    def test_zips(self, published):
        self.write(published)
        with pytest.raises(ValueError, match=r"data.zip holds no data/lcc.jsonl"):
            read_set("lcc")
        (published("THUDM/LongBench") / "data.zip").write_text("<html>")
        with pytest.raises(ValueError, match=r"data.zip is no zip file"):
            read_set("lcc")

    def test_a_hub_that_does_not_answer(self, monkeypatch):
        monkeypatch.setattr(
            "huggingface_hub.hf_hub_download", lambda *args, **options: (_ for _ in ()).throw(OSError("no route"))
        )
        with pytest.raises(
            RuntimeError, match=r"data govreport is data.zip of the dataset THUDM/LongBench .* no route"
        ):
            files.download("govreport", "THUDM/LongBench", "data.zip")

    def test_an_unknown_name(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match=r"data must be stdlib, .* got 'govrepot'.*did you mean 'govreport'"):
            check_source("govrepot")
        for name in NAMES:
            check_source(name)
        (tmp_path / "govreport").mkdir()  # what the user has goes before a name of ours
        with pytest.raises(ValueError, match=r"a folder without .jsonl files"):
            check_source("govreport")


class TestPrompts:
    @pytest.mark.parametrize("name", LONGBENCH)
    def test_are_exactly_as_long_as_asked_and_keep_the_instruction(self, published, name):
        lengths = [150, 240] if DATA_SETS[name].before else [80, 120]
        data = read_data(name, Letters(), ",".join(map(str, lengths)), 2)
        found = choose_prompts(name, data.documents, lengths, 2, 8, print)
        assert [len(prompt.ids) for prompt in found] == [lengths[0]] * 2 + [lengths[1]] * 2
        known = DATA_SETS[name]
        for prompt in found:
            text, number = letters(prompt.ids), prompt.name.split(":")[1]
            after = known.after.replace("{question}", f"question {number}")
            assert text.startswith("^" + known.before)
            assert text.endswith(after)
            inside = text[1 + len(known.before) : len(text) - len(after)]
            whole = f"word{number} " * (10 * int(number))
            assert whole.endswith(inside) if known.keep == "end" else whole.startswith(inside)

    def test_lengths_are_compared_on_the_same_documents(self, published):
        data = read_data("multi_news", Letters(), "150,350", 2)
        found = choose_prompts("multi_news", data.documents, [150, 350], 1, 8, print)
        assert len({prompt.name for prompt in found}) == 1

    def test_fewer_than_asked_for_is_said(self, published):
        said = []
        data = read_data("multi_news", Letters(), "150", 9)
        assert len(choose_prompts("multi_news", data.documents, [150], 9, 8, said.append)) == 4
        assert said == ["note: the data has 4 of the 9 prompts of 150 that were asked for"]

    @pytest.mark.parametrize("length", [5000, 10])
    def test_none_is_long_enough_or_short_enough(self, published, length):
        data = read_data("multi_news", Letters(), str(length), 1)
        with pytest.raises(
            ValueError, match=r"multi_news: of 4 documents of 60 to [0-9]+ tokens, instruction apart, none"
        ):
            choose_prompts("multi_news", data.documents, [length], 1, 8, print)

    def test_the_chat_template_surrounds_requests_only(self, published):
        template = Letters("[INST]TEXT[/INST]")
        for name, chat, begins, ends in [
            ("qmsum", None, "[INST]Below", "Answer:[/INST]"),
            ("qmsum", False, "^Below", "Answer:"),
            ("lcc", None, "^", " "),
            ("lcc", True, "[INST]", "[/INST]"),
        ]:
            data = read_data(name, template, "200", 1, chat)
            (prompt,) = choose_prompts(name, data.documents[3:], [200], 1, 8, print)
            assert len(prompt.ids) == 200
            assert letters(prompt.ids).startswith(begins)
            assert letters(prompt.ids).endswith(ends)

    def test_a_template_that_fails_or_alters_the_text(self):
        with pytest.raises(ValueError, match="does not render the text as it is; use --no-chat"):
            frame(Letters("[INST]"), "a", "b", "whole", chat=True)
        with pytest.raises(ValueError, match="--chat needs a tokenizer with a chat template"):
            read_data("stdlib", Letters(), "1K", 1, chat=True)

    def test_local_rows_keep_their_answers_and_their_ends(self, tmp_path):
        rows = [{"text": "do this: " + "x" * 100 + " Summary:", "answer": "short"}, {"text": "y" * 80}]
        (tmp_path / "a_64.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = read_data(str(tmp_path), Letters(), "64", 2)
        found = choose_prompts("here", data.documents, [64], 2, 8, print)
        assert [prompt.answers for prompt in found] == [("short",), ()]
        assert letters(found[0].ids).startswith("^do this: xx")
        assert letters(found[0].ids).endswith("x Summary:")
        data = read_data(str(tmp_path), Letters("<TEXT>"), "64", 2)
        text = letters(choose_prompts("here", data.documents, [64], 1, 8, print)[0].ids)
        assert (len(text), text[:10], text[-10:]) == (64, "<do this: ", " Summary:>")
        (tmp_path / "a_64.jsonl").rename(tmp_path / "a.jsonl")
        with pytest.raises(ValueError, match=r"--chat needs data whose rows are prompts: a.jsonl:1"):
            read_data(str(tmp_path), Letters("<TEXT>"), "64", 2, chat=True)

    def test_whole_documents_stand_for_their_median(self, tmp_path):
        rows = [{"text": letter * count} for letter, count in (("a", 50), ("b", 20), ("c", 99), ("d", 7))]
        (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        documents, said = read_data(str(tmp_path), Letters(), "60", 3).documents, []
        found = whole_prompts("here", documents, 3, 60, said.append)
        assert [(letters(each.ids)[:2], len(each.ids), each.context) for each in found] == [
            ("^a", 51, 51),
            ("^b", 21, 51),
            ("^c", 60, 51),
        ]
        (line,) = said
        assert line.startswith("note: 3 whole documents of 21 to 60 tokens, shown as their median; 1 of them")
        with pytest.raises(ValueError, match="--lengths whole is for documents; needle is generated"):
            whole_prompts("needle", read_data("needle", Letters(), "600", 1).documents, 1, 60, print)

    def test_whole_documents_keep_what_stands_around_them(self, published):
        data = read_data("multi_news", Letters(), "9000", 2)
        sizes = [len(each.frame.before) + len(each.ids) + len(each.frame.after) for each in data.documents]
        found = whole_prompts("multi_news", data.documents, 9, 9000, print)
        assert [len(each.ids) for each in found] == sizes
        assert all(letters(each.ids).startswith("^Below") for each in found)

    @pytest.mark.parametrize("length", [1, 2, 10, 16, 17, 40, 99, 100, 101])
    def test_cut(self, length):
        ids = torch.arange(100)
        ends = cut(ids, length, "ends").tolist()
        end = min(16, length // 2)
        assert len(ends) == min(length, 100)
        assert ends[len(ends) - end :] == list(range(100 - end, 100))
        assert ends[: len(ends) - end] == list(range(len(ends) - end))
        assert cut(ids, length, "beginning").tolist() == list(range(min(length, 100)))
        assert cut(ids, length, "end").tolist() == list(range(100 - min(length, 100), 100))


class TestNeedle:
    def made(self, lengths="600,1200", samples=3, **options):
        data = read_data("needle", Letters(), lengths, samples, **options)
        contexts = [int(each) for each in lengths.split(",")]
        return choose_prompts("needle", data.documents, contexts, samples, 8, pytest.fail)

    def test_the_answer_stands_in_one_line_at_every_depth(self):
        found = self.made()
        assert [prompt.context for prompt in found] == [600] * 3 + [1200] * 3
        for number, prompt in enumerate(found):
            text, (answer,) = letters(prompt.ids), prompt.answers
            assert prompt.context - 60 < len(text) <= prompt.context
            key = text.rsplit(" ", 2)[1]
            lines = text.split("\n")
            assert sum(line == f"The code of locker {key} is {answer}." for line in lines) == 1
            assert text.count(answer) == 1
            place = text.index(answer) / len(text)
            assert abs(place - (0.25, 0.5, 0.7)[number % 3]) < 0.15
        assert {prompt.score for prompt in found} == {"contains"}

    def test_the_seed_decides(self):
        same, other = self.made(), self.made(seed=1)
        assert [letters(each.ids) for each in self.made()] == [letters(each.ids) for each in same]
        assert not {each.answers for each in same} & {each.answers for each in other}

    def test_no_room(self):
        with pytest.raises(ValueError, match="have no room for two lines and a question; give longer --lengths"):
            self.made("200")

    def test_long_ones_end(self):
        made = needle.haystack(len, 200_000, 0.5, "0")
        assert len(set(made.lines)) == len(made.lines) > 4000


def test_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text("")
    assert defaults_of("stdlib") == defaults_of("x.jsonl") == ("512,2K,8K,16K", 128)
    for name in ("a_1K", "a_512", "b_512"):
        (tmp_path / "labelled").mkdir(exist_ok=True)
        (tmp_path / "labelled" / f"{name}.jsonl").write_text("")
    assert defaults_of("labelled") == ("512,1K", 128)
    assert defaults_of("aime24")[1] > 1000
    assert set(source.NAMES) == {"stdlib", "needle", *sets.DATA_SETS}
