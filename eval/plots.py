"""What stands inside each chart of a report: one folder drawn into one axes."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from specx.data.documents import short_length
from specx.eval.results_folder import Results, Row
from specx.eval.summary import MOST_PLACES, PARTS

# Readable on white and on near-black; distinct in lightness too, for readers who see no colours.
COLOURS = ("#3b82d6", "#e0701a", "#1f9d63", "#c9447f", "#8b5fd0", "#0f9aa8", "#a8860b", "#d2453c", "#6f8f2f", "#5a6fb0")
BASE = "#8a8f98"
PART_COLOURS = {"draft": "#3b82d6", "verify": "#e0701a", "retrieval": "#1f9d63", "other": "#8a8f98"}
MARKERS = "osD^vPX*<>"
_BASELINES = ("ar", "ar-static", "plain", "hf-assisted", "hf-lookup")
_SHOWN_CHUNKS = 4096


class Palette:
    """Gives every method one colour and marker through all charts and folders."""

    def __init__(self, folders: Sequence[Results]) -> None:
        self.methods = list(dict.fromkeys(method for folder in folders for method in folder.methods))
        # The baselines share one colour, so that there are enough for the whole ablation.
        plain = [method for method in self.methods if method in _BASELINES]
        others = [method for method in self.methods if method not in plain]
        self._colours = dict.fromkeys(plain, BASE)
        self._colours |= {method: COLOURS[number % len(COLOURS)] for number, method in enumerate(others)}

    def style(self, method: str) -> dict[str, Any]:
        """Return what a line of a method looks like."""
        number = self.methods.index(method)
        return {"color": self._colours[method], "marker": MARKERS[number % len(MARKERS)], "markersize": 5}

    def colour(self, method: str) -> str:
        """Return its colour."""
        return self._colours[method]


def drawn_methods(name: str, folder: Results) -> list[str]:
    """Return the methods that a chart shows of a folder."""
    keys = {"tau": "tau", "speed": "speed_up", "memory": "peak_bytes_added", "accepted": "accepted_histogram"}
    return list(dict.fromkeys(each["method"] for each in figures_with(folder, keys[name])))


def figures_with(folder: Results, key: str) -> list[Row]:
    """Return figures that have a key; tau of nested prompts goes before that of generations."""
    found = [each for each in folder.figures if key in each]
    nested = [each for each in found if each["measure"] == "tau"]
    return nested or found


def _lines(axes: Any, figures: list[Row], key: str, palette: Palette, methods: list[str], label: str = "") -> None:
    """Draw one line a method, with its intervals, a little beside each other so that they do not hide."""
    for number, method in enumerate(methods):
        own = sorted((each for each in figures if each["method"] == method), key=lambda each: each["context"])
        if not own:
            continue
        shift = 1 + 0.03 * (number - (len(methods) - 1) / 2)
        x, mean = [each["context"] * shift for each in own], [each[key]["mean"] for each in own]
        spread = [[each[key]["mean"] - each[key]["low"] for each in own],
                  [each[key]["high"] - each[key]["mean"] for each in own]]  # fmt: skip
        dashed = {"linestyle": "--"} if label else {}
        axes.errorbar(x, mean, yerr=spread, linewidth=1.6, elinewidth=1, capsize=2.5, **palette.style(method), **dashed)


def _context_axis(axes: Any, contexts: Sequence[int], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [short_length(context) for context in contexts])
    axes.minorticks_off()
    axes.set_xlabel("context, tokens")
    axes.set_ylabel(label)
    axes.grid(axis="y", linewidth=0.6)
    axes.set_xlim(min(contexts) / 1.25, max(contexts) * 1.25)


def draw_tau(axes: Any, folder: Results, palette: Palette) -> None:
    figures, methods = figures_with(folder, "tau"), drawn_methods("tau", folder)
    for kind in dict.fromkeys(each.get("kind") for each in figures):
        own = [each for each in figures if each.get("kind") == kind]
        _lines(axes, own, "tau", palette, methods, "dashed" if kind == "recurrence" else "")
    _context_axis(axes, sorted({each["context"] for each in figures}), "tau, tokens a step")
    axes.set_ylim(bottom=1 if min(each["tau"]["low"] for each in figures) >= 1 else 0)


def draw_speed(axes: Any, folder: Results, palette: Palette) -> None:
    figures = figures_with(folder, "speed_up")
    _lines(axes, figures, "speed_up", palette, drawn_methods("speed", folder))
    _context_axis(axes, sorted({each["context"] for each in figures}), "times plain decoding")
    axes.axhline(1, linewidth=1, color=_ink(), linestyle=":")
    axes.set_ylim(bottom=0)


def draw_memory(axes: Any, folder: Results, palette: Palette) -> None:
    figures = figures_with(folder, "peak_bytes_added")
    for method in drawn_methods("memory", folder):
        own = sorted((each for each in figures if each["method"] == method), key=lambda each: each["context"])
        axes.plot([each["context"] for each in own], [each["peak_bytes_added"] / 2**20 for each in own],
                  linewidth=1.6, **palette.style(method))  # fmt: skip
    _context_axis(axes, sorted({each["context"] for each in figures}), "MiB above the loaded models")
    axes.set_ylim(bottom=0)


def draw_accepted(axes: Any, folder: Results, palette: Palette) -> None:
    """A histogram: the share of steps by how many drafted tokens they accepted, at the longest context."""
    figures = figures_with(folder, "accepted_histogram")
    longest, methods = max(each["context"] for each in figures), drawn_methods("accepted", folder)
    width = 0.84 / len(methods)
    for number, method in enumerate(methods):
        total = Counter[int]()
        for each in figures:
            if (each["method"], each["context"]) == (method, longest):
                for count, steps in each["accepted_histogram"].items():
                    total[min(int(count), MOST_PLACES)] += steps
        places = [count + (number - (len(methods) - 1) / 2) * width for count in total]
        shares = [steps / total.total() for steps in total.values()]
        axes.bar(places, shares, width * 0.92, color=palette.colour(method))
    axes.set_xlabel(f"drafted tokens accepted in a step ({MOST_PLACES}: or more), after {short_length(longest)}")
    axes.set_ylabel("share of steps")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", linewidth=0.6)
    axes.set_axisbelow(True)


def timed(folder: Results) -> list[Row]:
    return [each for each in folder.figures if "ms_per_step" in each]


def draw_parts(axes: Any, folder: Results, palette: Palette) -> None:
    figures = sorted(timed(folder), key=lambda each: -each["context"])
    contexts = list(dict.fromkeys(each["context"] for each in figures))
    place, labels, starts = 0.0, list[tuple[float, str]](), 0.0
    for context in contexts:
        own = [each for each in figures if each["context"] == context]
        for each in reversed(own):
            starts = 0.0
            for part in PARTS:
                axes.barh(place, each["ms_per_step"][part], left=starts, height=0.74, color=PART_COLOURS[part])
                starts += each["ms_per_step"][part]
            labels.append((place, f"{short_length(context)}  {short(each['method'], 28)}"))
            place += 1
        place += 0.5
    axes.set_yticks([at for at, _ in labels], [text for _, text in labels], fontsize=8)
    axes.set_xlabel("milliseconds a step")
    axes.grid(axis="x", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(y=0.02)


def mapped(folder: Results) -> Row | None:
    """Return the generation whose retrieval is mapped: of the longest prompt after which chunks were chosen."""
    traced = [row for row in folder.of("trace") if any(chunks for _, chunks in row["kept"])]
    return max(traced, key=lambda row: (row["context"], len(row["kept"]), row["method"] == "auto"), default=None)


def draw_map(axes: Any, folder: Results, palette: Palette) -> None:
    row = mapped(folder)
    assert row is not None
    tokens, size = row["tokens"] + sum(row["emitted"]), row["chunk_size"]
    whole = -(-tokens // size) * size  # the last chunk may be partial
    axes.imshow(map_image(row), aspect="auto", origin="lower", interpolation="nearest",
                extent=(0, len(row["emitted"]), 0, whole))  # fmt: skip
    axes.set_ylim(0, tokens)
    axes.set_xlabel(f"verification step ({row['method']} after {short_length(row['context'])})")
    axes.set_ylabel("place in the context, tokens")
    axes.axhline(row["tokens"], linewidth=0.8, linestyle=":", color=_ink())


def map_image(row: Row) -> Any:
    """Return [chunks, steps, RGBA]: which chunks the draft's cache held at each step, and why."""
    import numpy as np
    from matplotlib.colors import to_rgba

    size, steps = row["chunk_size"], len(row["emitted"])
    chunks = -(-(row["tokens"] + sum(row["emitted"])) // size)
    image = np.zeros((chunks, steps, 4))
    kept = dict(row["kept"])
    chosen, first, length = list[int](), 0, row["tokens"]
    for step, emitted in enumerate(row["emitted"]):
        if step in kept:
            chosen, first = kept[step], max(0, length - row["recent"]) // size
        image[: -(-row["sinks"] // size), step] = image[first : -(-(length + 1) // size), step] = to_rgba(BASE)
        image[chosen, step] = to_rgba(COLOURS[1])
        length += emitted
    stride = -(-chunks // _SHOWN_CHUNKS)
    return image[::stride]


def _ink() -> str:
    import matplotlib

    return matplotlib.rcParams["text.color"]


def short(text: str, most: int = 40) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
