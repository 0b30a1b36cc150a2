"""Every reported figure against values worked out by hand, and intervals against what is known of them."""

import numpy as np
import pytest

from specx.eval.metrics import (
    Interval,
    acceptance_rates,
    bootstrap,
    bootstrap_median,
    bootstrap_tau,
    clear_of_zero,
    distinct_ngrams,
    efficiency,
    first_divergence,
    median_ratio,
    never_below,
    paired_bootstrap,
    paired_bootstrap_tau,
    pooled_tau,
    tau,
)


class TestTau:
    def test_one_run(self):
        assert tau([4, 1, 2, 3]) == 2.5
        assert tau([1, 1, 1]) == 1

    def test_pooled_runs_weigh_by_their_steps(self):
        assert pooled_tau([(12, 3), (8, 8)]) == 20 / 11  # the mean of 4 and 1 is 2.5
        assert pooled_tau([(12, 3), (0, 0)]) == 4

    @pytest.mark.parametrize("call", [lambda: tau([]), lambda: pooled_tau([]), lambda: pooled_tau([(0, 0)])])
    def test_without_steps(self, call):
        with pytest.raises(ValueError, match="at least one verification step; got none"):
            call()


def test_efficiency():
    assert efficiency(1.5, 3.0) == 0.5
    with pytest.raises(ValueError, match="tau must be positive; got 0"):
        efficiency(1.5, 0)


class TestMedianRatio:
    def test_by_hand(self):
        assert median_ratio([2, 9, 4], [1, 3, 4]) == 2
        assert median_ratio([2, 9], [1, 3]) == 2.5

    def test_is_of_pairs_not_of_medians(self):
        assert median_ratio([10, 1, 30], [1, 10, 30]) == 1

    @pytest.mark.parametrize("base", [0.0, -1.0])
    def test_a_base_to_divide_by(self, base):
        with pytest.raises(ValueError, match=rf"positive values to divide by; got {base}"):
            median_ratio([1, 1], [base, 2])


class TestBootstrap:
    def test_covers_the_mean_at_the_right_width(self):
        values = np.random.default_rng(3).normal(5, 2, 400)
        found = bootstrap(values.tolist())
        assert found.mean == pytest.approx(values.mean())
        error = values.std() / 20
        assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
        assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)

    def test_one_value_has_no_width(self):
        assert bootstrap([3.0]) == Interval(3.0, 3.0, 3.0)

    def test_two_values_by_hand(self):
        """A quarter of the samples hold the first twice, a quarter the second."""
        assert bootstrap([0.0, 10.0]) == Interval(5.0, 0.0, 10.0)

    @pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
    def test_values_that_have_no_mean(self, values):
        with pytest.raises(ValueError, match="at least one value, and finite ones; got"):
            bootstrap(values)

    def test_coverage(self):
        """About 95 of 100 intervals hold the true mean."""
        draws = np.random.default_rng(5).normal(1, 1, (200, 40))
        intervals = [bootstrap(draw.tolist(), resamples=500) for draw in draws]
        assert 0.88 <= np.mean([each.low <= 1 <= each.high for each in intervals]) <= 0.99


class TestPairedBootstrap:
    @pytest.mark.parametrize("relative", [False, True])
    def test_identical_inputs(self, relative):
        values = np.random.default_rng(0).uniform(1, 9, 31).tolist()
        assert paired_bootstrap(values, values, relative) == Interval(0.0, 0.0, 0.0)

    def test_pairing_takes_out_what_prompts_share(self):
        rng = np.random.default_rng(1)
        a = rng.uniform(1, 100, 50)
        b = a + 2 + rng.normal(0, 0.5, 50)
        found = paired_bootstrap(a.tolist(), b.tolist())
        assert found.low < 2 < found.high
        assert found.high - found.low < 0.4  # unpaired, the prompts' own spread would make it about 23
        assert clear_of_zero(found)

    def test_relative_by_hand(self):
        found = paired_bootstrap([1.0, 3.0], [1.5, 4.5], relative=True)
        assert found == Interval(0.5, 0.5, 0.5)
        assert paired_bootstrap([2.0, 2.0], [1.0, 2.0], relative=True) == Interval(-0.25, -0.5, 0.0)

    def test_relative_is_of_means_not_the_mean_of_ratios(self):
        assert paired_bootstrap([1.0, 9.0], [2.0, 9.0], relative=True).mean == pytest.approx(0.1)

    def test_seed(self):
        a, b = [1.0, 2.0, 4.0, 7.0, 5.0], [2.0, 2.0, 5.0, 6.0, 9.0]
        assert paired_bootstrap(a, b, resamples=50) == paired_bootstrap(a, b, resamples=50)
        assert paired_bootstrap(a, b, resamples=50) != paired_bootstrap(a, b, resamples=50, seed=1)

    def test_swapping_the_lists_turns_the_sign(self):
        a, b = [1.0, 2.0, 4.0], [2.0, 2.5, 3.0]
        one, other = paired_bootstrap(a, b), paired_bootstrap(b, a)
        assert one.mean == -other.mean
        assert (one.low, one.high) == pytest.approx((-other.high, -other.low))

    def test_relative_needs_a_positive_base(self):
        with pytest.raises(ValueError, match=r"positive values to divide by; got 0.0"):
            paired_bootstrap([0.0, 1.0], [1.0, 1.0], relative=True)
        assert paired_bootstrap([0.0, 0.0], [1.0, 1.0]) == Interval(1.0, 1.0, 1.0)

    def test_resamples(self):
        with pytest.raises(ValueError, match="resamples must be at least 1; got 0"):
            paired_bootstrap([1.0], [1.0], resamples=0)


class TestPairedBootstrapTau:
    def test_by_hand(self):
        # taus of one span each: 2 and 4 against 3 and 4; together 20 / 8 = 2.5 against 24 / 7
        a, b = [(12, 6), (8, 2)], [(12, 4), (12, 3)]
        found = paired_bootstrap_tau(a, b)
        assert found == Interval(pytest.approx(24 / 7 - 2.5), 0.0, 1.0)
        assert paired_bootstrap_tau(a, b, relative=True) == Interval(pytest.approx(24 / 7 / 2.5 - 1), 0.0, 0.5)

    @pytest.mark.parametrize("relative", [False, True])
    def test_identical_inputs(self, relative):
        runs = [(12, 4), (30, 11), (5, 5)]
        assert paired_bootstrap_tau(runs, runs, relative) == Interval(0.0, 0.0, 0.0)

    def test_covers_a_known_difference(self):
        rng = np.random.default_rng(2)
        a = [(int(rng.poisson(2.0 * 50)), 50) for _ in range(40)]
        b = [(int(rng.poisson(2.5 * 50)), 50) for _ in range(40)]
        found = paired_bootstrap_tau(a, b)
        assert found.low < 0.5 < found.high
        assert found.mean == pytest.approx(pooled_tau(b) - pooled_tau(a))
        assert clear_of_zero(found)

    @pytest.mark.parametrize("bad", [(0, 0), (0, 3), (3, 0)])
    def test_a_run_without_steps(self, bad):
        with pytest.raises(ValueError, match=rf"run 1 has {bad[0]} tokens of {bad[1]} steps.*out of both lists"):
            paired_bootstrap_tau([(4, 2), (4, 2)], [(4, 2), bad])


@pytest.mark.parametrize("call", [median_ratio, paired_bootstrap])
def test_lists_that_are_no_pairs(call):
    with pytest.raises(ValueError, match="lists of equal length; got 3 and 2 values"):
        call([1.0, 2.0, 3.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="at least one pair; got none"):
        call([], [])


def test_lists_of_runs_that_are_no_pairs():
    with pytest.raises(ValueError, match="got 1 and 2 values"):
        paired_bootstrap_tau([(2, 1)], [(2, 1), (2, 1)])
    with pytest.raises(ValueError, match="at least one pair; got none"):
        paired_bootstrap_tau([], [])


@pytest.mark.parametrize(
    ("interval", "answer"),
    [
        (Interval(0.0, -0.1, 0.1), True),
        (Interval(-0.03, -0.04, -0.02), True),
        (Interval(-0.03, -0.04, -0.0200001), False),
        (Interval(0.2, 0.1, 0.3), True),
        (Interval(-0.01, -0.015, -0.005), True),
        (Interval(-0.5, -0.6, -0.4), False),
        (Interval(0.0, float("nan"), float("nan")), False),
    ],
)
def test_never_below(interval, answer):
    assert never_below(interval) is answer


@pytest.mark.parametrize(("low", "answer"), [(0.001, True), (0.0, False), (-0.001, False)])
def test_clear_of_zero(low, answer):
    assert clear_of_zero(Interval(0.5, low, 1.0)) is answer


@pytest.mark.parametrize(
    ("ours", "theirs", "index"),
    [
        ([1, 2, 3], [1, 2, 3], None),
        ([], [], None),
        ([1, 2, 3], [1, 5, 3], 1),
        ([4], [5], 0),
        ([1, 2], [1, 2, 3], 2),
        ([1, 2, 3], [1, 2], 2),
        ([], [1], 0),
        ([1, 9], [1, 2, 3], 1),
    ],
)
def test_first_divergence(ours, theirs, index):
    assert first_divergence(ours, theirs) == index


@pytest.mark.parametrize(
    ("tokens", "n", "share"),
    [
        ([1, 2, 3, 4, 5], 4, 1.0),
        ([1, 1, 1, 1, 1, 1], 4, 1 / 3),
        ([1, 2, 1, 2, 1], 2, 0.5),
        ([1, 2, 3], 4, 1.0),
        ([], 4, 1.0),
        ([1, 1, 2], 1, 2 / 3),
    ],
)
def test_distinct_ngrams(tokens, n, share):
    assert distinct_ngrams(tokens, n) == share


def test_distinct_ngrams_of_no_tokens_each():
    with pytest.raises(ValueError, match="n must be at least 1; got 0"):
        distinct_ngrams([1], 0)


class TestAcceptanceRates:
    def test_by_hand(self):
        position, conditional = acceptance_rates({0: 5, 1: 2, 3: 3})
        assert position == pytest.approx([0.5, 0.3, 0.3])
        assert conditional == pytest.approx([5 / 10, 3 / 5, 3 / 3])
        assert acceptance_rates({0: 4}) == ([], [])

    def test_of_nothing(self):
        with pytest.raises(ValueError, match="at least one verification step"):
            acceptance_rates({})


class TestBootstraps:
    def test_a_median_lies_in_its_interval(self):
        found = bootstrap_median([1.0, 2.0, 3.0, 4.0, 100.0])
        assert found.mean == 3.0
        assert 1.0 <= found.low < found.mean < found.high <= 100.0
        assert bootstrap_median([2.0]) == Interval(2.0, 2.0, 2.0)

    def test_tau_is_pooled(self):
        found = bootstrap_tau([(10, 10), (30, 10), (4, 2)])
        assert found.mean == pytest.approx(2.0)
        assert 1.0 <= found.low < 2.0 < found.high <= 3.0
        for runs in ([], [(0, 0)]):
            with pytest.raises(ValueError, match="at least one step"):
                bootstrap_tau(runs)
