"""Uncertainty of accuracies: over the test examples, over the seeds, and of paired differences."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit
from scipy.stats import binomtest

Outcomes = NDArray[np.bool_]  # (num_examples,): which examples were classified correctly


@dataclass(frozen=True)
class SeedVariance:
    """Variance of an accuracy from seed to seed, pooled over strategies, and its degrees of freedom."""

    variance: float
    degrees: int


@dataclass(frozen=True)
class Difference:
    """A difference of two accuracies, its interval at `confidence`, and the p-value of the exact McNemar test."""

    mean: float
    low: float
    high: float
    p_value: float
    confidence: float
    num_seeds: int

    @property
    def sign(self) -> int:
        """1 or -1 where the strategies differ: the interval excludes zero, the test agrees and more than one seed was
        run. Else 0; one seed compares two models, which says nothing of the strategies."""
        if self.num_seeds < 2 or self.p_value > 1 - self.confidence:
            return 0
        return int(self.low > 0) - int(self.high < 0)


def z_score(confidence: float) -> float:
    """Half-width in standard errors of a two-sided normal interval."""
    return float(ndtri((1 + confidence) / 2))


def t_score(confidence: float, degrees: int) -> float:
    """As `z_score`, of Student's t."""
    return float(stdtrit(degrees, (1 + confidence) / 2))


def wilson_interval(accuracy: float, num_examples: int, confidence: float) -> tuple[float, float]:
    """Wilson score interval (1927) of an accuracy measured on num_examples independent examples."""
    z2 = z_score(confidence) ** 2
    centre = (accuracy + z2 / (2 * num_examples)) / (1 + z2 / num_examples)
    spread = np.sqrt(z2 * (accuracy * (1 - accuracy) / num_examples + z2 / (4 * num_examples**2))) / (1 + z2 / num_examples)
    return max(0.0, float(centre - spread)), min(1.0, float(centre + spread))


def seed_interval(accuracies: Sequence[float], confidence: float) -> tuple[float, float] | None:
    """Student's t-interval of the mean over the seeds, cut to [0, 1]; None for a single seed."""
    if len(accuracies) < 2:
        return None
    error = float(np.std(accuracies, ddof=1)) / len(accuracies) ** 0.5
    mean, half = float(np.mean(accuracies)), t_score(confidence, len(accuracies) - 1) * error
    return max(0.0, mean - half), min(1.0, mean + half)


def bonferroni(confidence: float, count: int) -> float:
    """Confidence of each of count intervals so that all hold together with the given one."""
    return 1 - (1 - confidence) / max(1, count)


def simultaneous(confidence: float, num_strategies: int) -> float:
    """As `bonferroni`, for the intervals of all pairs of strategies."""
    return bonferroni(confidence, comb(num_strategies, 2))


def pooled_variance(groups: Iterable[Sequence[float]]) -> SeedVariance:
    """Variance within the groups, each the accuracies of one strategy's seeds; no degrees of freedom with one seed each."""
    groups = list(groups)
    degrees = sum(len(group) - 1 for group in groups)
    squares = sum(float(np.var(group)) * len(group) for group in groups)
    return SeedVariance(squares / degrees if degrees else 0.0, degrees)


def paired_difference(
    ours: Sequence[Outcomes], theirs: Sequence[Outcomes], confidence: float, seeds: SeedVariance
) -> Difference:
    """Mean accuracy of ours minus theirs: one outcome array per seed, on the same examples in the same order.

    The half-widths of two t-intervals add in quadrature: over the examples, paired, and over the seeds, whose variance
    is the same for all strategies. The test is McNemar's on the examples where the two differ (over several seeds: where
    their numbers of successes do).
    """
    differences = np.array([a.astype(np.int8) - b.astype(np.int8) for a, b in zip(ours, theirs, strict=True)], dtype=np.float64)
    num_seeds, num_examples = differences.shape
    by_example = differences.mean(axis=0)
    error = float(by_example.std(ddof=1)) / num_examples**0.5 if num_examples > 1 else 0.0
    half = t_score(confidence, num_examples - 1) * error if num_examples > 1 else 0.0
    if num_seeds > 1 and seeds.degrees:
        half = float(np.hypot(half, t_score(confidence, seeds.degrees) * (2 * seeds.variance / num_seeds) ** 0.5))
    wins, losses = int((by_example > 0).sum()), int((by_example < 0).sum())
    p_value = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    mean = float(by_example.mean())
    return Difference(mean, mean - half, mean + half, p_value, confidence, num_seeds)
