"""A loaded pair that measures units one after the other, in this process."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from specx.api import SpeculativeModel
from specx.eval import acceptance, memory, speed, traces
from specx.eval.methods import Spec, build, parse_methods
from specx.eval.units import Unit


@dataclass(frozen=True, slots=True)
class Task:
    """What every process that measures needs to know, as plain values.

    Attributes:
        loading: Arguments of `specx.load`.
        methods: As the user writes them.
        new: Tokens to generate.
        shared: How many processes measure at the same time.
        threads: Threads for torch; None: as it comes.
    """

    loading: dict[str, Any]
    methods: tuple[str, ...]
    new: int
    shared: int = 1
    threads: int | None = None

    @property
    def specs(self) -> list[Spec]:
        """The methods, parsed."""
        return parse_methods(",".join(self.methods))


class Workbench:
    """Measures units.

    Raises:
        ValueError: If a method does not fit the models.
    """

    def __init__(self, task: Task, model: SpeculativeModel) -> None:
        self.task, self.model, self.specs = task, model, task.specs
        self.methods = build(self.specs, model)
        self._warm = False

    def rows(self, unit: Unit) -> Iterator[dict[str, Any]]:
        """Yield the rows of a unit as they are known."""
        marks: dict[str, Any] = {"unit": unit.number}
        if self.task.shared > 1:
            marks["shared"] = self.task.shared
        for row in getattr(self, f"_{unit.measure}")(unit):
            yield marks | row

    def _speed(self, unit: Unit) -> Iterator[dict[str, Any]]:
        assert unit.prompt is not None
        if not self._warm:
            speed.warm(unit.prompt, self.methods, self.model)
            self._warm = True
        for row in speed.one(self.model, unit.prompt, self.methods, self.task.new, unit.turn):
            yield {"run": unit.run} | row

    def _memory(self, unit: Unit) -> Iterator[dict[str, Any]]:
        assert unit.prompt is not None
        assert unit.method is not None
        return memory.measure(self.task.loading, [unit.prompt], [unit.method], self.task.new)

    def _trace(self, unit: Unit) -> Iterator[dict[str, Any]]:
        assert unit.prompt is not None
        return traces.measure(self.model, unit.prompt, self.specs, self.task.new)

    def _tau(self, unit: Unit) -> Iterator[dict[str, Any]]:
        assert unit.span is not None
        return acceptance.measure(self.model, [unit.span], [unit.context], self.specs)
