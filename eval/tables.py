"""Tables of measured rows, once for Markdown and for the terminal."""

import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.table import Column
from rich.table import Table as Shown
from rich.text import Text

from specx.data.documents import short_length
from specx.eval.acceptance import BUCKET
from specx.eval.methods import ABLATION, POLICIES
from specx.eval.metrics import acceptance_rates, efficiency, paired_bootstrap_tau, pooled_tau
from specx.eval.summary import MOST_PLACES, accepted, place_of, plain_rates

Row = dict[str, Any]
PARTS = ("ms_draft", "ms_verify", "ms_retrieval", "ms_other")


@dataclass(frozen=True, slots=True)
class Table:
    """A title, a line that says how to read it, and cells."""

    title: str
    note: str
    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Return it as Markdown."""
        lines = [f"## {self.title}", "", self.note, "", self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join(line if isinstance(line, str) else f"| {' | '.join(line)} |" for line in lines) + "\n"

    def shown(self) -> Group:
        """Return it for a terminal."""
        table = Shown(*(Column(name, overflow="fold") for name in self.header), title=self.title)
        for row in self.rows:
            table.add_row(*row)
        return Group(table, Text(self.note), "")


def tables(rows: list[Row]) -> list[Table]:
    """Return the tables for whatever was measured."""
    made: list[Table] = []
    by = {name: [row for row in rows if row["measure"] == name] for name in ("tau", "speed", "memory")}
    for kind in dict.fromkeys(row["kind"] for row in by["tau"]):
        made += tau_tables([row for row in by["tau"] if row["kind"] == kind], kind)
    if by["speed"]:
        made.append(speed_table(by["speed"]))
        made += answers_table(by["speed"])
    for name, title in (("speed", "generations"), ("tau", "nested prompts")):
        made += places_table(by[name], title)
    if by["memory"]:
        made.append(memory_table(by["memory"]))
    return made


def markdown(facts: Row, rows: list[Row]) -> str:
    """Return the whole summary."""
    head = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    return "\n".join(["# specx eval", "", head, "", *(table.markdown() for table in tables(rows))])


def tau_tables(rows: list[Row], kind: str) -> list[Table]:
    """tau by context and method, and the paired differences of every method to `full` and `window`.

    Spans that were not measured everywhere, as the last one where somebody interrupted, would make cells differ by
    more than context and method; they are left out unless there are only such.
    """
    contexts, methods = _axes(rows)
    rows = [row for row in rows if row["emitted"] and row["steps"]]  # an end-of-text token may leave no step
    if not rows:
        return []
    found = Counter((row["document"], row["position"]) for row in rows)
    spans = [span for span, count in found.items() if count == len(contexts) * len(methods)] or list(found)
    left_out = f" ({len(found) - len(spans)} more, measured in part, are left out)" if len(spans) < len(found) else ""
    rows = [row for row in rows if (row["document"], row["position"]) in spans]
    cell: dict[tuple[str, int], dict[tuple[str, int], tuple[int, int]]] = {}
    for row in rows:
        cell.setdefault((row["method"], row["context"]), {})[row["document"], row["position"]] = (
            row["emitted"], row["steps"],
        )  # fmt: skip
    share = statistics.mean({(r["document"], r["position"]): r["recurrence"] for r in rows}.values())
    note = (
        f"{len(spans)} {kind} spans{left_out}, nested prompts (same place and continuation); {share:.0%} of the tokens "
        "can be copied only from beyond the draft's window. "
    )
    lines = [[method] + [_number(pooled_tau([*cell[method, c].values()])) if (method, c) in cell else "-"
              for c in contexts] for method in methods]  # fmt: skip
    names = [short_length(context) for context in contexts]
    made = [
        Table(
            f"tau, {kind} spans",
            note + "tau counts what the target, greedy, takes." + _became(rows),
            ["method", *names],
            lines,
        )
    ]
    for base in ("full", "window"):
        others = [method for method in methods if method != base]
        if base in methods and others:
            differences = [
                [m] + [_difference(cell.get((base, c), {}), cell.get((m, c), {})) for c in contexts] for m in others
            ]
            title, how = f"tau against {base}, {kind} spans", "Relative difference, paired 95 % bootstrap interval."
            made.append(Table(title, how, ["method", *names], differences))
    return made + position_tables(rows, kind)


def position_tables(rows: list[Row], kind: str) -> list[Table]:
    """tau by place in a long continuation, for every context length."""
    made = []
    contexts, methods = _axes(rows)
    for context in contexts:
        lines = []
        for method in methods:
            own = [
                r["by_position"] for r in rows if (r["context"], r["method"]) == (context, method) if "by_position" in r
            ]
            parts = [[run for run in column if run[1]] for column in zip(*own, strict=True)]
            lines.append([method, *(_number(pooled_tau(part)) if part else "-" for part in parts)])
        most = max(len(line) for line in lines) - 1
        if most:
            header = ["method", *(str(BUCKET * place) for place in range(most))]
            note = "Columns: tokens of the continuation before the rounds that are counted, up to the next column."
            made.append(Table(f"tau by position after a prompt of {context}, {kind} spans", note, header, lines))
    return made


def _became(rows: list[Row]) -> str:
    """Say which methods had to run under another policy than theirs."""
    found = {(row["method"], row["policy"]) for row in rows if row.get("policy") not in (None, "none")}
    policies = {policy: policy for policy in POLICIES} | {name: part[0] for name, part in ABLATION.items()}
    asked = {method: policies.get(method.split(":")[0]) for method, _ in found}
    return "".join(f" {m} ran as {policy}." for m, policy in sorted(found) if asked[m] not in (None, policy))


def _difference(base: dict[Any, tuple[int, int]], mine: dict[Any, tuple[int, int]]) -> str:
    shared = sorted(base.keys() & mine.keys())
    if not shared:
        return "-"
    found = paired_bootstrap_tau([base[key] for key in shared], [mine[key] for key in shared], relative=True)
    if len(shared) == 1:  # an interval without width would say that this is certain
        return f"{found.mean:+.1%}"
    return f"{found.mean:+.1%} [{found.low:+.1%}, {found.high:+.1%}]"


def speed_table(rows: list[Row]) -> Table:
    """Medians over prompts; ratios are taken prompt by prompt to the faster of the two caches of plain decoding."""
    contexts, methods = _axes(rows)
    base = plain_rates(rows)
    header = [
        "context", "method", "prompts", "tokens/s", "ratio", "tau", "efficiency", "first token s", "ms a step",
        "draft cache", "distinct", "same (margin)",
    ]  # fmt: skip
    lines = []
    for context in contexts:
        for method in methods:
            own = [r for r in rows if (r["context"], r["method"]) == (context, method)]
            if own:
                count = str(len({row["prompt"] for row in own}))
                lines.append([short_length(context), method, count, *_speed_cells(own, base)])
    note = (
        "Decode tokens/s without prefill, medians. ratio: to Hugging Face's plain decoding with the faster of its two "
        "caches, prompt by prompt. efficiency = ratio / tau. ms a step: draft, verify, retrieval, other. draft cache: "
        "its tokens in the end. distinct: share of 4-grams that are, low where the text loops. same: outputs equal to "
        "plain greedy decoding; margin: the target's largest top-1/top-2 logit distance where the others part."
        + _became(rows)
        + _shared(rows)
    )
    return Table("Speed", note, header, lines)


def _shared(rows: list[Row]) -> str:
    """Mark timings that were taken while others measured."""
    most = max((row.get("shared", 1) for row in rows), default=1)
    return f" {most} workers measured at the same time: these are not timings of a quiet machine." if most > 1 else ""


def answers_table(rows: list[Row]) -> list[Table]:
    """Outputs against reference answers: equal for exact methods, unless near-ties flipped."""
    made = []
    for key, title, digits in (("rouge_l", "ROUGE-L", 3), ("found", "Answers found", 2)):
        judged = [row for row in rows if key in row]
        if judged:
            contexts, methods = _axes(judged)
            cells = {
                (m, c): [row[key] for row in judged if (row["method"], row["context"]) == (m, c)]
                for m in methods
                for c in contexts
            }
            lines = [[m, *(_number(statistics.mean(cells[m, c]), digits) if cells[m, c] else "-" for c in contexts)]
                     for m in methods]  # fmt: skip
            note = "Means. Exact methods give the target's output, so equal figures are a check, not a merit."
            made.append(Table(title, note, ["method", *(short_length(c) for c in contexts)], lines))
    return made


def places_table(rows: list[Row], title: str) -> list[Table]:
    """How often drafted tokens are accepted, by their place in a step."""
    lines, most = [], 0
    contexts, methods = _axes(rows)
    for context in contexts:
        for method in methods:
            own = [row for row in rows if (row["context"], row["method"]) == (context, method)]
            histogram = accepted(own)
            if any(histogram):
                position, conditional = acceptance_rates(histogram)
                pairs = zip(position, conditional, strict=True)
                rates = [row["hit_rate"] for row in own if row.get("hit_rate") is not None]
                hit = f"{statistics.mean(rates):.0%}" if rates else "-"
                lines.append([short_length(context), method, hit, *(f"{p:.2f} ({c:.2f})" for p, c in pairs)])
                most = max(most, len(position))
    if not lines:
        return []
    header = ["context", "method", "retrieved", *(str(place) for place in range(1, most + 1))]
    note = (
        "Share of steps that accepted so many drafted tokens or more (of those that accepted one less, the share that "
        "did). retrieved: of the target's attention on chunks that no rule keeps, the share on those that were chosen."
    )
    if most > MOST_PLACES:
        header, note = header[: 3 + MOST_PLACES], f"{note} Places after {MOST_PLACES} are left out."
    padded = [(line + ["-"] * len(header))[: len(header)] for line in lines]
    return [Table(f"Acceptance by place, {title}", note, header, padded)]


def _speed_cells(own: list[Row], base: dict[tuple[Any, ...], float]) -> list[str]:
    rates = [row["decode_tokens_per_second"] for row in own if row["decode_tokens_per_second"]]
    keys = [place_of(row) for row in own if row["decode_tokens_per_second"]]
    ratios = [rate / base[key] for rate, key in zip(rates, keys, strict=True) if key in base]
    ratio = statistics.median(ratios) if ratios else None
    ours = [row for row in own if row.get("steps")]
    tau = pooled_tau([(row["emitted"], row["steps"]) for row in ours]) if ours else None
    split = [statistics.median(row[part] / row["steps"] for row in ours) for part in PARTS] if ours else []
    judged = [row for row in own if "same" in row]
    margins = [row["margin"] for row in judged if row["margin"] is not None]
    return [
        _number(_median(own, "decode_tokens_per_second"), 1),
        _number(ratio),
        _number(tau),
        _number(efficiency(ratio, tau) if ratio and tau else None),
        _number(_median(own, "ttft_seconds")),
        ", ".join(_number(each, 1) for each in split) or "-",
        _number(_median(own, "draft_kv_tokens"), 0),
        _number(_median(own, "distinct_4grams")),
        (f"{sum(row['same'] for row in judged)}/{len(judged)}" if judged else "-")
        + (f" ({max(margins):.3g})" if margins else ""),
    ]


def memory_table(rows: list[Row]) -> Table:
    """Peak memory a method and length, above what the process held before."""
    contexts, methods = _axes(rows)
    found = {(row["method"], row["context"]): row for row in rows}

    def cells(method: str, show: Callable[[Row], str]) -> list[str]:
        return [show(found[method, c]) if (method, c) in found else "-" for c in contexts]

    lines = [[m, *cells(m, lambda r: f"{(r['peak_bytes'] - r['before_bytes']) / 2**20:.0f}")] for m in methods]
    note = "MiB above what the loaded process held before, one process a cell."
    return Table("Peak memory", note, ["method", *(short_length(context) for context in contexts)], lines)


def _axes(rows: list[Row]) -> tuple[list[int], list[str]]:
    return sorted({row["context"] for row in rows}), list(dict.fromkeys(row["method"] for row in rows))


def _median(rows: list[Row], key: str) -> float | None:
    found = [row[key] for row in rows if row.get(key) is not None]
    return statistics.median(found) if found else None


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
