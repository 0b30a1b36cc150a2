"""`specx tune`: what it measures and leaves behind, and who uses it afterwards."""

import json
import signal
import subprocess
from itertools import pairwise

import pytest
from click.testing import CliRunner
from conftest import noised, pair

from specx import api, cli
from specx.eval import bench_costs
from specx.eval.bench_costs import CostBench, fitting

pytest_plugins = ["disk"]
PROMPT = "def stream(steps, coloured):"


def invoke(*args):
    result = CliRunner().invoke(cli.main, [str(arg) for arg in args])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECX_CACHE", str(tmp_path))
    return tmp_path


def files(folder):
    return [each for each in folder.rglob("*") if each.is_file()]


@pytest.fixture(scope="module")
def tuned(disk, tmp_path_factory):
    """A folder with the profile of the pair on disk, and what the command printed."""
    folder = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECX_CACHE", str(folder))
        patch.setattr(bench_costs, "_TEXTS", 1)
        result = invoke("tune", *disk.pair, "--contexts", "64,128", "--repeats", 2, "--json")
    assert result.exit_code == 0, result.stderr
    return folder, result


class TestCommand:
    def test_what_it_measures(self, tuned):
        folder, result = tuned
        found = json.loads(result.stdout)
        assert found["costs"]["contexts"] == [64, 128]
        assert found["costs"]["nodes"] == [1, 2, 8, 16, 32, 64]
        assert found["costs"]["tree"] == [16, 3, 4]
        assert found["costs"]["tau"] > 1.5  # the draft is the target with a little noise
        assert [row["context"] for row in found["chosen"]] == [64, 128]
        (path,) = files(folder)
        assert f"written: {path}" in result.stderr
        assert json.loads(path.read_text())["costs"] == found["costs"]

    def test_run_and_doctor_use_it(self, disk, tuned, monkeypatch, tmp_path):
        monkeypatch.setenv("SPECX_CACHE", str(tuned[0]))
        chosen = json.loads(tuned[1].stdout)["chosen"][0]
        given = ("run", *disk.pair, "--no-chat", "--prompt", PROMPT, "--max-new-tokens", 12, "--stats-json")
        stats = {}
        for name, more in {"tuned": (), "off": ("--no-profile",), "asked": ("--depth", 2)}.items():
            result = invoke(*given, tmp_path / name, *more)
            assert result.exit_code == 0, result.stderr
            stats[name] = json.loads((tmp_path / name).read_text())
        assert {name: stats["tuned"][name] for name in ("nodes", "depth", "beam")} == {
            name: chosen[name] for name in ("nodes", "depth", "beam")
        }
        assert (stats["off"]["nodes"], stats["off"]["profile"]) == (16, "not used: turned off")
        assert (stats["asked"]["nodes"], stats["asked"]["depth"]) == (16, 2)
        doctor = invoke("doctor", *disk.pair)
        assert f"{chosen['nodes']}/{chosen['depth']}/{chosen['beam']} after 64" in doctor.stdout

    def test_tables(self, disk, cache, monkeypatch):
        monkeypatch.setattr(bench_costs, "_TEXTS", 0)
        result = invoke("tune", *disk.pair, "--contexts", "32,4000,8K", "--repeats", 1)
        assert result.exit_code == 0, result.stderr
        assert "Costs" in result.stdout
        assert "Chosen" in result.stdout
        assert "a guess, for tau was not measured" in " ".join(result.stdout.split())
        assert "a context of 8192 tokens is left out: the target has 4096 positions" in result.stderr
        assert "instead of 4000 tokens of context 3840 are measured" in result.stderr

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (("--contexts", "x"), "a length must be a whole number"),
            (("--contexts", "64K"), "no context fits the target's 4096 positions: give --contexts of at most 3840"),
            (("--repeats", 0), "0 is not in the range"),
        ],
    )
    def test_mistakes(self, disk, cache, args, message):
        result = invoke("tune", *disk.pair, *args)
        assert (result.exit_code, result.stdout) == (2, "")
        assert message in result.stderr
        assert not files(cache)

    def test_without_a_draft(self, disk, cache):
        result = invoke("tune", "--target", disk.target)
        assert result.exit_code == 2
        assert "give --draft" in result.stderr

    def test_a_profile_that_must_be_there(self, disk, cache):
        result = invoke("run", *disk.pair, "--prompt", PROMPT, "--profile")
        assert result.exit_code == 2
        assert "run specx tune" in result.stderr

    def test_ctrl_c_leaves_nothing(self, disk, specx_command, cache):
        command, environment = specx_command
        process = subprocess.Popen(
            [*command, "tune", *disk.pair, "--contexts", "1K,3K", "--repeats", "5000"],
            env=environment | {"SPECX_CACHE": str(cache)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while "measuring" not in (line := process.stderr.readline()):
            assert line, "it has ended"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (130, "")
        assert "Traceback" not in err
        assert not files(cache)


class TestMeasuring:
    def test_pieces_are_counted(self, tiny, prompt_of):
        model = pair(tiny, noised(tiny, 0.02))
        bed, done = CostBench(model, [40, 300], 2), []
        costs = bed.measure(lambda: done.append(1))
        assert len(done) == bed.pieces
        assert costs.tau is None
        assert all(left <= right for row in costs.verify for left, right in pairwise(row))

    def test_a_target_that_ends_at_once(self, tiny, monkeypatch):
        model = pair(tiny, noised(tiny, 0.02))
        monkeypatch.setattr("specx.decoding.end_ids", lambda model: set(range(64)))
        with pytest.raises(RuntimeError, match="after 40 tokens at once"):
            CostBench(model, [40], 1).measure(lambda: None)

    def test_few_positions(self, tiny, monkeypatch):
        model = pair(tiny, noised(tiny, 0.02))
        assert fitting(model, [64, 7936, 9000])[0] == [64, 7936]
        monkeypatch.setattr(bench_costs, "positions_of", lambda config: None)
        assert fitting(model, [1 << 20]) == ([1 << 20], [])
        monkeypatch.setattr(bench_costs, "positions_of", lambda config: 100)
        with pytest.raises(ValueError, match="measuring takes more than 256"):
            fitting(model, [64])


def test_a_live_pair_is_loaded_with_its_profile(tiny, tuned, monkeypatch):
    """Profiles are looked up by what the models are, wherever they come from."""
    assert api.load(tiny, noised(tiny, 0.02)).profile.about == "none"


def test_every_measured_round_asks_the_draft(tiny, prompt_of, monkeypatch):
    """What the context offers must not make a level of the draft's tree look cheap."""
    model, made = pair(tiny, noised(tiny, 0.02)), []
    model = api.SpeculativeModel(model.engine, model.draft, None)  # defaults: the controller and the context are on
    real = bench_costs.SyncedGeneration
    monkeypatch.setattr(bench_costs, "SyncedGeneration", lambda tokens: made.append(real(tokens)) or made[-1])
    monkeypatch.setattr(bench_costs, "context_of", lambda model, tokens: prompt_of(8).repeat(20)[:tokens])
    CostBench(model, [40, 120], 4).measure(lambda: None)
    assert len(made) == 2
    assert all(set(out.modes) <= {"tree", "chain"} for out in made)
