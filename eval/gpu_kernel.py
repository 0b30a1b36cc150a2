"""GPU suite, kernel: attention over a long prefix and a tree, ours and others', beside a copy of the same bytes."""

from collections.abc import Iterator
from functools import partial

from specx.eval.bench import Problem, attention_row
from specx.eval.gpu_setup import Row, Setup, Task, free


def tasks(setup: Setup) -> Iterator[Task]:
    """Yield every way of attending at every size."""
    names = list(setup.contenders())
    for heads, groups in setup.kernel_heads:
        for length in setup.kernel_lengths:
            for rows in setup.nodes:
                problem = Problem(length, rows, heads, groups, setup.kernel_dim, setup.dtype)
                for name in names:
                    run = partial(_row, setup, problem, name)
                    yield Task(f"{name} L{length} T{rows} H{heads}/{groups}", run, name, about=3.0)
        free(setup.device)


def _row(setup: Setup, problem: Problem, name: str) -> Row:
    contender = setup.contenders()[name]
    found = attention_row(problem, contender, setup.device, setup.bandwidth, setup.repeats)
    return {"method": name, "bandwidth": setup.bandwidth, **found}
