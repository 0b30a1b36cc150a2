"""Tables of the GPU suite's rows, with the aims beside the numbers."""

from collections.abc import Callable

from specx.data.documents import length_name
from specx.eval.gpu_rows import Row
from specx.eval.tables import Table

KERNEL_SHARE, KERNEL_FROM = 0.8, 15_000  # of the copy bandwidth, from this context on
VERIFY_RATIO, DRAFT_SHARE, EFFICIENCY = 1.25, 0.2, 0.7
GROWN = (
    "The pair is the bundled one grown to that shape: its cost is real; its acceptance is the small pair's on the text "
    "it was made for, not that of real models of this size. "
)


def markdown(rows: list[Row]) -> str:
    """Return the summary of whatever was measured."""
    facts = next((row for row in rows if row["section"] == "facts"), {})
    head = "\n".join(f"- {key}: {value}" for key, value in facts.items() if key != "section")
    return "\n".join(["# specx on a GPU", "", head, "", *(table.markdown() for table in tables(rows))])


def tables(rows: list[Row]) -> list[Table]:
    """Return a table for every section that has rows, the aims first, and what failed or was skipped last."""
    good = [row for row in rows if row.get("status") in ("ok", "wrong")]
    by: dict[str, list[Row]] = {}
    for row in good:
        by.setdefault(row["section"], []).append(row)
    makers: dict[str, Callable[[list[Row]], list[Table]]] = {
        "numbers": numbers, "step": step, "kernel": kernel, "end-to-end": end_to_end,
    }  # fmt: skip
    made = aims(by) + [table for name, maker in makers.items() if name in by for table in maker(by[name])]
    bad = [row for row in rows if row.get("status") not in ("ok", None)]
    if bad:
        lines = [[row["section"], row["name"], row["status"], _plain(_why(row))] for row in bad]
        note = "wrong: beyond what is allowed; failed: an error ended it; skipped: no time was left."
        made.append(Table("Wrong, failed or skipped", note, ["section", "row", "how", "why"], lines))
    return made


def aims(by: dict[str, list[Row]]) -> list[Table]:
    """What was aimed at beside the best-placed measurement of it, and whether it is met there."""
    steps, runs = by.get("step", []), by.get("end-to-end", [])
    kernels = [r for r in by.get("kernel", []) if r["method"] == "specx" and r["length"] >= KERNEL_FROM]
    verifies = [r for r in steps if r["part"] == "verify" and r["graphs"] and not r["no_graphs"]]
    runs = [r for r in runs if not r["no_graphs"] and not r["draft_no_graphs"]]
    longest = max((r["length"] for r in runs), default=0)
    autos = [r for r in runs if r["method"] == "auto"]
    checks = [
        (f"kernel: at least {KERNEL_SHARE:.0%} of the copy bandwidth from 16K", kernels, "share", KERNEL_SHARE, False),
        (f"verify: at most {VERIFY_RATIO} times its bytes' copy", verifies, "ratio", VERIFY_RATIO, True),
        (f"draft: at most {DRAFT_SHARE:.0%} of the loop", autos, "share_draft", DRAFT_SHARE, True),
        (f"efficiency: at least {EFFICIENCY} at the longest context", [r for r in autos if r["length"] == longest],
         "efficiency", EFFICIENCY, False),
    ]  # fmt: skip
    lines = []
    for text, rows, key, aim, below in checks:
        found = [row[key] for row in rows if row.get(key) is not None]
        if found:
            met = sum(value <= aim if below else value >= aim for value in found)
            worst, best = (max, min) if below else (min, max)
            lines.append([text, f"{met} of {len(found)}", f"{best(found):.2f}", f"{worst(found):.2f}"])
    return [Table("Aims", "Rows that meet them.", ["aim", "met", "best", "worst"], lines)] if lines else []


def numbers(rows: list[Row]) -> list[Table]:
    """Errors beside what is allowed; outputs beside Hugging Face's."""
    made = []
    kernels = [row for row in rows if row["check"] not in ("output", "backend")]
    if kernels:
        lines = [[r["name"], f"{r['error']:.2g}", f"{r['allowed']:.2g}", _number(r.get("error_lse"), "{:.1g}"),
                  r["status"]] for r in kernels]  # fmt: skip
        note = "Largest error against float64 over the largest value; of the log-sum-exp, itself."
        made.append(Table("Kernels", note, ["kernel", "error", "allowed", "of the log-sum-exp", "verdict"], lines))
    probes = [[r["name"], r["trouble"] or "right on small inputs"] for r in rows if r["check"] == "backend"]
    if probes:
        made.append(Table("Backends", "Each is tried before it is taken.", ["backend", "found"], probes))
    outputs = [row for row in rows if row["check"] == "output"]
    if outputs:
        lines = [[r["name"], r["backend"], r["no_graphs"] or "yes", f"{r['same']} of {r['of']}", f"{r['error']:.2g}",
                  _number(r["first_difference"], "{}")] for r in outputs]  # fmt: skip
        note = (
            "Greedy outputs of the bundled pair equal to `model.generate`; margin: the largest top-1/top-2 distance of "
            "Hugging Face's logits where others part, with the first such token. In float32 it must be below 1e-4."
        )
        header = ["output", "backend", "graphs", "same", "margin", "first difference"]
        made.append(Table("Outputs", note, header, lines))
    return made


def step(rows: list[Row]) -> list[Table]:
    """Verify beside the copy of its bytes; the other parts; the loop."""
    made = []
    verifies = [r for r in rows if r["part"] == "verify"]
    if verifies:
        lines = [[r["pair"], length_name(r["length"]), _how(r), r["backend"], str(r["nodes"]), _ms(r["ms"]),
                  _ms(r["ms_bytes"]), f"{r['ratio']:.2f}", r["no_graphs"] or ""]
                 for r in verifies]  # fmt: skip
        note = (
            f"{GROWN}ms: one forward of the target; of a copy: what copying as many bytes as weights and prefix have "
            f"takes at the measured {verifies[0]['bandwidth'] / 1e9:.0f} GB/s (read and written, both counted)."
        )
        header = ["pair", "context", "how", "backend", "nodes", "ms", "of a copy", "ratio", "why no graph"]
        made.append(Table("Verify", note, header, lines))
    drafts = [r for r in rows if r["part"] == "draft"]
    if drafts:
        keys = ("ms_level", "ms_tree", "ms_scores", "ms_select", "ms_refresh")
        lines = [[r["pair"], length_name(r["length"]), _how(r), *(_ms(r[key]) for key in keys),
                  str(r["draft_kv_tokens"])] for r in drafts]  # fmt: skip
        header = ["pair", "context", "how", "level", "tree", "scores", "select", "refill", "draft cache"]
        note = f"Milliseconds of one level and one tree of the draft, and of the parts of one retrieval. {GROWN}"
        made.append(Table("Draft and retrieval", note, header, lines))
    loops = [r for r in rows if r["part"] == "loop"]
    if loops:
        lines = [[r["pair"], length_name(r["length"]), _how(r), *_split(r), _number(r["tau"])] for r in loops]
        header = ["pair", "context", "how", "draft", "verify", "retrieval", "rest", "draft share", "tau"]
        note = f"Milliseconds a step, with waits between the parts. {GROWN}"
        made.append(Table("Loop", note, header, lines))
    return made


def kernel(rows: list[Row]) -> list[Table]:
    """Attention alone: one line a size, one column a way."""
    names = list(dict.fromkeys(row["method"] for row in rows))
    sizes: dict[tuple[int, int, int, int], dict[str, Row]] = {}
    for row in rows:
        sizes.setdefault((row["heads"], row["groups"], row["length"], row["rows"]), {})[row["method"]] = row
    lines = [
        [f"{heads}/{groups}", length_name(length), str(count), *(_cell(found.get(name)) for name in names)]
        for (heads, groups, length, count), found in sizes.items()
    ]
    note = (
        f"Milliseconds of one layer (share of the copy bandwidth, {rows[0]['bandwidth'] / 1e9:.0f} GB/s; * not by CUDA "
        f"graph); head dim {rows[0]['dim']}, {rows[0]['dtype']}; on a GPU keys and values are cold."
    )
    return [Table("Attention", note, ["heads", "context", "nodes", *names], lines)]


def end_to_end(rows: list[Row]) -> list[Table]:
    """Whole generations."""
    lines = [[
        r["pair"], length_name(r["length"]), r["method"], r["backend"], _number(r["tokens_per_second"], "{:.1f}"),
        _number(r["speed_up"]), _number(r["tau"]), _number(r.get("efficiency")),
        *(_split(r) if "ms_draft" in r else ["-"] * 5), "same" if r["differs_at"] is None else str(r["differs_at"]),
    ] for r in rows]  # fmt: skip
    header = ["pair", "context", "method", "backend", "tokens/s", "speed-up", "tau", "efficiency", "draft", "verify",
              "retrieval", "rest", "draft share", "differs at"]  # fmt: skip
    note = (
        f"{GROWN}Decode tokens/s without prefill. speed-up: over `plain`, one token a step by the same engine, static "
        "shapes and graphs included. efficiency = speed-up / tau. Milliseconds a step by part, from a run with waits. "
        "differs at: the first token that is not plain's; kernels of different shapes round differently."
    )
    return [Table("End to end", note, header, lines)]


def _why(row: Row) -> str:
    if "message" in row:
        return row["message"]
    return f"error {row.get('error')}, allowed {row.get('allowed')}; {row.get('trouble') or ''}".removesuffix("; ")


def _how(row: Row) -> str:
    if not row["graphs"]:
        return "eager"
    return "not captured" if row["no_graphs"] or row["draft_no_graphs"] else "graphs"


def _split(row: Row) -> list[str]:
    parts = [_ms(row[part]) for part in ("ms_draft", "ms_verify", "ms_retrieval", "ms_other")]
    return [*parts, _number(row["share_draft"], "{:.0%}")]


def _cell(row: Row | None) -> str:
    return "-" if row is None else f"{_ms(row['ms'])} ({row['share']:.0%}{'' if row['graph'] else '*'})"


def _ms(value: float) -> str:
    return f"{value:.3g}"


def _number(value: float | None, form: str = "{:.2f}") -> str:
    return "-" if value is None else form.format(value)


def _plain(text: str) -> str:
    """A bar would end a cell."""
    return text.replace("|", "/")
