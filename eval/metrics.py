"""What is reported, each figure defined once. Plain numbers in, plain numbers out; no model here.

A run is a pair (emitted, steps): the tokens that verification steps emitted, and how many such steps there were. The
token that the prefill gives counts in neither.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Run = tuple[int, int]
Floats = NDArray[np.float64]

RESAMPLES = 10_000
# "Never below" allows a relative interval to reach no higher than this far below zero.
TOLERANCE = 0.02


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean, or another estimate, with the bounds of its 95 % interval."""

    mean: float
    low: float
    high: float


def tau(emitted: Sequence[int]) -> float:
    """Return the tokens emitted a verification step, bonus tokens included.

    Args:
        emitted: Tokens of each step; the token that the prefill gives belongs to none.

    Raises:
        ValueError: If there is no step.
    """
    return pooled_tau([(int(sum(emitted)), len(emitted))])


def pooled_tau(runs: Sequence[Run]) -> float:
    """Return tau over several runs together: all tokens emitted over all steps, so that long runs weigh more.

    Raises:
        ValueError: If there is no step in any of them.
    """
    steps = sum(run[1] for run in runs)
    if not steps:
        raise ValueError("tau needs at least one verification step; got none: generate more tokens")
    return sum(run[0] for run in runs) / steps


def acceptance_rates(histogram: Mapping[int, int]) -> tuple[list[float], list[float]]:
    """Return how often drafted tokens are accepted by their place in a step, per position and conditional.

    Per position (vLLM's figure): the share of steps that accepted i tokens or more. Conditional: of the steps that
    accepted i - 1 or more, the share that accepted i.

    Args:
        histogram: {accepted drafted tokens: steps}.

    Raises:
        ValueError: If there is no step.
    """
    steps = sum(histogram.values())
    if not steps:
        raise ValueError("acceptance rates need at least one verification step; got none")
    reached = [sum(count for n, count in histogram.items() if n >= place) for place in range(max(histogram) + 1)]
    pairs = zip(reached[1:], reached, strict=False)
    return [each / steps for each in reached[1:]], [each / before for each, before in pairs]


def efficiency(speed_up: float, tau: float) -> float:
    """Return the part of tau that became speed: 1 if a step costs no more than a token of plain decoding.

    Raises:
        ValueError: If tau is not positive.
    """
    if not tau > 0:
        raise ValueError(f"tau must be positive; got {tau}")
    return speed_up / tau


def median_ratio(ours: Sequence[float], base: Sequence[float]) -> float:
    """Return the median over pairs of ours / base.

    Raises:
        ValueError: If the lists differ in length or are empty, or a base is not positive.
    """
    _check_pairs(len(ours), len(base))  # here, so that the message names them in this order
    other, mine = _paired_columns(base, ours, positive=True)
    return statistics.median((mine / other).tolist())


def bootstrap(a: Sequence[float], resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Return the mean with its 95 % percentile interval over resampled values.

    Raises:
        ValueError: If there is no value, or one is not finite.
    """
    sums = _resampled_sums(_column(a), resamples, seed)
    return _interval(sums[0] / len(a))


def bootstrap_median(a: Sequence[float], resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Return the median with its 95 % percentile interval over resampled values.

    Raises:
        ValueError: If there is no value, or one is not finite.
    """
    values = _column(a)[0]
    drawn = values[_draws(len(values), resamples, seed)]
    return _interval(np.concatenate([np.median(values)[None], np.median(drawn, axis=1)]))


def bootstrap_tau(runs: Sequence[Run], resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Return pooled tau with its 95 % percentile interval over resampled runs.

    Raises:
        ValueError: If there is no run, or one has no step.
    """
    if not runs or any(steps < 1 for _, steps in runs):
        raise ValueError(f"tau needs runs of at least one step each; got {list(runs)}")
    emitted, steps = _resampled_sums(np.array([*zip(*runs, strict=True)], dtype=np.float64), resamples, seed)
    return _interval(emitted / steps)


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], relative: bool = False, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Return mean(b) - mean(a) with its 95 % percentile interval over pairs, resampled together.

    One pair gives an interval without width, which says nothing.

    Args:
        a, b: The same prompts measured two ways, in the same order.
        relative: Return mean(b) / mean(a) - 1 instead.
        resamples: How many samples to draw, each of as many pairs as there are.
        seed: The same seed gives the same interval.

    Raises:
        ValueError: If the lists differ in length or are empty, a value is not finite, or `relative` has an `a` to
            divide by that is not positive.
    """
    sums = _resampled_sums(_paired_columns(a, b, positive=relative), resamples, seed)
    return _interval(_difference(sums[0] / len(a), sums[1] / len(a), relative))


def paired_bootstrap_tau(
    a: Sequence[Run], b: Sequence[Run], relative: bool = False, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Return the difference of two pooled taus, b's less a's, with its 95 % interval over spans resampled together.

    Args:
        a, b: Runs over the same spans, in the same order.
        relative, resamples, seed: As for `paired_bootstrap`.

    Raises:
        ValueError: If the lists differ in length or are empty, or a run has no step or no token.
    """
    _check_pairs(len(a), len(b))
    for number, (emitted, steps) in enumerate([*a, *b]):
        if emitted < 1 or steps < 1:
            raise ValueError(
                f"run {number % len(a)} has {emitted} tokens of {steps} steps, and tau needs at least one of each; "
                f"leave its span out of both lists"
            )
    columns = np.array([*zip(*a, strict=True), *zip(*b, strict=True)], dtype=np.float64)
    emitted_a, steps_a, emitted_b, steps_b = _resampled_sums(columns, resamples, seed)
    return _interval(_difference(emitted_a / steps_a, emitted_b / steps_b, relative))


def never_below(interval: Interval) -> bool:
    """Tell whether b is "never below" a, given their relative paired interval: it is not wholly below -2 %."""
    return interval.high >= -TOLERANCE


def clear_of_zero(interval: Interval) -> bool:
    """Tell whether the whole interval is above zero."""
    return interval.low > 0


def first_divergence(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Return the index of the first differing token, None for equal outputs.

    If one output is a beginning of the other, that index is the shorter one's length.
    """
    for index, (our, their) in enumerate(zip(ours, theirs, strict=False)):
        if our != their:
            return index
    return None if len(ours) == len(theirs) else min(len(ours), len(theirs))


def distinct_ngrams(tokens: Sequence[int], n: int = 4) -> float:
    """Return the share of distinct n-grams among all, 1.0 if there is none; loops, easy to draft, make it low.

    Raises:
        ValueError: If `n` is below 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1; got {n}")
    grams = [tuple(tokens[first : first + n]) for first in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def _difference(a: Floats, b: Floats, relative: bool) -> Floats:
    return b / a - 1 if relative else b - a


def _resampled_sums(columns: Floats, resamples: int, seed: int) -> Floats:
    """Sum columns over the sample itself, then over samples drawn from it with replacement.

    Args:
        columns: [K, n], n things measured K ways; a draw takes all K of one thing.

    Returns:
        [K, 1 + resamples].
    """
    drawn = _draws(columns.shape[1], resamples, seed)
    return np.concatenate([columns.sum(1)[:, None], columns[:, drawn].sum(2)], axis=1)


def _draws(count: int, resamples: int, seed: int) -> NDArray[np.int64]:
    """Return [resamples, count] indices below `count`."""
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1; got {resamples}")
    return np.random.default_rng(seed).integers(count, size=(resamples, count))


def _interval(estimates: Floats) -> Interval:
    """Return the first estimate, that of the sample itself, with the 2.5 % and 97.5 % quantiles of the others."""
    low, high = np.quantile(estimates[1:], [0.025, 0.975]).tolist()
    return Interval(float(estimates[0]), low, high)


def _paired_columns(a: Sequence[float], b: Sequence[float], positive: bool) -> Floats:
    """Return both lists as float64 [2, n]; `positive`: every `a` must be, because it is divided by."""
    _check_pairs(len(a), len(b))
    columns = np.concatenate([_column(a), _column(b)])
    if positive and not (columns[0] > 0).all():
        raise ValueError(f"a ratio needs positive values to divide by; got {float(columns[0].min())}")
    return columns


def _check_pairs(a: int, b: int) -> None:
    if a != b:
        raise ValueError(f"pairs need lists of equal length; got {a} and {b} values")
    if not a:
        raise ValueError("need at least one pair; got none")


def _column(values: Sequence[Any]) -> Floats:
    """Return values as float64 [1, n]."""
    column = np.asarray(values, dtype=np.float64)[None]
    if not column.size or not np.isfinite(column).all():
        raise ValueError(f"need at least one value, and finite ones; got {list(values)}")
    return column
