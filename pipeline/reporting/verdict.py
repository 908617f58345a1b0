"""What the table says, in sentences; every word follows from the outcomes."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from pipeline.reporting.intervals import Difference, SeedVariance, paired_difference, pooled_variance, simultaneous
from pipeline.reporting.runs import Run

Metric = Literal["clean", "robust"]
METRICS: tuple[Metric, ...] = ("clean", "robust")
TOLD = {1: "higher", -1: "lower", 0: "not told apart"}  # sign of a difference -> verdict
MOST_NAMES = 6  # of a list that can be read in a sentence
Groups = Mapping[str, Sequence[Run]]  # strategy -> its runs, seeds in the same order


def seed_variance(groups: Groups, metric: Metric) -> SeedVariance:
    """From seed to seed, pooled over all strategies."""
    return pooled_variance([getattr(run, metric) for run in group] for group in groups.values())


def difference(groups: Groups, ours: str, theirs: str, metric: Metric, confidence: float) -> Difference:
    """One strategy less another, paired over the test examples."""
    first, second = ([getattr(run, f"{metric}_outcomes") for run in groups[name]] for name in (ours, theirs))
    return paired_difference(first, second, confidence, seed_variance(groups, metric))


def verdict(groups: Groups, confidence: float) -> list[str]:
    """Who is best, who is lower, who cannot be told apart from the best, and who of those needs the least data. The best is
    known only afterwards, so these intervals hold together for all pairs."""
    sentences, each = [], simultaneous(confidence, len(groups))
    for metric in ("robust", "clean"):
        best = highest(groups, metric)
        others = {name: difference(groups, best, name, metric, each) for name in groups if name != best}
        lower = [name for name, found in others.items() if found.sign > 0]
        level = [name for name in others if name not in lower]
        parts = [f"Highest {metric} accuracy: {best} with {mean_of(groups[best], metric):.1%}"]
        named = join(lower) if len(lower) <= MOST_NAMES else f"{len(lower)} others"
        parts += [f"{named} {'is' if len(lower) == 1 else 'are'} lower"] if lower else []
        parts += [f"{join(level)} cannot be told apart from it"] if level else []
        sentences.append("; ".join(parts) + ".")
    if len(groups) > 1:
        sentences.append(least_data(groups, each))
        if min(len(group) for group in groups.values()) < 2:
            sentences.append("One seed compares models, not strategies: add seeds before you conclude anything.")
    return sentences


def least_data(groups: Groups, confidence: float) -> str:
    """Of the strategies that may be as robust as the best, that which keeps the least, and how far behind it may be."""
    best = highest(groups, "robust")
    behind = {name: difference(groups, name, best, "robust", confidence) for name in groups if name != best}
    level = [best] + [name for name, found in behind.items() if found.sign == 0]
    fewest = min(level, key=lambda name: groups[name][0].manifest.kept)
    kept = f"{fewest} keeps {groups[fewest][0].manifest.kept:.1%} of the training samples"
    told = f"Least data of those not told apart in robust accuracy: {kept}"
    if fewest == best:
        return f"{told} and is itself the best."
    found = behind[fewest]
    low, high = (f"{100 * value:+.1f}".replace("-", "−") for value in (found.low, found.high))
    return f"{told}; it is {low} to {high} points from {best}, which does not show that it is as robust."


def highest(groups: Groups, metric: Metric) -> str:
    return max(groups, key=lambda name: mean_of(groups[name], metric))


def mean_of(runs: Sequence[Run], metric: Metric) -> float:
    return float(np.mean([getattr(run, metric) for run in runs]))


def join(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
