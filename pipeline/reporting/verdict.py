"""What the table says, in sentences and in differences to the baselines; every word follows from the outcomes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.reporting.intervals import Difference, paired_difference
from pipeline.reporting.runs import Run

Metric = Literal["clean", "robust"]
METRICS: tuple[Metric, ...] = ("clean", "robust")
BASELINES = ("none", "random")
Groups = Mapping[str, Sequence[Run]]  # strategy -> its runs, seeds in the same order


@dataclass(frozen=True)
class Comparison:
    """One strategy less one baseline."""

    clean: Difference
    robust: Difference


def difference(groups: Groups, ours: str, theirs: str, metric: Metric, confidence: float) -> Difference:
    """Paired over the test examples and seeds."""
    first, second = ([getattr(run, f"{metric}_outcomes") for run in groups[name]] for name in (ours, theirs))
    return paired_difference(first, second, confidence)


def compare_with_baselines(groups: Groups, confidence: float) -> dict[str, dict[str, Comparison]]:
    """Baseline -> strategy -> the strategy less the baseline, for the baselines that were run."""
    return {
        baseline: {
            name: Comparison(*(difference(groups, name, baseline, metric, confidence) for metric in METRICS))
            for name in groups
            if name != baseline
        }
        for baseline in BASELINES
        if baseline in groups
    }


def verdict(groups: Groups, confidence: float) -> list[str]:
    """Who is best, who cannot be told apart from the best, and who of those needs the least data."""
    sentences = []
    level: dict[str, list[str]] = {}
    for metric in ("robust", "clean"):
        means = {name: float(np.mean([getattr(run, metric) for run in group])) for name, group in groups.items()}
        best = max(means, key=lambda name: means[name])
        level[metric] = [n for n in groups if n == best or difference(groups, best, n, metric, confidence).sign == 0]
        rivals = [name for name in level[metric] if name != best]
        others = f"; {join(rivals)} cannot be told apart from it" if rivals else "; all others are lower"
        sentences.append(f"Highest {metric} accuracy: {best} with {means[best]:.1%}{others}.")
    fewest = min(level["robust"], key=lambda name: groups[name][0].manifest.kept)
    kept = groups[fewest][0].manifest.kept
    sentences.append(f"Least data among the most robust: {fewest} keeps {kept:.1%} of the training samples.")
    return sentences


def join(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
