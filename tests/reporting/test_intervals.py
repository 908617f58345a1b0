"""Intervals against SciPy and hand-worked cases."""

from math import comb

import numpy as np
import pytest
from scipy import stats

from pipeline.reporting.intervals import (
    SeedVariance,
    paired_difference,
    pooled_variance,
    seed_interval,
    simultaneous,
    wilson_interval,
)

NO_SEEDS = SeedVariance(0.0, 0)


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
@pytest.mark.parametrize(("correct", "num_examples"), [(0, 5), (5, 5), (1, 3), (288, 360), (9999, 10_000)])
def test_wilson_intervals_are_those_of_scipy(correct: int, num_examples: int, confidence: float) -> None:
    wanted = stats.binomtest(correct, num_examples).proportion_ci(confidence, method="wilson")
    found = wilson_interval(correct / num_examples, num_examples, confidence)
    assert found == pytest.approx((wanted.low, wanted.high), abs=1e-12)


def test_the_interval_over_the_seeds_is_that_of_scipy_and_one_seed_has_none() -> None:
    values = [0.42, 0.5, 0.47]
    wanted = stats.ttest_1samp(values, 0.5).confidence_interval(0.9)
    assert seed_interval(values, 0.9) == pytest.approx((wanted.low, wanted.high), abs=1e-12)
    assert seed_interval([0.5], 0.9) is None
    assert seed_interval([0.0, 1.0], 0.95) == (0.0, 1.0)  # cut to what an accuracy can be


def test_the_variance_within_strategies_is_the_error_of_a_one_way_anova() -> None:
    groups = [[0.1, 0.2, 0.4], [0.6, 0.5, 0.5]]
    found = pooled_variance(groups)
    between = 3 * np.var([np.mean(group) for group in groups], ddof=1)  # F is the mean square between over that within
    assert found.variance == pytest.approx(between / stats.f_oneway(*groups).statistic)
    assert found.degrees == 4
    assert pooled_variance([*groups, [0.9]]) == found
    assert pooled_variance([[0.5], [0.7]]) == SeedVariance(0.0, 0)


def test_the_paired_difference_of_one_seed_is_the_paired_t_interval_of_scipy() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.random(50) < 0.8, rng.random(50) < 0.6
    found = paired_difference([ours], [theirs], 0.95, NO_SEEDS)
    wanted = stats.ttest_rel(ours.astype(float), theirs.astype(float)).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))
    assert found.mean == ours.mean() - theirs.mean()
    wins, losses = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    tail = sum(comb(wins + losses, k) for k in range(min(wins, losses) + 1)) / 2 ** (wins + losses)
    assert found.p_value == pytest.approx(min(1.0, 2 * tail))  # McNemar's exact test


def test_the_spread_of_the_seeds_widens_the_paired_difference() -> None:
    right, wrong = np.ones(4, bool), np.zeros(4, bool)
    found = paired_difference([right, right], [wrong, right], 0.95, SeedVariance(0.02, 3))
    assert found.mean == 0.5
    assert found.high - found.mean == pytest.approx(stats.t.ppf(0.975, 3) * 0.02**0.5)  # no variance over the examples


def test_equal_outcomes_do_not_differ_and_opposite_ones_do() -> None:
    outcomes, seeds = np.arange(10) < 7, SeedVariance(1e-6, 2)
    ones, zeros = [np.ones(10, bool)] * 2, [np.zeros(10, bool)] * 2
    assert paired_difference([outcomes] * 2, [outcomes] * 2, 0.95, seeds).sign == 0
    assert paired_difference(ones, zeros, 0.95, seeds).sign == 1
    assert paired_difference(zeros, ones, 0.95, seeds).sign == -1


def test_one_seed_and_a_handful_of_examples_support_no_difference() -> None:
    assert paired_difference([np.ones(500, bool)], [np.zeros(500, bool)], 0.95, NO_SEEDS).sign == 0
    few, none = [np.arange(40) < 5] * 2, [np.zeros(40, bool)] * 2  # five examples, all of one side: McNemar's p is 1 / 16
    found = paired_difference(few, none, 0.95, SeedVariance(0.0, 2))
    assert found.low > 0
    assert found.p_value == pytest.approx(1 / 16)
    assert found.sign == 0


@pytest.mark.parametrize(("num_seeds", "seed_spread"), [(2, 0.0), (2, 0.03), (2, 0.08), (4, 0.03)])
def test_two_equal_strategies_are_called_different_no_more_often_than_promised(num_seeds: int, seed_spread: float) -> None:
    rng, calls, num_experiments = np.random.default_rng(0), 0, 400
    for _ in range(num_experiments):
        difficulty = rng.random(300)
        level = 0.7 + seed_spread * rng.normal(size=(2, num_seeds, 1))  # each seed's model is better or worse as a whole
        outcomes = (rng.random((2, num_seeds, 300)) + difficulty) / 2 < level
        seeds = pooled_variance(list(outcomes.mean(axis=2)))
        calls += paired_difference(list(outcomes[0]), list(outcomes[1]), 0.95, seeds).sign != 0
    assert stats.binomtest(calls, num_experiments, 0.05, "greater").pvalue > 0.01


def test_all_pairs_share_the_error_among_them() -> None:
    assert simultaneous(0.95, 2) == pytest.approx(0.95)
    assert simultaneous(0.95, 4) == pytest.approx(1 - 0.05 / 6)
    assert simultaneous(0.95, 1) == pytest.approx(0.95)
