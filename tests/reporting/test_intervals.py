"""Intervals against SciPy and hand-worked cases."""

import numpy as np
import pytest
from scipy.stats import binomtest

from pipeline.reporting.intervals import paired_difference, spread_over_seeds, wilson_interval


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
@pytest.mark.parametrize(("correct", "num_examples"), [(0, 5), (5, 5), (1, 3), (288, 360), (9999, 10_000)])
def test_wilson_intervals_are_those_of_scipy(correct: int, num_examples: int, confidence: float) -> None:
    wanted = binomtest(correct, num_examples).proportion_ci(confidence, method="wilson")
    found = wilson_interval(correct / num_examples, num_examples, confidence)
    assert found == pytest.approx((wanted.low, wanted.high), abs=1e-12)


def test_a_single_seed_has_no_spread() -> None:
    assert spread_over_seeds([0.5]) is None
    assert spread_over_seeds([0.4, 0.6]) == pytest.approx(0.02**0.5)


def test_the_paired_difference_of_one_seed_is_worked_by_hand() -> None:
    ours, theirs = np.array([True, True, False, True]), np.array([True, False, False, False])
    found = paired_difference([ours], [theirs], 0.95)
    half_width = 1.959964 * (1 / 3 / 4) ** 0.5  # differences 0, 1, 0, 1 have the variance 1/3
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0.5 - half_width, 0.5 + half_width), abs=1e-6)
    assert found.sign == 0


def test_the_spread_of_the_seeds_widens_the_paired_difference() -> None:
    right, wrong = np.ones(4, bool), np.zeros(4, bool)
    found = paired_difference([right, right], [wrong, right], 0.95)
    assert found.mean == 0.5
    assert found.high - found.mean == pytest.approx(1.959964 * (0.5 / 2) ** 0.5)  # no variance over the examples


def test_equal_outcomes_do_not_differ_and_opposite_ones_do() -> None:
    outcomes = np.arange(10) < 7
    assert paired_difference([outcomes], [outcomes], 0.95).sign == 0
    assert paired_difference([np.ones(10, bool)], [np.zeros(10, bool)], 0.95).sign == 1
    assert paired_difference([np.zeros(10, bool)], [np.ones(10, bool)], 0.95).sign == -1
