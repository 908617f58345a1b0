"""Uncertainty of accuracies: over the test examples, over the seeds, and of paired differences."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

Outcomes = NDArray[np.bool_]  # (num_examples,): which examples were classified correctly


@dataclass(frozen=True)
class Difference:
    """A difference of two accuracies and its confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 where the interval excludes zero, else 0."""
        return int(self.low > 0) - int(self.high < 0)


def z_score(confidence: float) -> float:
    """Half-width in standard errors of a two-sided normal interval."""
    return float(ndtri((1 + confidence) / 2))


def wilson_interval(accuracy: float, num_examples: int, confidence: float) -> tuple[float, float]:
    """Wilson score interval (1927) of an accuracy measured on num_examples independent examples."""
    z2 = z_score(confidence) ** 2
    centre = (accuracy + z2 / (2 * num_examples)) / (1 + z2 / num_examples)
    spread = np.sqrt(z2 * (accuracy * (1 - accuracy) / num_examples + z2 / (4 * num_examples**2))) / (1 + z2 / num_examples)
    return max(0.0, float(centre - spread)), min(1.0, float(centre + spread))


def spread_over_seeds(values: Sequence[float]) -> float | None:
    """Sample standard deviation; None for a single seed."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def paired_difference(ours: Sequence[Outcomes], theirs: Sequence[Outcomes], confidence: float) -> Difference:
    """Mean accuracy of ours minus theirs: one outcome array per seed, on the same examples in the same order.

    The variances over the examples and, with several seeds, over the seeds add up.
    """
    differences = np.array([a.astype(np.int8) - b.astype(np.int8) for a, b in zip(ours, theirs, strict=True)], dtype=np.float64)
    num_seeds, num_examples = differences.shape
    variance = float(differences.mean(axis=0).var(ddof=1)) / num_examples if num_examples > 1 else 0.0
    if num_seeds > 1:
        variance += float(differences.mean(axis=1).var(ddof=1)) / num_seeds
    mean, spread = float(differences.mean()), z_score(confidence) * variance**0.5
    return Difference(mean, mean - spread, mean + spread)
