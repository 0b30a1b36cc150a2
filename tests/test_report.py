"""`specx report`: what the page, the Markdown and the pictures say, and how the page lies in a window."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from specx import cli
from specx.eval import charts, report
from specx.eval.methods import parse_methods
from specx.eval.plots import BASE, Palette, draw_map, map_image
from specx.eval.results_folder import read_results

ROOT = Path(__file__).resolve().parent.parent
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FACTS = {
    "version": 1, "status": "complete", "ended_by": None, "command": "specx eval --data <here>", "commit": "abc",
    "versions": {"specx": "0", "python": "3", "torch": "2", "transformers": "5"}, "models": "a & b", "data": "here",
    "hardware": {"device": "cpu", "name": "a processor", "cores": 2, "threads": 1}, "attention": "cpu",
    "workers": 1, "load": {"before": 0.5, "after": 0.25, "cores": 2}, "units": {"done": 9, "of": 9},
    "configuration": {}, "notes": [], "results": [],
}  # fmt: skip


def speed_row(unit, context, method, rate, **more):
    steps = {"steps": 10, "emitted": 25, "accepted_histogram": {"0": 4, "2": 4, "3": 2}, "ms_draft": 20.0,
             "ms_verify": 50.0, "ms_retrieval": 5.0, "ms_other": 1.0, "policy": method}  # fmt: skip
    return {
        "unit": unit, "run": 0, "measure": "speed", "prompt": f"p{unit}", "context": context, "tokens": context,
        "method": method, "load": 0.1, "new": 26, "ttft_seconds": 0.5, "decode_seconds": 26 / rate,
        "decode_tokens_per_second": rate, "distinct_4grams": 0.9, "same": True, "divergence": None, "margin": None,
    } | ({} if method == "ar" else steps) | more  # fmt: skip


def tau_row(unit, context, method, emitted, kind="ordinary"):
    return {
        "unit": unit, "measure": "tau", "kind": kind, "document": "d", "position": unit, "recurrence": 0.1,
        "context": context, "method": method, "emitted": emitted, "emitted_text": emitted, "steps": 10,
        "draft_kv_tokens": 90, "policy": method, "refill": "gather", "hit_rate": 0.5 if method == "auto" else None,
        "accepted_histogram": {"0": 5, "3": 5},
    }  # fmt: skip


def trace_row(unit, context):
    return {
        "unit": unit, "measure": "trace", "prompt": "p", "context": context, "method": "auto", "tokens": 64,
        "policy": "auto", "chunk_size": 8, "sinks": 4, "recent": 16, "prompt_end": "the <end> of it",
        "pieces": [[["if", False]], [[" a", True], [" < b", False]], [["\n", False]]], "emitted": [2, 1],
        "kept": [[0, [2, 5]], [1, [3]]], "hits": [0.5, None], "hit_rate": 0.5,
    }  # fmt: skip


def folder(place, factor=1.0, facts=FACTS, **marks):
    rows = []
    for unit, (context, prompt) in enumerate((c, p) for c in (512, 2048) for p in (1, 2, 3)):
        for method, rate in (("ar", 20.0), ("full", 15.0 + prompt), ("auto", 30.0 * factor + prompt)):
            rows.append(speed_row(unit, context, method, rate, **marks))
            rows.append(tau_row(unit, context, "full" if method == "ar" else method, 20 + prompt))
        rows.append(tau_row(unit, context, "auto", 30 + prompt, "recurrence"))
    peak = {
        "measure": "memory",
        "prompt": "p",
        "method": "auto",
        "new": 4,
        "before_bytes": 2**20,
        "peak_bytes": 3 << 20,
    }
    rows += [{"unit": 90, "context": context, "draft_kv_tokens": 9} | peak for context in (512, 2048)]
    rows.append(trace_row(91, 2048))
    place.mkdir()
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "summary.json").write_text(json.dumps(facts))
    return place


def invoke(*args):
    result = CliRunner().invoke(cli.main, ["report", *(str(arg) for arg in args)])
    assert result.exception is None or isinstance(result.exception, SystemExit)  # anything else is a traceback
    return result


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A report about two folders."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: charts are not tested")
    base = tmp_path_factory.mktemp("report")
    unfinished = FACTS | {"status": "interrupted", "ended_by": "KeyboardInterrupt", "units": {"done": 3, "of": 9}}
    result = invoke(
        folder(base / "one"),
        folder(base / "two", 1.2, unfinished, shared=2),
        "--out",
        base / "out",
        "--format",
        "html,md,png",
    )
    assert result.exit_code == 0, result.output
    return base / "out", result.stdout.splitlines()


class TestWhatChartsSay:
    @pytest.mark.parametrize(
        ("kept", "said"),
        [
            (lambda row: row["measure"] == "speed", "over samples. Of generations."),
            (lambda row: row.get("kind") == "ordinary", "over samples. At ordinary places of the text."),
            (lambda row: True, "over samples. Solid: ordinary places; dashed: text of which much"),
        ],
        ids=["generations", "ordinary", "both kinds"],
    )
    def test_the_note_on_tau_is_about_what_was_measured(self, tmp_path, kept, said):
        place = folder(tmp_path / "one")
        rows = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
        (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if kept(row)))
        assert said in charts.CHARTS[0].note(read_results([place]))

    def test_methods_of_the_whole_ablation_have_a_colour_each(self, tmp_path):
        place = folder(tmp_path / "one")
        rows = [speed_row(n, 512, spec.text, 9.0) for n, spec in enumerate(parse_methods("all"))]
        (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        palette = Palette(read_results([place]))
        ours = [method for method in palette.methods if palette.colour(method) != BASE]
        assert len({palette.colour(method) for method in ours}) == len(ours) >= 10
        others = [method for method in palette.methods if method not in ours]
        assert len({palette.style(method)["marker"] for method in others}) == len(others)

    def test_the_map_ends_where_the_text_does(self, tmp_path):
        figure = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed: charts are not tested")
        (results,) = read_results([folder(tmp_path / "one")])
        axes = figure.Figure().subplots()
        draw_map(axes, results, Palette([results]))
        assert axes.get_ylim() == (0, 67)  # 64 tokens and 3 new ones
        assert axes.images[0].get_extent() == [0, 2, 0, 72]  # chunks of 8, the last one partial


class Page(HTMLParser):
    """Checks that elements are closed, and collects what a page would fetch."""

    VOID = ("meta", "br", "img", "link", "hr", "use", "path", "rect", "image", "stop")

    def __init__(self, text):
        super().__init__()
        self.open, self.fetched, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            local = value is None or value.startswith(("#", "data:"))
            if name in ("src", "href", "xlink:href", "srcset", "action") and not local:
                self.fetched.append(value)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


class TestPage:
    def test_stands_alone_and_is_well_formed(self, both):
        out, written = both
        text = (out / "report.html").read_text()
        page = Page(text)
        assert page.fetched == []
        assert "<script" not in text
        assert "@import" not in text
        assert not re.findall(r"url\((?!#)", text)
        assert str(out / "report.html") in written

    def test_says_what_was_measured(self, both):
        text = Page((both[0] / "report.html").read_text()).text
        for chart in charts.CHARTS:
            assert chart.title in text
        assert "specx eval --data <here>" in text  # escaped in the source
        assert "This run did not finish: interrupted (KeyboardInterrupt), 3 of 9 parts" in text
        assert "2 workers measured at the same time" in text
        assert "Side by side" in text
        assert "the <end> of it" in text

    def test_reading_view_tells_draft_and_target_apart(self, both):
        text = (both[0] / "report.html").read_text()
        assert '<span class="t">if</span><span class="d"> a</span><span class="t"> &lt; b\n</span>' in text
        assert "auto after 2K, p: 1.50 tokens a step, 50% of the attention retrieved" in text

    def test_every_chart_has_a_wide_and_a_narrow_form_in_the_pages_colours(self, both):
        text = (both[0] / "report.html").read_text()
        assert text.count('class="wide" role="img"') == text.count('class="narrow" role="img"') == len(charts.CHARTS)
        assert "#010203" not in text
        assert "#040506" not in text
        assert "currentColor" in text

    def test_several_folders_by_default_do_not_write_into_one(self, both, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        one = both[0].parent / "one"
        assert invoke(one, both[0].parent / "two", "--format", "md").stdout == "specx-report/report.md\n"
        assert invoke(one, "--format", "md").stdout == f"{one / 'report' / 'report.md'}\n"
        assert "Side by side" not in (one / "report" / "report.md").read_text()


class TestMarkdown:
    def test_shows_the_pictures_that_are_there(self, both):
        out, _ = both
        text = (out / "report.md").read_text()
        shown = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
        assert shown == [f"{chart.name}.png" for chart in charts.CHARTS]
        for name in shown:
            assert (out / name).read_bytes().startswith(b"\x89PNG")
        assert "| tau, ordinary | 512 | auto | 2.20 [" in text

    def test_old_folders_without_a_json_summary(self, tmp_path):
        old = ROOT / "eval" / "results" / "stdlib-speed"
        result = invoke(old, "--out", tmp_path, "--format", "md,html")
        assert result.exit_code == 0, result.output
        text = (tmp_path / "report.md").read_text()
        assert "- command: specx eval --data stdlib" in text
        assert "Not measured here: Memory against context, Accepted tokens, What retrieval kept." in text


class TestFigures:
    def test_a_picture_file_has_colours_of_its_own(self, both):
        folders = read_results([both[0].parent / "one"])
        chart = next(chart for chart in charts.CHARTS if chart.name == "memory")
        text = charts.file_bytes(chart, folders, charts.Palette(folders), "svg").decode()
        assert "<svg" in text
        assert not re.search("currentColor|var\\(|#010203|#040506", text)

    def test_intervals_and_speed_ups_by_hand(self, tmp_path):
        (found,) = read_results([folder(tmp_path / "one")])
        at = {(each["measure"], each.get("kind"), each["context"], each["method"]): each for each in found.figures}
        assert at["speed", None, 512, "auto"]["speed_up"]["mean"] == 32 / 20
        assert at["tau", "ordinary", 512, "auto"]["tau"]["mean"] == pytest.approx(2.2)
        assert at["memory", None, 512, "auto"]["peak_bytes_added"] == 2 * 2**20
        assert at["speed", None, 2048, "full"]["ms_per_step"]["verify"] == 5.0

    def test_the_map_by_hand(self):
        pytest.importorskip("matplotlib", reason="matplotlib is not installed: charts are not tested")
        image = map_image(trace_row(0, 64))
        kinds = [
            ["rule" if c[0] < 0.6 and c[3] else "chosen" if c[3] else "-" for c in line] for line in image.tolist()
        ]
        # 64 tokens in chunks of 8, three more generated; sinks in chunk 0, the last 16 tokens from chunk 6 on
        assert kinds == [
            ["rule", "rule"], ["-", "-"], ["chosen", "-"], ["-", "chosen"], ["-", "-"], ["chosen", "-"],
            ["rule", "rule"], ["rule", "rule"], ["rule", "rule"],
        ]  # fmt: skip


class TestWithoutMatplotlib:
    @pytest.fixture(autouse=True)
    def hidden(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)

    def test_page_and_markdown_say_what_is_missing(self, tmp_path):
        result = invoke(folder(tmp_path / "one"), "--out", tmp_path / "out")
        assert result.exit_code == 0, result.output
        assert [Path(line).name for line in result.stdout.splitlines()] == ["report.html", "report.md"]
        assert "note: charts need matplotlib, which is not installed: pip install 'specx[report]'" in result.stderr
        for name in ("report.html", "report.md"):
            text = (tmp_path / "out" / name).read_text()
            assert "The charts are missing (tau against context, Speed-up against context, " in text
            assert "Speed" in text
            assert "50% of the attention" in text or name == "report.md"

    def test_asked_for_by_name_it_is_an_error(self, tmp_path):
        result = invoke(folder(tmp_path / "one"), "--out", tmp_path / "out", "--format", "png")
        assert result.exit_code == 1
        assert "charts need matplotlib" in result.stderr
        assert not (tmp_path / "out").exists()


class TestMistakes:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda p: p, "holds no rows.jsonl; give a folder that specx eval wrote"),
            (lambda p: p / "nowhere", "is no folder"),
            (lambda p: ((p / "rows.jsonl").write_text("") and None) or p, "is empty: nothing was measured yet"),
            (lambda p: (p / "rows.jsonl").write_text('{"measure": "tau"}\n{"a"\n{}\n') and p, "line 2 is broken"),
            (lambda p: (p / "rows.jsonl").write_text('{"measure": "tau"}\n') and p, "rows that specx eval does not"),
        ],
        ids=range(5),
    )
    def test_folders(self, tmp_path, make, message):
        result = invoke(make(tmp_path), "--out", tmp_path / "out")
        assert result.exit_code == 2
        assert message in result.stderr
        assert not (tmp_path / "out").exists()

    def test_others(self, tmp_path):
        one = folder(tmp_path / "one")
        assert "did you mean 'html'?" in invoke(one, "--format", "htm").stderr
        assert "a folder is given twice" in invoke(one, one).stderr
        assert "cannot be written" in invoke(one, "--out", "/proc/x", "--format", "md").stderr
        assert "Missing argument" in invoke().stderr


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: the page is not looked at in a browser")
class TestBrowser:
    """The page as a browser lays it out."""

    MEASURE = """<script>
const wide = [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, svg') &&
  e.getBoundingClientRect().right > window.innerWidth + 1).map(e => e.tagName + '.' + e.className);
const seen = [...document.querySelectorAll('svg')].filter(e => e.getBoundingClientRect().width > 0);
document.documentElement.setAttribute('data-found', JSON.stringify({
  overflow: document.documentElement.scrollWidth - window.innerWidth, wide,
  kinds: [...new Set(seen.map(e => e.classList[0]))], count: seen.length,
  page: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
  width: window.innerWidth}))</script></body>"""

    def looked_at(self, page, width, dark, tmp_path):
        text = page.read_text().replace("</body>", self.MEASURE)
        # headless windows are no narrower than 500 pixels, so that a frame of the wanted width stands for them
        inner = tmp_path / "inner.html"
        inner.write_text(text)
        outer = tmp_path / "outer.html"
        outer.write_text(
            f'<iframe src="inner.html" width="{width}" height="900" style="border:0"></iframe><script>onload = () => '
            "document.title = document.querySelector('iframe').contentDocument.documentElement.dataset.found</script>"
        )
        command = [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom",
            f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            "--virtual-time-budget=5000", "--window-size=1400,1000", outer.as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        title = re.search(r"<title>(.*?)</title>", done.stdout)
        assert title, done.stderr[-500:]
        return json.loads(title[1].replace("&amp;", "&"))

    @pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
    @pytest.mark.parametrize("width", [1280, 400])
    def test_fits_the_window_and_follows_its_colours(self, both, tmp_path, width, dark):
        found = self.looked_at(both[0] / "report.html", width, dark, tmp_path)
        assert found["width"] == width
        assert found["overflow"] <= 0
        assert found["wide"] == []
        assert found["kinds"] == ["wide" if width > 640 else "narrow"]
        assert found["count"] == len(charts.CHARTS)
        page, ink = (sum(map(int, re.findall(r"\d+", found[name])[:3])) for name in ("page", "ink"))
        assert (page < 150 < 500 < ink) if dark else (ink < 150 < 500 < page)


def test_formats_are_one_list():
    from specx import cli_report

    assert cli_report.FORMATS == report.FORMATS
