"""The measurement of the controller, on tiny models; its arithmetic on rows whose numbers are known."""

import random
import xml.etree.ElementTree as ET

import pytest
import torch
from click.testing import CliRunner
from conftest import noised, pair

from specx import cli
from specx.config import Settings
from specx.data.documents import Document
from specx.eval import controller, grid
from specx.eval.beside import STRETCH, Place, side_by_side
from specx.eval.plot import along_the_text
from specx.experience import Experience


@pytest.fixture(scope="module")
def model(tiny):
    return pair(tiny, noised(tiny, 0.02), settings=Settings())


@pytest.fixture(scope="module")
def documents():
    ids = torch.randint(1, 64, (600,), generator=torch.Generator().manual_seed(0))
    return [Document("short", ids[:50], None), Document("long", ids, None)]


def test_hopeless_prompts(model, documents):
    rows = list(controller.adversarial(model, documents, [100], 1, 12, repeats=2))
    assert {row["kind"] for row in rows} == set(controller.KINDS)
    assert {row["method"] for row in rows} == {"ar", "ar-static", "plain", "specx"}
    for row in rows:
        assert row["kind"] == "temperature 1.5" or row["same"] or row["margin"] < 1e-4
    table = controller.ratios(rows)
    assert [each["kind"] for each in table] == list(controller.KINDS)
    assert len(rows) == 8 * len(table)
    assert all(each["prompts"] == 1 for each in table)
    assert "Hopeless prompts" in controller.markdown({"command": "x"}, rows)


def test_prompts_are_what_their_kind_says(model, documents):
    kinds = {kind: controller._prompt(model, documents, kind, 300, 0) for kind in controller.KINDS}
    text = documents[1].ids[150:450]
    assert kinds["random draft"].tolist() == text.tolist()
    assert kinds["shuffled text"].tolist() != text.tolist()
    assert sorted(kinds["shuffled text"].tolist()) == sorted(text.tolist())
    assert all(len(ids) == 300 for ids in kinds.values())
    with pytest.raises(ValueError, match="longest document has 600 tokens; lower --lengths below 601"):
        controller._prompt(model, documents, "random draft", 601, 0)


def test_the_random_draft_knows_nothing(model):
    found = controller._hopeless(model, "random draft")
    mine, theirs = (each.draft.model.model.get_input_embeddings().weight for each in (model, found))
    assert mine.shape == theirs.shape
    assert not torch.allclose(mine, theirs)
    assert controller._hopeless(model, "temperature 1.5").settings.sampling.temperature == 1.5


def test_a_text_that_is_given(model, documents):
    rows = list(controller.returning(model, documents, 100, 64))
    for method in ("plain", "fixed", "controller"):
        mine = [row for row in rows if row["method"] == method]
        assert sum(row["tokens"] for row in mine) == 3 * 64 - 1, "all but the token that the prefill gives"
        assert mine[-1]["position"] == 3 * 64
        assert all(row["ms"] > 0 and len(row["sources"]) == row["tokens"] for row in mine)
    assert {row["mode"] for row in rows if row["method"] == "plain"} == {"plain"}
    text = controller.markdown({}, rows)
    assert text.count("| code again |") == 3
    series = {method: controller.binned(rows, method) for method in ("plain", "fixed", "controller")}
    drawn = ET.fromstring(along_the_text(series, [64, 128], "a < b"))
    assert len(drawn.findall("{http://www.w3.org/2000/svg}polyline")) == 3


def test_ratios_by_hand():
    rows = [
        {"measure": "adversarial", "kind": "k", "context": 8, "prompt": prompt, "method": method,
         "decode_tokens_per_second": rate}
        for prompt, rates in (
            ("a", (10.0, 20.0, 16.0, 8.0)), ("a", (10.0, 20.0, 99.0, 8.0)), ("a", (10.0, 20.0, 1.0, 8.0)),
            ("b", (10.0, 5.0, 10.0, 10.0)),
        )
        for method, rate in zip(("ar", "ar-static", "plain", "specx"), rates, strict=True)
    ]  # fmt: skip
    rows.append(rows[0] | {"decode_tokens_per_second": None})  # the first token ended it
    rows.append(rows[0] | {"prompt": "broken off"})
    rows.append(rows[0] | {"context": 9, "decode_tokens_per_second": 5.0})
    (found,) = controller.ratios(rows)
    assert found["over plain"] == pytest.approx((0.5 * 1.0) ** 0.5)
    assert found["over HF"] == pytest.approx((0.4 * 1.0) ** 0.5)
    assert found["worst over plain"] == 0.5
    assert found["prompts"] == 2


def test_every_setting_writes_the_given_text(model, documents):
    rows = list(grid.measure(model, documents, [40, 300], 2, 30, "plain,lookup,full,window", repeats=2))
    assert {row["method"] for row in rows} == {"plain", "lookup", "full", "window", *grid.OURS}
    places = {(row["kind"], row["document"], row["position"], row["context"]) for row in rows}
    assert len(rows) == 2 * 6 * len(places)
    for row in rows:
        assert row["decode_tokens_per_second"] > 0
        assert (row["method"] == "plain") <= (row["tau"] == 1.0)
    text = "\n".join(grid.markdown(rows))
    assert text.count("| ordinary |") == 2
    assert grid.markdown([]) == []


def test_cells_by_hand():
    rates = {"plain": (1.0, 4.0), "lookup": (8.0, 2.0), "window": (3.0, 3.0), "specx": (4.0, 4.0)}
    rows = [
        {
            "measure": "grid",
            "kind": "ordinary",
            "context": 9,
            "method": method,
            "document": "d",
            "position": place,
            "decode_tokens_per_second": rate,
        }
        for method, pair_of in {**rates, "specx:lookup=0": (2.0, 4.5)}.items()
        for place, rate in enumerate(pair_of)
    ]
    ended = [row | {"decode_tokens_per_second": None} for row in rows[:1]]
    (cell,) = grid.cells([*rows, *ended, {"measure": "return"}])
    assert cell["n"] == 2
    assert cell["rates"]["plain"] == pytest.approx(2.0)
    assert cell["specx"] == {"best": "lookup", "ratio": pytest.approx(1.0), "turns": [pytest.approx(1.0)] * 2}
    assert cell["specx:lookup=0"]["best"] == "window"
    assert cell["specx:lookup=0"]["ratio"] == pytest.approx(1.0)


def test_settings_are_compared_within_a_turn():
    base = {"measure": "grid", "kind": "ordinary", "context": 9, "document": "d", "position": 0}
    rates = {"plain": (1.0, 2.0, 4.0), "specx": (0.9, 1.8, 4.0)}  # the machine was ever faster
    rows = [base | {"method": name, "decode_tokens_per_second": rate} for name in rates for rate in rates[name]]
    (cell,) = grid.cells(rows)
    assert cell["rates"] == {"plain": pytest.approx(2.0), "specx": pytest.approx(1.8)}
    assert cell["specx"]["turns"] == [pytest.approx(0.9), pytest.approx(1.0)]
    assert grid.markdown(rows)[-2].endswith("| 0.900 (plain; 0.900 to 1.000) | - |")


def test_settings_that_share_a_cache_draft_as_they_do_alone(model, documents):
    """Along one text side by side, and one after the other: the same rounds."""
    place, order = Place.after(model, documents[1].ids[:300], 200), random.Random(0)

    def writer(spec):
        return grid._writer(model, spec, place, Experience())

    specs = grid.fixed_settings("plain,lookup,full,window,retrieval")
    together = [writer(spec) for spec in specs]
    turns = [each.name for each, _, _ in side_by_side(together, order)]
    assert max(turns.index(spec.text) for spec in specs) < len(specs) * STRETCH < len(turns)
    for spec, found in zip(specs, together, strict=True):
        alone = writer(spec)
        rounds = [ms for _, _, ms in side_by_side([alone], order)]
        assert found.out.tokens == alone.out.tokens == place.text[200:].tolist()
        assert len(rounds) == found.out.steps == alone.out.steps
        assert found.out.accepted == alone.out.accepted
    assert len({found.out.steps for found in together}) > 2


def test_bins_by_hand():
    base = {"measure": "return", "method": "m"}
    rows = [
        base | {"position": 4, "tokens": 4, "ms": 10.0, "mode": "tree"},
        base | {"position": 5, "tokens": 1, "ms": 10.0, "mode": "plain"},
        base | {"position": 6, "tokens": 1, "ms": 10.0, "mode": "plain"},
        base | {"position": 40, "tokens": 1, "ms": 2.0, "mode": "lookup"},
    ]
    assert controller.binned(rows, "m") == [
        {"position": 0, "rate": pytest.approx(200.0), "mode": "plain"},
        {"position": 32, "rate": pytest.approx(500.0), "mode": "lookup"},
    ]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--measure", "speed"], "--measure takes adversarial, return and grid; got 'speed'"),
        (
            ["--fixed", "plain,tree"],
            "--fixed takes plain, lookup, full, window, retrieval, auto, joined by commas; got 'tree'",
        ),
        (["--fixed", "plain,ar"], "joined by commas; got 'ar'"),
        (["--lengths", "x"], "a length must be a whole number of tokens"),
    ],
)
def test_mistakes(args, message, tmp_path):
    result = CliRunner().invoke(cli.main, ["bench", "controller", "--out", str(tmp_path / "out"), *args])
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_results_are_not_overwritten(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    result = CliRunner().invoke(cli.main, ["bench", "controller", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "already holds results" in result.output
