"""Actors of a Ray cluster measure at the same time; what a lost one had in hand is done again by another."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from specx.eval.pool import ATTEMPTS, Finished
from specx.eval.units import Unit, pack
from specx.eval.workbench import Task, Workbench

CORES = 4  # of one actor on a cluster without accelerators


class RayPool:
    """Actors, one an accelerator, or one for every `CORES` cores where there is none.

    Args:
        task: What they measure; every machine must be able to load its models by these names.
        address: Of the cluster, as `ray.init` takes it: "auto", "local", "ray://host:10001".
        count: How many actors; None: as many as the cluster has room for.

    Raises:
        RuntimeError: If the cluster cannot be reached.
    """

    def __init__(self, task: Task, address: str, count: int | None) -> None:
        import ray

        self._ray, self._mine = ray, not ray.is_initialized()
        if self._mine:
            try:
                ray.init(address=address, log_to_driver=False, include_dashboard=False)
            except Exception as error:
                raise RuntimeError(f"--ray {address}: the cluster cannot be reached ({_line(error)})") from error
        self.lost = 0
        there = ray.cluster_resources()
        gpus, cores = int(there.get("GPU", 0)), int(there.get("CPU", 1))
        self.count = count or gpus or max(1, cores // CORES)
        cpus = max(1, min(CORES, cores // self.count))
        self._options = {"num_gpus": 1} if gpus else {"num_cpus": cpus}
        self._task = replace(task, shared=self.count, threads=None if gpus else cpus)

    def run(self, units: Sequence[Unit]) -> Iterator[Finished]:
        """Yield every unit with its rows, in the order in which they are finished.

        Raises:
            RuntimeError: If an actor reports an error, or a unit has ended `ATTEMPTS` actors.
        """
        ray, todo = self._ray, deque((unit, 1) for unit in units)
        busy: dict[Any, tuple[Any, Unit, int]] = {}
        idle = [self._actor() for _ in range(min(self.count, len(units)))]
        try:
            while todo or busy:
                while todo and idle:
                    actor, (unit, attempt) = idle.pop(), todo.popleft()
                    busy[actor.answer.remote(pack(unit))] = actor, unit, attempt
                (ready,), _ = ray.wait(list(busy), num_returns=1)
                actor, unit, attempt = busy.pop(ready)
                try:
                    reply = ray.get(ready)
                except ray.exceptions.RayActorError as error:
                    self.lost += 1
                    if attempt >= ATTEMPTS:
                        raise RuntimeError(
                            f"{unit.measure} after {unit.context} tokens ended {ATTEMPTS} actors"
                        ) from error
                    todo.append((unit, attempt + 1))
                    idle.append(self._actor())
                    continue
                idle.append(actor)
                if "error" in reply:
                    raise RuntimeError(reply["error"])
                yield unit, reply["rows"]
        finally:
            self.close()

    def close(self) -> None:
        """End all actors and leave the cluster."""
        if self._mine:
            self._ray.shutdown()

    def _actor(self) -> Any:
        return self._ray.remote(**self._options)(_Actor).remote(self._task)


class _Actor:
    def __init__(self, task: Task) -> None:
        self._task = task
        self._bench: Workbench | None = None

    def answer(self, packed: dict[str, Any]) -> dict[str, Any]:
        from specx.eval import worker
        from specx.eval.units import unpack

        if self._bench is None:
            try:
                self._bench = worker.start(self._task)
            except Exception as error:
                return {"error": f"an actor cannot load the models: {_line(error)}"}
        return worker.answer(self._bench, unpack(packed))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
