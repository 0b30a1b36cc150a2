"""GPU suite, step: the parts of one step of a pair grown to large shapes, eager and by CUDA graphs."""

from collections.abc import Iterator
from functools import partial

from specx.eval.bench_step import StepBench, graph_trouble
from specx.eval.gpu_setup import Row, Setup, Task, free
from specx.eval.growth import PairShape, grown_pair, wrapped_pair
from specx.hf import HFModel


class Bed:
    """A grown pair and the long context that is measured behind, both made when they are first needed."""

    def __init__(self, setup: Setup, pair: PairShape) -> None:
        self.setup, self.pair = setup, pair
        self._benches: dict[bool, StepBench] = {}

    def pending(self, graphs: bool) -> float:
        """Return the seconds that making what is missing may take."""
        if graphs in self._benches:
            return 0.0
        return self.setup.load_seconds if not self._benches else self.setup.load_seconds / 4

    def bench(self, graphs: bool) -> StepBench:
        """Return the measuring bench with or without graphs; both run the same weights, one at a time."""
        if graphs not in self._benches:
            setup, old = self.setup, self._benches.popitem()[1].model if self._benches else None
            free(setup.device)
            if old is None:
                small = setup.bundled(setup.dtype, graphs)
                model = grown_pair(small, self.pair, setup.device, setup.dtype, graphs=graphs)
            else:
                assert old.draft is not None
                engines = [HFModel(each, graphs=graphs) for each in (old.target, old.draft.model.model)]  # type: ignore[attr-defined]
                model = wrapped_pair(old, self.pair, *engines)
            ids = setup.prompt(model.tokenizer, setup.lengths[-1])
            self._benches[graphs] = StepBench(model, ids, setup.repeats)
        return self._benches[graphs]


def tasks(setup: Setup) -> Iterator[Task]:
    """Yield the parts of a step: graphs first, and long contexts first, for shorter ones are their beginnings."""
    for pair in setup.pairs:
        bed = Bed(setup, pair)
        for graphs in (True, False):
            for length in reversed(setup.lengths):
                place = f"{pair.name} {'graphs' if graphs else 'eager'} L{length}"
                for nodes in setup.nodes:
                    run = partial(_verify, bed, graphs, length, nodes)
                    yield Task(f"verify {place} T{nodes}", run, "verify", about=2.0, extra=bed.pending(graphs))
                run = partial(_drafting, bed, graphs, length)
                yield Task(f"draft {place}", run, "draft", about=4.0, extra=bed.pending(graphs))
                run = partial(_loop, bed, graphs, length)
                yield Task(f"loop {place}", run, "loop", about=4.0, extra=bed.pending(graphs))
        del bed, run  # the next pair needs the memory
        free(setup.device)


def _verify(bed: Bed, graphs: bool, length: int, nodes: int) -> Row:
    bench = bed.bench(graphs)
    figures = bench.verify(length, nodes, bed.setup.bandwidth)
    return _facts(bed, graphs, length, "verify") | figures


def _drafting(bed: Bed, graphs: bool, length: int) -> Row:
    bench = bed.bench(graphs)
    figures = bench.drafting(length)
    return _facts(bed, graphs, length, "draft") | figures


def _loop(bed: Bed, graphs: bool, length: int) -> Row:
    bench = bed.bench(graphs)
    bench.loop(length, max(4, bed.setup.new // 4))  # captures what is captured
    figures = bench.loop(length, bed.setup.new)
    return _facts(bed, graphs, length, "loop") | figures


def _facts(bed: Bed, graphs: bool, length: int, part: str) -> Row:
    bench = bed.bench(graphs)
    engine, small = bench.engine, bench.model.draft
    return {
        "part": part, "pair": bed.pair.name, "graphs": graphs, "length": length, "backend": engine.backend,
        "backend_reason": engine.backend_reason, "no_graphs": graph_trouble(engine),
        "draft_no_graphs": graph_trouble(small.model), "bandwidth": bed.setup.bandwidth,  # type: ignore[union-attr]
    }  # fmt: skip
