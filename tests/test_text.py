"""Text piece by piece: characters split over tokens, stop texts across token borders, and through generate."""

import random

import pytest
from conftest import noised, tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from specx.adapters.classic import ClassicModel
from specx.api import SpeculativeModel
from specx.hf import HFModel
from specx.text import TextStream

END = "<end>"
MERGES = [("Ġ", "â"), ("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("d", "Ã")]


def wrapped(tokenizer):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, clean_up_tokenization_spaces=False)


@pytest.fixture(scope="module")
def bytewise():
    """A byte-level BPE whose merges also glue whole characters to the first byte of others."""
    tokens = [END, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in MERGES)]
    bpe = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=MERGES)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return wrapped(tokenizer)


@pytest.fixture(scope="module")
def wordwise():
    """A tokenizer of words that carry their leading space, as Llama's: decoding alone loses a word's space."""
    words = [END, "▁Hello", "▁world", "▁you", ",", "ly"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=END))
    tokenizer.decoder = decoders.Metaspace()
    return wrapped(tokenizer)


def encoded(tokenizer, text):
    return tokenizer(text, verbose=False)["input_ids"]


def feed(stream, tokens):
    """The pieces of all tokens up to a stop, and what flush adds."""
    pieces = []
    for token in tokens:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return pieces, stream.flush()


@pytest.mark.parametrize("text", ["hello world", "é", "a€b", "😀😀", "naïve — “quoted” 你好", "\n\t ", "e\u0301"])
def test_pieces_add_up_to_the_text(bytewise, text):
    stream = TextStream(bytewise)
    pieces, rest = feed(stream, encoded(bytewise, text))
    assert "".join(pieces) == text
    assert rest == ""
    assert stream.text == text
    assert not stream.stopped


def test_a_character_comes_with_its_last_byte(bytewise):
    pieces, _ = feed(TextStream(bytewise), encoded(bytewise, "a😀b€"))
    assert pieces == ["a", "", "", "", "😀", "b", "", "", "€"]


def test_a_token_that_ends_inside_a_character_waits_for_the_rest(bytewise):
    tokens = encoded(bytewise, " —")
    assert bytewise.convert_ids_to_tokens(tokens) == ["Ġâ", "Ģ", "Ķ"]
    assert feed(TextStream(bytewise), tokens) == (["", "", " —"], "")


def test_invalid_bytes_become_replacement_characters(bytewise):
    whole = encoded(bytewise, "é")
    pieces, rest = feed(TextStream(bytewise), [whole[0], *encoded(bytewise, "x")])
    assert ("".join(pieces), rest) == ("\ufffdx", "")


def test_flush_returns_what_was_held_back_once(bytewise):
    stream = TextStream(bytewise)
    tokens = encoded(bytewise, "a😀")
    pieces, rest = feed(stream, tokens[:3])
    assert (pieces, rest) == (["a", "", ""], "\ufffd")
    assert stream.flush() == ""
    assert stream.text == "a\ufffd"


@pytest.mark.parametrize("seed", range(20))
def test_any_bytes_stream_to_the_text_of_all_tokens(bytewise, seed):
    rng = random.Random(seed)
    tokens = [rng.randrange(len(bytewise)) for _ in range(60)]
    stream = TextStream(bytewise)
    pieces, rest = feed(stream, tokens)
    expected = bytewise.decode(tokens, skip_special_tokens=True)
    assert "".join(pieces) + rest == stream.text == expected


def test_words_keep_their_spaces(wordwise):
    pieces, rest = feed(TextStream(wordwise), [1, 4, 2, 3, 5])
    assert pieces == ["Hello", ",", " world", " you", "ly"]
    assert rest == ""


def test_words_keep_their_spaces_behind_a_special_token(wordwise):
    tokens = [1, 0, 2, 0, 0, 3]
    pieces, _ = feed(TextStream(wordwise), tokens)
    assert "".join(pieces) == wordwise.decode(tokens, skip_special_tokens=True) == "Hello world you"


@pytest.mark.parametrize(
    ("text", "stop", "expected", "read"),
    [
        ("one two", ["two"], "one two", "one two"),
        ("one two three", ["two"], "one two", "one two"),
        ("hello world", ["o"], "hello", "hello"),
        ("hello world", ["el"], "hel", "hello"),  # in the middle of one token
        ("hello world", ["lo", "el"], "hel", "hello"),  # two in one token
        ("hello world", ["lo w"], "hello w", "hello w"),  # across three tokens
        ("hello world", ["world", "lo"], "hello", "hello"),  # the earliest end counts, not the order given
        ("hello world", ["hello w", "ello"], "hello", "hello"),
        ("hello world", ["rld", "orld"], "hello world", "hello world"),
        ("aab", ["ab"], "aab", "aab"),  # overlaps its own beginning
        ("a€b", ["€"], "a€", "a€"),
        ("xdé", ["xd"], "xd", None),  # the token that completes it ends inside a character
        ("hello", ["nothing"], "hello", "hello"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_stop_texts(bytewise, text, stop, expected, read):
    stream = TextStream(bytewise, stop)
    tokens = encoded(bytewise, text)
    pieces, rest = feed(stream, tokens)
    assert "".join(pieces) + rest == stream.text == expected
    assert stream.stopped == any(each in expected for each in stop)
    if stream.stopped:
        needed = next(n for n in range(99) if any(s in bytewise.decode(tokens[:n]) for s in stop))
        assert len(pieces) == needed
    if read is not None:
        assert bytewise.decode(tokens[: len(pieces)]) == read


def test_nothing_comes_after_the_stop(bytewise):
    stream = TextStream(bytewise, ["lo"])
    for token in encoded(bytewise, "hello"):
        stream.push(token)
    assert stream.stopped
    assert [stream.push(token) for token in encoded(bytewise, " world")] == [""] * 5
    assert stream.flush() == ""
    assert stream.text == "hello"


@pytest.mark.parametrize("seed", range(20))
def test_stop_is_found_where_a_search_finds_it(bytewise, seed):
    rng = random.Random(seed)
    text = "".join(rng.choice("abé ") for _ in range(80))
    stops = ["".join(rng.choice("abé ") for _ in range(rng.randint(1, 4))) for _ in range(3)]
    stream = TextStream(bytewise, stops)
    pieces, _ = feed(stream, encoded(bytewise, text))
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    assert stream.text == (text[: min(ends)] if ends else text)
    assert "".join(pieces) == stream.text


@pytest.fixture(scope="module")
def model(bytewise):
    """A model that writes letters and spaces only: all other tokens are suppressed, which generate obeys as well."""
    target = tiny_llama(vocab_size=len(bytewise), hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    letters = set(encoded(bytewise, "abcdefghijklmnopqrstuvwxyz")) | set(encoded(bytewise, " "))
    target.generation_config.suppress_tokens = sorted(set(range(len(bytewise))) - letters)
    target.generation_config.repetition_penalty = 2.0  # or it says the same few letters over and over
    engine = HFModel(target)
    draft = ClassicModel("tiny", HFModel(noised(target, 0.02)), engine.vocab_size, 128, "the test")
    return SpeculativeModel(engine, draft, bytewise)


PROMPT = "hello you"
PLAIN = pytest.mark.parametrize("plain", [False, True], ids=["drafted", "plain"])


@pytest.fixture(scope="module")
def whole(model):
    """What is said if nothing stops it; the same with and without the draft."""
    return model.generate(PROMPT, max_new_tokens=40)


@PLAIN
def test_generate_gives_the_text_of_its_tokens(model, plain):
    out = model.generate(PROMPT, max_new_tokens=40, plain=plain)
    assert out.text == model.tokenizer.decode(out.tokens)
    assert (out.finish_reason, len(out.tokens)) == ("length", 40)
    assert out.stats["new_tokens"] == 40


@PLAIN
@pytest.mark.parametrize("at", [0, 1, 2, 3, 7, 20, 33])
def test_generate_ends_with_the_token_that_completes_the_stop(model, whole, at, plain):
    stop = whole.text[at : at + 3]
    end = whole.text.find(stop) + 3
    out = model.generate(PROMPT, max_new_tokens=40, stop=[stop, "never said"], plain=plain)
    assert out.text == whole.text[:end]
    assert out.finish_reason == "stop"
    assert out.tokens == whole.tokens[: len(out.tokens)]
    assert stop in model.tokenizer.decode(out.tokens)
    assert stop not in model.tokenizer.decode(out.tokens[:-1])
    assert out.stats["new_tokens"] == len(out.tokens) == 1 + out.emitted
    drafted = sum(n * steps for n, steps in out.accepted.items())
    assert out.emitted - out.steps <= drafted <= out.emitted


def test_stop_in_the_very_first_token(model):
    first = model.generate(PROMPT, max_new_tokens=1).text
    out = model.generate(PROMPT, max_new_tokens=40, stop=first)
    assert (out.text, len(out.tokens), out.finish_reason, out.steps) == (first, 1, "stop", 0)
    assert out.stats["tau"] is None


def test_stop_text_in_the_prompt_does_not_count(model):
    out = model.generate(PROMPT, max_new_tokens=10, stop=["hello"])
    assert out.finish_reason == ("stop" if "hello" in out.text else "length")


def test_stream_gives_the_same_text(model):
    whole = model.generate(PROMPT, max_new_tokens=40).text
    assert "".join(model.stream(PROMPT, max_new_tokens=40)) == whole
    assert (
        "".join(model.stream(PROMPT, max_new_tokens=40, stop=[whole[10:13]])) == (whole[: whole.find(whole[10:13]) + 3])
    )


@PLAIN
@pytest.mark.parametrize("at", [0, 1, 5, 20])
def test_end_of_text(model, whole, monkeypatch, at, plain):
    """The end token is the last of the tokens, and the first one of its kind."""
    end = whole.tokens[at]
    first = whole.tokens.index(end)
    monkeypatch.setattr(model.target.generation_config, "eos_token_id", [end, 0])
    out = model.generate(PROMPT, max_new_tokens=40, plain=plain)
    assert out.tokens == whole.tokens[: first + 1]
    assert out.finish_reason == "eos"


def test_special_end_token_is_not_in_the_text(model, monkeypatch):
    """A target that may say nothing but the end of text says it at once."""
    config = model.target.generation_config
    monkeypatch.setattr(config, "suppress_tokens", list(range(1, len(model.tokenizer))))
    monkeypatch.setattr(config, "eos_token_id", 0)
    out = model.generate(PROMPT, max_new_tokens=5)
    assert (out.tokens, out.text, out.finish_reason) == ([0], "", "eos")


def test_stop_without_a_tokenizer_is_refused(tiny_pair):
    with pytest.raises(ValueError, match="stop texts need a tokenizer"):
        tiny_pair.generate([1, 2, 3], stop=["x"])
