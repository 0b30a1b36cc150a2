"""`specx eval` below the command line: what is measured, in which order, and what the tables say about it."""

import io
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import noised, pair
from rich.console import Console

from specx.acceptance import walk
from specx.config import Settings
from specx.data.documents import Document
from specx.eval import acceptance, facts, hits, memory, planning, runner, speed, workbench
from specx.eval.acceptance import AlongText
from specx.eval.chosen import Prompt
from specx.eval.methods import ABLATION, KNOWN, Run, build, fitting, huggingface, options_of, parse_methods
from specx.eval.metrics import paired_bootstrap_tau
from specx.eval.planning import Job
from specx.eval.spans import Span
from specx.eval.tables import markdown, memory_table, speed_table, tables, tau_tables
from specx.hf import HFModel
from specx.target import Target
from specx.tree import DraftTree

pytest_plugins = ["disk"]
POLICIES = ("full", "window", "retrieval", "auto")


def text_of(size, seed=0):
    return torch.randint(1, 64, (size,), generator=torch.Generator().manual_seed(seed))


def span_of(ids, length, name="a.py"):
    """The last `length` tokens of ids as a span."""
    return Span(name, len(ids) - length, ids, length, 0.0, "ordinary")


def own_text(model, ids, length):
    """ids and the target's own greedy continuation of them."""
    return torch.cat([ids, torch.tensor(model.generate(ids, max_new_tokens=length, plain=True).tokens)])


def measured(model, spans, contexts, methods):
    return list(acceptance.measure(model, spans, contexts, parse_methods(methods)))


class TestAcceptance:
    @pytest.mark.parametrize("policy", POLICIES)
    def test_along_the_targets_own_text_it_is_a_free_generation(self, tiny_pair, policy):
        ids = own_text(tiny_pair, text_of(300), 64)
        (row,) = measured(tiny_pair, [span_of(ids, 64)], [300], policy)
        free = tiny_pair.generate(ids[:300], max_new_tokens=64, policy=policy, trace=True)
        emitted = [len(record["path"]) for record in free.trace]
        levels, rounds = tiny_pair.settings.tree.depth + 2, 0
        while 1 + sum(emitted[:rounds]) + levels <= 64:
            rounds += 1
        assert rounds > 10
        assert row["steps"] == rounds
        assert row["emitted"] == row["emitted_text"] == sum(emitted[:rounds])
        assert (row["policy"], row["refill"]) == (policy, "recompute" if policy == "full" else "gather")

    def test_policies_differ_where_the_draft_drops_tokens(self, tiny_pair):
        rows = measured(tiny_pair, [span_of(own_text(tiny_pair, text_of(300), 64), 64)], [300], "full,window")
        assert rows[0]["emitted"] / rows[0]["steps"] > rows[1]["emitted"] / rows[1]["steps"]
        assert rows[0]["draft_kv_tokens"] > 300 > 128 >= rows[1]["draft_kv_tokens"]

    def test_what_the_target_takes_is_its_processed_choice(self, tiny):
        model = pair(tiny, noised(tiny, 0.02), settings=Settings().override(repetition_penalty=1.5))
        ids = own_text(model, text_of(200), 48)
        assert ids[200:].tolist() != pair(tiny, tiny).generate(ids[:200], max_new_tokens=48).tokens
        (row,) = measured(model, [span_of(ids, 48)], [200], "full")
        assert row["emitted"] == row["emitted_text"] > row["steps"]

    def test_methods_that_share_a_prefill_change_nothing_for_each_other(self, tiny_pair):
        spans = [span_of(own_text(tiny_pair, text_of(250), 24), 24), span_of(text_of(274, 7), 24, "foreign")]
        methods = ["full", "window", "retrieval:retrieve_every=1:chunk_size=8", "auto:nodes=4:score_layer=0"]
        contexts = [50, 250]
        alone = [row for method in methods for row in measured(tiny_pair, spans, contexts, method)]
        for order, lengths in ((methods, contexts[::-1]), (methods[::-1], contexts)):
            together = measured(tiny_pair, spans, lengths, ",".join(order))
            assert sorted(together, key=str) == sorted(alone, key=str)
        assert Counter(row["method"] for row in alone) == dict.fromkeys(methods, len(spans) * len(contexts))
        assert len({(row["emitted"], row["steps"]) for row in alone}) > 5

    def test_methods_of_one_layer_pay_for_one_prefill(self, tiny_pair, monkeypatch):
        made = []

        class Counted(hits.WatchedTarget):
            def __init__(self, *args, **options):
                made.append(args[2])
                super().__init__(*args, **options)

        monkeypatch.setattr(acceptance, "WatchedTarget", Counted)
        methods = "full,window,auto:score_layer=2,retrieval:score_layer=1"
        measured(tiny_pair, [span_of(text_of(64), 16)], [20, 40], methods)
        assert made == [2, 1, 2, 1]  # the last of three layers is what is scored anyway

    def test_along_foreign_text_emitted_is_what_the_target_alone_takes(self, tiny):
        draft = noised(tiny, 0.02)
        model = pair(tiny, draft, settings=Settings().override(nodes=2, depth=0, beam=1))  # the root and one guess
        ids = own_text(model, text_of(90, 3), 60)
        ids[110:130] = text_of(20, 4)  # the rest is no longer what the target would have said
        (row,) = measured(model, [span_of(ids, 60)], [90], "full")
        theirs, guesses = (each(ids[None]).logits[0].argmax(-1).tolist() for each in (tiny, draft))
        at, emitted, along, steps = 90, 0, 0, 0  # `at` is the root's place
        while at - 90 + 1 + 2 <= 60:
            emitted += 1 + (theirs[at] == guesses[at])
            taken = 1 + (int(ids[at + 1]) == guesses[at])
            along, at, steps = along + taken, at + taken, steps + 1
        assert (row["emitted"], row["emitted_text"], row["steps"]) == (emitted, along, steps)
        assert steps < along < emitted

    @pytest.mark.parametrize("depth", [0, 3])
    @pytest.mark.parametrize("own", [True, False])
    def test_a_draft_that_is_the_target_is_taken_whole_every_round(self, tiny, depth, own):
        model = pair(tiny, tiny, settings=Settings().override(nodes=depth + 2, depth=depth, beam=1))
        ids = own_text(model, text_of(200), 30) if own else text_of(230)
        (row,) = measured(model, [span_of(ids, 30)], [200], "full")
        assert row["steps"] >= 5
        assert row["emitted"] == (depth + 2) * row["steps"]
        assert (row["emitted_text"] == row["emitted"]) is own

    def test_the_walk_by_hand(self):
        tree = DraftTree(
            tokens=torch.tensor([7, 1, 2, 3, 4]),
            parents=torch.tensor([-1, 0, 0, 2, 3]),
            depths=torch.tensor([0, 1, 1, 2, 3]),
            scores=torch.zeros(5),
        )
        own = SimpleNamespace(choose=lambda logits, tree, ids: [2, 0, 3, 9, 0])  # takes 2, 3, then says 9
        chooser = AlongText(torch.tensor([5, 6, 7, 1, 8]), own)
        chosen = chooser.choose(torch.empty(5, 10), tree, torch.tensor([5, 6]))
        assert chosen.tolist() == [1, 8, 8, -1, -1]  # the text after depths 0, 1, 2, 3
        assert walk(tree, chosen).tokens == (1, 8)
        assert chooser.emitted == [3]


class TestPrefill:
    def test_the_same_tensor_goes_back_to_its_end(self, tiny_pair, monkeypatch):
        engine, ids, forwards = tiny_pair.engine, text_of(100), []
        real = engine.forward
        monkeypatch.setattr(engine, "forward", lambda *args, **kwargs: forwards.append(1) or real(*args, **kwargs))
        target = Target(engine, 200, engine.score_layer())
        logits, scores = target.prefill(ids).logits.clone(), target.chunk_scores(-1, 8).clone()
        for _ in range(2):
            for _ in range(30):
                target.verify(DraftTree.single(5))
                target.keep([0])
            assert target.cache.committed == 130
            before = len(forwards)
            again = target.prefill(ids)
            assert len(forwards) == before
            assert target.cache.committed == 100
            assert torch.equal(again.logits, logits)
            assert torch.equal(target.chunk_scores(-1, 8), scores)
        for other in (ids.clone(), text_of(60)):
            before = len(forwards)
            target.prefill(other)
            assert len(forwards) == before + 1
            assert target.cache.committed == len(other)
        assert not torch.equal(target.chunk_scores(-1, 8), scores[:8])


class TestParsing:
    def test_names_and_options(self):
        text = " ar, plain ,retrieval:recent=256:refill=gather:tree-threshold=0.5:score-layer=none, full: nodes = 4"
        specs = parse_methods(text)
        assert [(spec.name, spec.options) for spec in specs] == [
            ("ar", {}),
            ("plain", {}),
            ("retrieval", {"recent": 256, "refill": "gather", "tree_threshold": 0.5, "score_layer": None}),
            ("full", {"nodes": 4}),
        ]
        assert type(specs[2].options["recent"]) is int
        assert [spec.ours for spec in specs] == [False, True, True, True]
        assert [spec.drafts for spec in specs] == [False, False, True, True]
        assert [options_of(spec) for spec in specs[1:]] == [
            {"plain": True},
            {"policy": "retrieval", "lookup": False, "controller": "off", **specs[2].options},
            {"policy": "full", "lookup": False, "controller": "off", "nodes": 4},
        ]
        assert [spec.name for spec in parse_methods(",".join(KNOWN))] == list(KNOWN)
        assert parse_methods("all") == parse_methods(",".join(KNOWN))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "no method given; known: ar, hf-assisted"),
            (" , ", "no method given"),
            ("retrival", "unknown method 'retrival'; did you mean 'retrieval'"),
            ("ar,hf-asisted", "did you mean 'hf-assisted'"),
            ("ar-static", "unknown method 'ar-static'. Known: ar, "),
            ("full:", "written name=value"),
            ("full:nodes", "written name=value, separated by colons; got 'nodes'"),
            ("full:noodes=3", "'full:noodes=3' has no option 'noodes'; did you mean 'nodes'"),
            ("ar:nodes=3", "method 'ar' takes no options; full, window, retrieval, auto and specx do"),
            ("plain:nodes=3", "method 'plain' takes no options"),
            ("full:nodes=3:nodes=4", "sets nodes twice"),
            ("full,window,full", "method full is given twice"),
            ("full:nodes=3:depth=1,full:depth=1:nodes=3", "full:depth=1:nodes=3 is given twice"),
            # what would make a method lie about its name, its length or its output
            *((f"retrieval:{name}=1", f"has no option '{name}'") for name in (
                "policy", "plain", "trace", "max_new_tokens", "stop", "temperature", "seed", "repetition_penalty",
            )),
        ],
    )  # fmt: skip
    def test_mistakes(self, text, message):
        with pytest.raises(ValueError, match=message):
            parse_methods(text)


class TestBuilding:
    def test_ar_is_two_methods_and_greedy_ones_agree(self, tiny_pair):
        methods = build(parse_methods(",".join(KNOWN)), tiny_pair)
        assert list(methods) == ["ar", "ar-static", *KNOWN[1:]]
        runs = {name: method(text_of(60), 12) for name, method in methods.items()}
        assert {tuple(run.tokens) for run in runs.values()} == {tuple(runs["ar"].tokens)}
        assert len(runs["ar"].tokens) == 12
        for name, run in runs.items():
            assert run.figures["ttft_seconds"] > 0
            assert run.figures["decode_tokens_per_second"] > 0
            assert ("steps" in run.figures) == (name in ("plain", "lookup", "specx", *POLICIES, *ABLATION))
        assert runs["plain"].figures["steps"] == runs["plain"].figures["emitted"] == 11
        assert runs["window"].figures["policy"] == "window"

    def test_the_ablation_switches_one_part_each(self, tiny_pair, monkeypatch):
        seen = []
        real = HFModel.forward

        def forward(engine, *args, **options):
            if engine.model is tiny_pair.target:
                seen.append((engine.hybrid, engine.flash_prefill))
            return real(engine, *args, **options)

        monkeypatch.setattr(HFModel, "forward", forward)
        methods = build(parse_methods("tree,tree+flash,tree+hybrid,tree+retrieval:nodes=4,auto"), tiny_pair)
        for name, parts in {
            "tree": (False, False), "tree+flash": (False, True), "tree+hybrid": (True, False),
            "tree+retrieval:nodes=4": (False, False), "auto": (True, True),
        }.items():  # fmt: skip
            seen.clear()
            run = methods[name](text_of(200), 6)
            assert set(seen) == {parts}
            assert run.figures["policy"] == ("full" if name in ("tree", "tree+flash", "tree+hybrid") else "auto")

    def test_all_is_what_the_models_can_run(self, tiny, tiny_pair):
        names = [spec.name for spec in fitting(parse_methods("all"), tiny_pair)]
        assert names == list(KNOWN)
        bare = pair(tiny, tiny)
        bare.draft = None
        assert [spec.name for spec in fitting(parse_methods("all"), bare)] == ["ar", "hf-lookup", "plain", "lookup"]
        bare.draft = SimpleNamespace(name="a head")
        assert [spec.name for spec in fitting(parse_methods("all"), bare)] == [n for n in KNOWN if n != "hf-assisted"]

    def test_one_token_has_no_rate(self, tiny_pair):
        for method in build(parse_methods("ar,plain,full"), tiny_pair).values():
            assert method(text_of(60), 1).figures["decode_tokens_per_second"] is None

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("ar,retrieval:recent=0", "method retrieval:recent=0: recent must be at least 1; got 0"),
            ("full:nodes=1.5", "method full:nodes=1.5: nodes must be an integer; got 1.5"),
            ("full:depth=none", "method full:depth=none: depth must be an integer; got None"),
            ("window:refill=fetch", "method window:refill=fetch: refill must be one of gather, recompute; got 'fetch'"),
        ],
    )
    def test_a_value_out_of_range_names_the_method(self, tiny_pair, text, message):
        with pytest.raises(ValueError, match=message):
            build(parse_methods(text), tiny_pair)

    def test_without_a_draft(self, tiny):
        bare = pair(tiny, tiny)
        bare.draft = None
        assert list(build(parse_methods("ar,hf-lookup,plain"), bare)) == ["ar", "ar-static", "hf-lookup", "plain"]
        for text in ("plain,full", "hf-assisted"):
            with pytest.raises(ValueError, match=rf"method {text.split(',')[-1]} needs a draft: give --draft"):
                build(parse_methods(text), bare)

    def test_a_draft_that_hugging_face_cannot_assist_with(self, tiny_pair):
        model = pair(tiny_pair.target, tiny_pair.target)
        model.draft = SimpleNamespace(name="a head")
        with pytest.raises(ValueError, match="hf-assisted needs a draft that is a language model by itself"):
            build(parse_methods("hf-assisted"), model)

    def test_sampling_is_passed_on_and_seeded(self, tiny):
        def tokens(**options):
            return huggingface(pair(tiny, tiny, settings=Settings().override(**options)), {})(text_of(40), 16).tokens

        greedy = tokens()
        assert tokens(temperature=2.0) == tokens(temperature=2.0) != greedy
        assert tokens(temperature=2.0) != tokens(temperature=2.0, seed=1)
        assert tokens(temperature=2.0, top_k=1) == greedy
        assert tokens(repetition_penalty=1.5) != greedy


def prompts_of(*sizes):
    return [Prompt(f"p{number}", size, text_of(size, number)) for number, size in enumerate(sizes)]


class Fake:
    """Methods that note their calls and return the target's own tokens, or what `lies` makes of them."""

    def __init__(self, model, names, **lies):
        self.calls, self.true = [], huggingface(model, {})
        self.methods = {name: self.method(name, lies.get(name)) for name in names}

    def method(self, name, lie):
        def run(ids, new):
            self.calls.append((name, ids.clone(), new))
            tokens = self.true(ids, new).tokens
            return Run(lie(tokens) if lie else tokens, {"decode_tokens_per_second": 1.0})

        return run


class TestSpeed:
    def test_all_methods_get_the_same_prompts_in_turn(self, tiny_pair):
        fake, prompts = Fake(tiny_pair, "abc"), prompts_of(90, 30, 40, 50)
        rows = list(speed.measure(tiny_pair, prompts, fake.methods, 6))
        warm, runs = fake.calls[:3], fake.calls[3:]
        assert [(name, new) for name, _, new in warm] == [("a", 64), ("b", 64), ("c", 64)]
        assert all(torch.equal(ids, prompts[0].ids[-64:]) for _, ids, _ in warm)
        assert "".join(name for name, _, _ in runs) == "abcbcacababc"
        for place, (_, ids, new) in enumerate(runs):
            assert torch.equal(ids, prompts[place // 3].ids)
            assert new == 6
        assert [(row["prompt"], row["context"], row["tokens"], row["method"]) for row in rows] == [
            (prompt.name, prompt.context, len(prompt.ids), name) for prompt in prompts for name in "abc"
        ]
        assert {(row["same"], row["divergence"], row["margin"], row["new"]) for row in rows} == {(True, None, None, 6)}

    @pytest.mark.parametrize("truth", ["ar", "its own run"])
    def test_a_method_that_lies_is_found_where_it_does(self, tiny_pair, truth):
        def altered(tokens):
            return [*tokens[:3], tokens[3] % 63 + 1, *tokens[4:]]

        names = ["ar", "cut", "altered"] if truth == "ar" else ["cut", "altered"]
        fake, prompts = Fake(tiny_pair, names, cut=lambda tokens: tokens[:5], altered=altered), prompts_of(30)
        rows = {row["method"]: row for row in speed.measure(tiny_pair, prompts, fake.methods, 8)}
        true = fake.true(prompts[0].ids, 8).tokens
        for name, place in (("altered", 3), ("cut", 5)):
            ids = torch.cat([prompts[0].ids, torch.tensor(true[:place])])
            first, second = tiny_pair.target(ids[None]).logits[0, -1].topk(2).values.tolist()
            assert (rows[name]["same"], rows[name]["divergence"]) == (False, place)
            assert rows[name]["margin"] == pytest.approx(first - second, abs=1e-4)
            assert rows[name]["margin"] > 0
        assert [row["same"] for row in rows.values()] == [name == "ar" for name in names]

    def test_without_ar_the_truth_is_penalised_as_well(self, tiny):
        model = pair(tiny, noised(tiny, 0.02), settings=Settings().override(repetition_penalty=1.5))
        for methods in ("full", "ar,full"):
            rows = list(speed.measure(model, prompts_of(80), build(parse_methods(methods), model), 24))
            assert all(row["same"] for row in rows)

    def test_sampling_leaves_exactness_out(self, tiny):
        model = pair(tiny, tiny, settings=Settings().override(temperature=1.0))
        rows = list(speed.measure(model, prompts_of(30), build(parse_methods("ar,full"), model), 4))
        assert [row["method"] for row in rows] == ["ar", "ar-static", "full"]
        assert not any({"same", "divergence", "margin"} & row.keys() for row in rows)

    @pytest.mark.parametrize("error", [RuntimeError("no memory"), KeyboardInterrupt()], ids=repr)
    def test_what_ran_before_a_failure_comes_first(self, tiny_pair, error):
        def fail(tokens):
            if len(fake.calls) > 6:
                raise error
            return tokens

        # the second prompt's turn is b, c, a
        for name, before in (("b", []), ("c", [("p1", "b")])):
            fake, rows = Fake(tiny_pair, "abc", **{name: fail}), []
            with pytest.raises(type(error)):
                rows.extend(speed.measure(tiny_pair, prompts_of(30, 40, 50, 60), fake.methods, 4))
            assert [(row["prompt"], row["method"]) for row in rows] == [*(("p0", name) for name in "abc"), *before]


class TestMemory:
    def test_one_process_a_cell(self, disk):
        """The only test that starts one."""
        loading = {"target": disk.target, "draft": disk.draft, "specextend": True, "draft_context": 64}
        prompts = [Prompt("a", 128, torch.arange(1, 129))]
        (row,) = memory.measure(loading, prompts, ["window:nodes=4"], 6)
        assert (row["measure"], row["prompt"], row["context"], row["method"]) == ("memory", "a", 128, "window:nodes=4")
        assert row["new"] == 6
        assert 0 < row["draft_kv_tokens"] <= 64
        assert 50e6 < row["before_bytes"] <= row["peak_bytes"] < 4e9

    @pytest.mark.parametrize(
        ("code", "stderr", "reason"),
        [
            (1, "a warning\nTraceback ...\nValueError: boom\n", "ValueError: boom"),
            (3, "", "exit status 3"),
            (-9, "a warning\n", "killed by signal 9 (9: perhaps out of memory)"),
        ],
    )
    def test_a_process_that_fails_says_why_on_one_line(self, monkeypatch, code, stderr, reason):
        done = subprocess.CompletedProcess([], code, "", stderr)
        monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: done)
        with pytest.raises(RuntimeError) as caught:
            list(memory.measure({}, prompts_of(30), ["full"], 4))
        assert str(caught.value) == f"measuring the memory of full after 30 tokens failed: {reason}"

    def test_the_process_itself_fails_on_one_line(self, monkeypatch, disk):
        job = {"loading": {"target": disk.target, "draft": None}, "ids": [1, 2], "method": "full", "new": 4}
        monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(job)))
        with pytest.raises(SystemExit) as caught:
            memory.main()
        assert caught.value.code.startswith("ValueError: method full needs a draft")
        assert "\n" not in caught.value.code

    def test_the_peak_is_that_since_the_reset(self):
        size = 100 * 2**20
        huge = torch.ones(4 * size, dtype=torch.uint8)
        del huge
        before = memory.reset(cuda=False)
        assert memory.peak_bytes(cuda=False) - before < size / 2
        block = torch.ones(size, dtype=torch.uint8)
        del block
        assert size * 0.9 < memory.peak_bytes(cuda=False) - before < size * 1.5


def documents_of(*sizes, label=None):
    return [Document(f"d{number}", text_of(size, number), label) for number, size in enumerate(sizes)]


@pytest.fixture
def job(tmp_path):
    return Job(
        data="here", contexts=[100, 200], specs=parse_methods("ar,full,window"), measures=("tau", "speed"), samples=2,
        spans=2, span_tokens=16, new=6, loading={}, out=tmp_path / "a" / "out", command="specx eval",
    )  # fmt: skip


def executed(job, model, documents, rows=None):
    rows, said = [] if rows is None else rows, []
    runner.run(job, model, documents, said.append, rows)
    return rows, said


def written(job):
    return [json.loads(line) for line in (job.out / "rows.jsonl").read_text().splitlines()]


class TestRunner:
    def test_rows_are_on_disk_as_soon_as_they_are_measured(self, tiny_pair, job):
        rows, on_disk = [], []

        def say(line):
            if not line.startswith(("note", "warning")):
                on_disk.append(len(written(job)))

        runner.run(job, tiny_pair, documents_of(900, 700), say, rows)
        assert (
            len(rows) == 2 * 2 * 4 + 2 * 2 * 2
        )  # lengths, prompts, methods with both caches; lengths, spans, policies
        assert on_disk == list(range(1, len(rows) + 1))
        assert written(job) == json.loads(json.dumps(rows))
        summary = (job.out / "summary.md").read_text()
        assert all(f"## {title}" in summary for title in ("tau, ordinary spans", "tau against full", "Speed"))
        assert "INCOMPLETE" not in summary
        assert "memory" not in {row["measure"] for row in rows}

    @pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=repr)
    def test_a_method_that_fails_in_the_middle_leaves_what_was_measured(self, tiny_pair, job, monkeypatch, error):
        def failing(*args):
            methods, real = build(*args), []

            def run(ids, new):
                real.append(ids)
                if len(real) > 2:
                    raise error
                return Run([1, 2], {"decode_tokens_per_second": 2.0})

            return methods | {"full": run}

        monkeypatch.setattr(workbench, "build", failing)
        rows = []
        with pytest.raises(type(error)):
            executed(job, tiny_pair, documents_of(900, 700), rows)
        assert len(rows) == 4 + 1  # a prompt, and ar-static, whose turn comes before full
        assert written(job) == json.loads(json.dumps(rows))
        summary = (job.out / "summary.md").read_text()
        assert f"INCOMPLETE: ended by {type(error).__name__}" in summary
        assert "## Speed" in summary
        assert "## tau" not in summary

    def test_results_are_never_overwritten(self, tiny_pair, job, monkeypatch):
        job.out.mkdir(parents=True)
        file = job.out / "rows.jsonl"
        file.write_text('{"measure": "speed"}\n')
        with pytest.raises(ValueError, match=r"rows.jsonl already holds results: give another --out, or remove it"):
            executed(job, tiny_pair, documents_of(900))
        assert file.read_text() == '{"measure": "speed"}\n'
        file.write_text("")  # of somebody who gave up before the first row
        rows, _ = executed(replace(job, measures=("tau",), contexts=[50]), tiny_pair, documents_of(900))
        assert len(written(job)) == len(rows) > 0

    def test_data_without_recurrence_works(self, tiny_pair, job):
        rows, said = executed(replace(job, measures=("tau",)), tiny_pair, documents_of(900))
        assert {row["kind"] for row in rows} == {"ordinary"}
        assert "note: the data has 0 of the 2 recurrence spans that were asked for" in said

    def test_both_kinds_of_spans(self, tiny_pair, job):
        copied = torch.cat([text_of(160)] * 4)
        rows, said = executed(replace(job, measures=("tau",)), tiny_pair, [Document("d", copied, None)])
        assert Counter(row["kind"] for row in rows) == {"ordinary": 8, "recurrence": 8}
        assert not [line for line in said if line.startswith("note")]

    def test_tau_needs_a_draft_cache(self, tiny_pair, job):
        job = replace(job, specs=parse_methods("ar,plain"))
        with pytest.raises(
            ValueError, match="tau needs a method with a draft of ours: full, window, retrieval or auto"
        ):
            executed(replace(job, measures=("tau",)), tiny_pair, documents_of(900))
        assert not job.out.exists()
        rows, said = executed(job, tiny_pair, documents_of(900))
        assert {row["measure"] for row in rows} == {"speed"}
        assert any(line.startswith("note: tau needs") for line in said)

    @pytest.mark.parametrize(
        ("load", "measures", "warned"), [(3, "speed", True), (0.1, "speed", False), (3, "tau", False)]
    )
    def test_a_busy_machine_is_warned_of(self, tiny_pair, job, monkeypatch, load, measures, warned):
        monkeypatch.setattr("os.getloadavg", lambda: (load * 4.0, 0.0, 0.0))
        monkeypatch.setattr("os.cpu_count", lambda: 4)
        rows, said = executed(replace(job, measures=(measures,), contexts=[50]), tiny_pair, documents_of(900))
        assert any(line.startswith(f"warning: load average {load * 4:.1f} on 4 cores") for line in said) is warned
        assert measures == "tau" or {row["load"] for row in rows} == {load * 4}

    def test_memory_gets_one_prompt_a_length_and_the_methods_as_written(self, tiny_pair, job, monkeypatch):
        asked = []

        def measure(loading, prompts, methods, new):
            asked.append(([(p.context, len(p.ids)) for p in prompts], methods, new))
            yield {"measure": "memory", "context": 9, "method": methods[0], "peak_bytes": 2**21, "before_bytes": 2**20}

        monkeypatch.setattr(memory, "measure", measure)
        rows, said = executed(replace(job, measures=("memory",)), tiny_pair, documents_of(900, 700))
        assert asked == [([(size, size)], [name], 6) for size in (100, 200) for name in ("ar", "full", "window")]
        assert len(written(job)) == len(rows) == 6
        assert said[-1].endswith(" 1 MiB above the loaded process")


TAU = {"measures": ("tau",)}


class TestMistakes:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"contexts": [100, 8190]}, "prompt of 8190 tokens plus max_new_tokens 6 exceeds the target's 8192 "
             "positions: at most 2 new tokens fit; lower --lengths or --max-new-tokens, which is 6"),
            (TAU | {"contexts": [100, 8180]}, "exceeds .*; lower --lengths or --span-tokens, which is 16"),
            ({"contexts": [20000]}, "no document has the 200.. tokens .* of 2 has 9000: give smaller --lengths"),
            (TAU | {"contexts": [20000]}, "for tau, no document has .* or leave tau out of --measure"),
            ({"specs": parse_methods("window:score_layer=3")}, "window:score_layer=3: score_layer must be below 3"),
            ({"specs": parse_methods("ar,auto:draft_context=16")}, "method auto:draft_context=16: draft_context 16"),
            ({"specs": parse_methods("full:depth=14")}, "method full:depth=14: --span-tokens 16 leaves no round for a "
             "tree that may emit 16 tokens after the first one; give at least 17"),
        ],
        ids=range(7),
    )  # fmt: skip
    def test_are_found_before_anything_is_measured(self, tiny_pair, job, monkeypatch, changes, message):
        monkeypatch.setattr(workbench.Workbench, "rows", lambda *args: pytest.fail("measured"))
        with pytest.raises(ValueError, match=message):
            executed(replace(job, **changes), tiny_pair, documents_of(9000, 8195))
        assert not job.out.exists()

    def test_the_deepest_tree_that_a_span_has_room_for(self, tiny_pair, job):
        specs = parse_methods("full:depth=14")
        job = replace(job, measures=("tau",), contexts=[100], span_tokens=17, specs=specs)
        rows, _ = executed(job, tiny_pair, documents_of(900))
        assert {row["steps"] for row in rows} == {1}


class TestPrompts:
    def test_labelled_files_give_their_rows_for_their_length(self, tiny_pair, job):
        documents = [
            Document(f"x_{label}.jsonl:{row}", text_of(size, row), label)
            for label, sizes in ((100, (300, 90, 100)), (200, (250,)), (None, (5000,)))
            for row, size in enumerate(sizes, 1)
        ]
        job = replace(job, measures=("speed",))
        prompts = planning.chosen_prompts(job, documents, print)
        assert [(prompt.name, prompt.context, len(prompt.ids)) for prompt in prompts] == [
            ("x_100.jsonl:1", 100, 100),
            ("x_100.jsonl:2", 100, 90),
            ("x_200.jsonl:1", 200, 200),
        ]
        assert torch.equal(prompts[0].ids, torch.cat([documents[0].ids[:84], documents[0].ids[-16:]]))
        with pytest.raises(ValueError, match="here has no file for length 2K; its files have --lengths 100,200"):
            executed(replace(job, contexts=[100, 2048]), tiny_pair, documents)

    def test_unlabelled_documents_give_nested_prompts(self, job):
        documents = documents_of(900, 150, 700)
        prompts = planning.chosen_prompts(replace(job, measures=("memory",), samples=3), documents, print)
        assert [prompt.context for prompt in prompts] == [100] * 3 + [200] * 3
        whole = {document.name: document.ids for document in documents}
        for short, long in zip(prompts[:3], prompts[3:], strict=True):
            assert short.name == long.name
            assert (len(short.ids), len(long.ids)) == (100, 200)
            assert torch.equal(long.ids[-100:], short.ids)
            name, position = short.name.split("@")
            assert torch.equal(whole[name][int(position) - 200 : int(position)], long.ids)
        assert len({prompt.name for prompt in prompts}) == 3

    def test_are_not_sought_where_only_tau_is_asked_for(self, job):
        assert planning.chosen_prompts(replace(job, measures=("tau",)), documents_of(500, label=512), print) == []


def test_tau_by_position_counts_every_round_once(tiny_pair, monkeypatch):
    monkeypatch.setattr(acceptance, "BUCKET", 16)
    ids = torch.randint(1, 60, (200,), generator=torch.Generator().manual_seed(0))
    span = Span("here", 100, ids, 64, 0.0, "ordinary")
    (row,) = acceptance.measure(tiny_pair, [span], [50], parse_methods("full"))
    assert len(row["by_position"]) == 4
    assert all(steps for _, steps in row["by_position"])
    assert [sum(column) for column in zip(*row["by_position"], strict=True)] == [row["emitted"], row["steps"]]
    (short,) = acceptance.measure(tiny_pair, [replace(span, length=24)], [50], parse_methods("full"))
    assert "by_position" not in short


class TestFacts:
    def test_the_commit_is_that_of_specx_wherever_it_runs(self, monkeypatch, tmp_path):
        here = facts._commit()
        subprocess.run(["git", "init", "-q", tmp_path], check=True)
        monkeypatch.chdir(tmp_path)
        assert facts._commit() == here

        def missing(*args, **kwargs):
            raise FileNotFoundError("git")

        monkeypatch.setattr(subprocess, "run", missing)
        assert facts._commit() == "unknown"

    def test_what_the_numbers_depend_on(self, tiny_pair, job):
        found = facts.facts_of("specx eval", "here", "some-name", tiny_pair)
        assert found["models"] == "target some-name, float32 on cpu; draft tiny, context 128 (the test)"
        assert runner.data_of(job) == (
            "here; 2 prompts a length for speed, one for memory, 6 new tokens; "
            "at most 2 spans of 16 tokens of each kind for tau"
        )
        assert "for tau" not in runner.data_of(replace(job, measures=("speed",)))


def speed_row(method, prompt, rate, context=512, **figures):
    return {
        "measure": "speed", "prompt": prompt, "context": context, "tokens": context, "method": method, "load": 0.1,
        "new": 9, "ttft_seconds": 0.5, "decode_tokens_per_second": rate, "distinct_4grams": 1.0, **figures,
    }  # fmt: skip


def ours(steps, emitted, policy="full", **times):
    return {
        "steps": steps, "emitted": emitted, "policy": policy, "draft_kv_tokens": 100, "refill": "recompute",
        "ms_draft": 10.0, "ms_verify": 20.0, "ms_retrieval": 0.0, "ms_other": 1.0, **times,
    }  # fmt: skip


def tau_row(method, place, context, emitted, steps, recurrence=0.0, kind="ordinary", policy=None):
    return {
        "measure": "tau", "kind": kind, "document": "d", "position": place, "recurrence": recurrence,
        "context": context, "method": method, "emitted": emitted, "emitted_text": 0, "steps": steps,
        "draft_kv_tokens": 9, "policy": policy or method.split(":")[0], "refill": "recompute",
    }  # fmt: skip


class TestTables:
    def cells(self, table):
        return [dict(zip(table.header, row, strict=True)) for row in table.rows]

    def test_ratios_are_to_the_faster_cache_prompt_by_prompt(self):
        rows = [
            speed_row("ar", "a", 10.0), speed_row("ar-static", "a", 20.0), speed_row("full", "a", 30.0, **ours(10, 20)),
            speed_row("ar", "b", 40.0), speed_row("ar-static", "b", 20.0),
            speed_row("full", "b", 120.0, **ours(30, 100)),
            speed_row("ar", "c", 10.0), speed_row("ar-static", "c", 10.0), speed_row("full", "c", 20.0, **ours(10, 30)),
        ]  # fmt: skip
        ar, static, full = self.cells(speed_table(rows))
        assert (ar["tokens/s"], static["tokens/s"], full["tokens/s"]) == ("10.0", "20.0", "30.0")
        # 10/20, 40/40, 10/10; 20/20, 20/40, 10/10; 30/20, 120/40, 20/10
        assert (ar["ratio"], static["ratio"], full["ratio"]) == ("1.00", "1.00", "2.00")
        assert full["tau"] == "3.00"  # 150 / 50, not the mean 2.78
        assert full["efficiency"] == "0.67"
        assert full["ms a step"] == "1.0, 2.0, 0.0, 0.1"  # medians of 1, 1/3, 1 and so on
        assert (full["draft cache"], full["prompts"], full["context"], full["first token s"]) == (
            "100",
            "3",
            "512",
            "0.50",
        )
        assert {ar[name] for name in ("tau", "efficiency", "ms a step", "draft cache", "same (margin)")} == {"-"}

    def test_a_prompt_of_one_length_is_no_base_for_another(self):
        rows = [speed_row("ar", "a", 10.0), speed_row("plain", "a", 30.0, context=1024, **ours(4, 4, "none"))]
        assert [(row["context"], row["method"], row["ratio"]) for row in self.cells(speed_table(rows))] == [
            ("512", "ar", "1.00"),
            ("1K", "plain", "-"),
        ]

    def test_exactness_is_counted_with_the_largest_margin(self):
        same, other = {"same": True, "margin": None}, {"same": False}
        rows = [
            speed_row("full", "a", 1.0, **same),
            speed_row("full", "b", 1.0, **other, margin=0.25),
            speed_row("full", "c", 1.0, **other, margin=0.00001),
            speed_row("auto", "a", 1.0, **same),
        ]
        assert [row["same (margin)"] for row in self.cells(speed_table(rows))] == ["1/3 (0.25)", "1/1"]

    def test_a_run_of_one_token_has_no_figures(self):
        rows = [speed_row("ar", "a", None), speed_row("full", "a", None, **ours(0, 0))]
        _, full = self.cells(speed_table(rows))
        assert {full[name] for name in ("tokens/s", "ratio", "tau", "efficiency", "ms a step")} == {"-"}

    def test_tau_is_pooled_and_differences_are_paired(self):
        runs = {
            ("full", 512): [(30, 10), (10, 10)], ("full", 2048): [(20, 10), (15, 10)],
            ("window", 512): [(30, 10), (20, 10)], ("window", 2048): [(30, 10), (40, 30)],
            ("auto:nodes=4", 512): [(60, 20), (10, 10)], ("auto:nodes=4", 2048): [(10, 10), (10, 10)],
        }  # fmt: skip
        rows = [
            tau_row(m, place, c, *run, recurrence=[0.1, 0.3][place])
            for (m, c), found in runs.items()
            for place, run in enumerate(found)
        ]
        taus, full, window = tau_tables(rows, "ordinary")
        assert taus.header == ["method", "512", "2K"]
        assert taus.rows == [["full", "2.00", "1.75"], ["window", "2.50", "1.75"], ["auto:nodes=4", "2.33", "1.00"]]
        assert taus.note.startswith("2 ordinary spans, nested prompts (same place and continuation); 20% of the tokens")
        assert (full.title, window.title) == ("tau against full, ordinary spans", "tau against window, ordinary spans")
        assert [row[0] for row in full.rows] == ["window", "auto:nodes=4"]
        assert [row[0] for row in window.rows] == ["full", "auto:nodes=4"]
        for table, base in ((full, "full"), (window, "window")):
            for row in table.rows:
                for context, cell in zip((512, 2048), row[1:], strict=True):
                    found = paired_bootstrap_tau(runs[base, context], runs[row[0], context], relative=True)
                    assert cell == f"{found.mean:+.1%} [{found.low:+.1%}, {found.high:+.1%}]"
        assert full.rows[0][1].startswith("+25.0% [+0.0%, +")

    def test_missing_cells_are_dashes(self):
        rows = [tau_row("full", 1, 512, 20, 10), tau_row("full", 1, 2048, 30, 10), tau_row("window", 1, 512, 10, 10)]
        taus, full, window = tau_tables(rows, "ordinary")
        assert taus.rows == [["full", "2.00", "3.00"], ["window", "1.00", "-"]]
        assert full.rows == [["window", "-50.0%", "-"]]  # of one span there is no interval
        assert window.rows == [["full", "+100.0%", "-"]]

    def test_spans_that_were_measured_in_part_are_left_out(self):
        rows = [tau_row(m, place, c, 20, 10) for place in (1, 2) for m in ("full", "window") for c in (512, 2048)]
        rows += [tau_row("full", 3, 512, 90, 10), tau_row("window", 3, 512, 90, 10), tau_row("full", 3, 2048, 90, 10)]
        rows += [tau_row(m, 4, c, 0, 0) for m in ("full", "window") for c in (512, 2048)]  # the text ended at once
        taus, full, _ = tau_tables(rows, "ordinary")
        assert taus.rows == [["full", "2.00", "2.00"], ["window", "2.00", "2.00"]]
        assert full.rows[0][1:] == ["+0.0% [+0.0%, +0.0%]"] * 2
        assert taus.note.startswith("2 ordinary spans (1 more, measured in part, are left out), ")
        assert tau_tables(rows[-4:], "ordinary") == []

    def test_another_policy_than_its_own_is_told(self):
        rows = [tau_row("retrieval:nodes=4", 1, 512, 20, 10, policy="window"), tau_row("auto", 1, 512, 20, 10)]
        assert tau_tables(rows, "ordinary")[0].note.endswith(" takes. retrieval:nodes=4 ran as window.")
        rows = [speed_row("plain", "a", 1.0, **ours(1, 1, "none")), speed_row("full", "a", 1.0, **ours(1, 2, "window"))]
        assert speed_table(rows).note.endswith(" full ran as window.")
        assert "ran as" not in speed_table(rows[:1]).note

    def test_memory_is_what_was_added(self):
        def row(method, context, peak):
            place = {"measure": "memory", "prompt": "a", "context": context, "method": method}
            return place | {"before_bytes": 100 * 2**20, "peak_bytes": peak * 2**20, "draft_kv_tokens": None}

        table = memory_table([row("ar", 2048, 350), row("ar", 512, 150), row("full", 512, 120)])
        assert table.header == ["method", "512", "2K"]
        assert table.rows == [["ar", "50", "250"], ["full", "20", "-"]]

    def test_a_table_for_whatever_was_measured(self):
        rows = [
            tau_row("full", 1, 512, 20, 10, kind="recurrence"), speed_row("ar", "a", 1.0),
            tau_row("full", 1, 512, 20, 10), tau_row("auto", 1, 512, 20, 10),
        ]  # fmt: skip
        assert [table.title for table in tables(rows)] == [
            "tau, recurrence spans", "tau, ordinary spans", "tau against full, ordinary spans", "Speed",
        ]  # fmt: skip
        assert tables([]) == []

    @pytest.mark.parametrize("width", [60, 200])
    def test_a_terminal_shows_every_character(self, width):
        methods = [f"retrieval:recent={n}:refill=gather" for n in (64, 65)]
        rows = [speed_row(method, "a", 12.5, **ours(10, 20, "retrieval")) for method in methods]
        console = Console(width=width, file=io.StringIO())
        console.print(speed_table(rows).shown())
        text = console.file.getvalue()
        assert "…" not in text
        if width == 200:
            assert all(method in text for method in methods)

    def test_markdown_is_a_table(self):
        lines = markdown({"command": "specx eval"}, [tau_row("full", 1, 512, 20, 10)]).splitlines()
        assert lines[:3] == ["# specx eval", "", "- command: specx eval"]
        assert lines[-3:] == ["| method | 512 |", "| --- | --- |", "| full | 2.00 |"]
        assert lines[-4] == ""
