"""The numbers of the report as files: results.csv, metrics.json, plots/*.csv."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from pipeline.artifacts import write_json
from pipeline.csv_tables import write_csv
from pipeline.reporting.curves import COLUMNS, STEP_COLUMNS, Curve
from pipeline.reporting.distributions import MarginHistogram
from pipeline.reporting.intervals import wilson_interval
from pipeline.reporting.runs import Run, by_strategy

RESULTS = (
    *("strategy", "seed", "kept", "num_kept", "num_total"),
    *("clean", "clean_low", "clean_high", "robust", "robust_low", "robust_high"),
    *("num_examples", "norm", "eps", "checkpoint", "steps", "images_seen"),
)


def write_results(path: Path, runs: Sequence[Run], confidence: float) -> None:
    """One row per run, with Wilson intervals of both accuracies, and the accuracy under each attack: alone, and of AutoAttack
    after those before it."""
    alone, after = ({name: None for run in runs for name in getattr(run, kind)} for kind in ("reference", "attacks"))
    rows: list[tuple[object, ...]] = []
    for run in runs:
        clean = (run.clean, *wilson_interval(run.clean, run.num_examples, confidence))
        robust = (run.robust, *wilson_interval(run.robust, run.num_examples, confidence))
        kept = (run.manifest.kept, run.manifest.num_kept, run.manifest.num_total)
        cost = (run.train.get("steps"), run.train.get("images_seen"))
        attacked = (*(run.reference.get(name) for name in alone), *(run.attacks.get(name) for name in after))
        more = (run.num_examples, run.norm, run.eps, run.checkpoint, *cost, *attacked)
        rows.append((run.strategy, run.seed, *kept, *clean, *robust, *more))
    write_csv(path, (*RESULTS, *alone, *(f"after_{name}" for name in after)), rows)


def write_means(path: Path, runs: Sequence[Run]) -> None:
    """Per strategy the fraction kept and the accuracies, means over the seeds."""
    write_json(path, {strategy: means(group) for strategy, group in by_strategy(runs).items()})


def means(runs: Sequence[Run]) -> dict[str, float]:
    values: dict[str, list[float]] = {
        "kept": [run.manifest.kept for run in runs],
        "clean": [run.clean for run in runs],
        "robust": [run.robust for run in runs],
    }
    return {name: round(float(np.mean(value)), 6) for name, value in values.items()}


def write_plots(
    directory: Path,
    runs: Sequence[Run],
    curves: Sequence[Curve],
    steps: Sequence[Curve],
    margins: MarginHistogram,
    names: Mapping[str, str],
) -> None:
    """accuracy.csv, training.csv, steps.csv and margins.csv for `dvc plots`; names: what the sources are called."""
    directory.mkdir()
    write_csv(directory / "accuracy.csv", ("strategy", "seed", "clean", "robust"), [accuracy_row(run) for run in runs])
    write_csv(directory / "training.csv", ("run", *COLUMNS), [row for curve in curves for row in curve_rows(curve)])
    write_csv(directory / "steps.csv", ("run", *STEP_COLUMNS), [row for curve in steps for row in curve_rows(curve)])
    bins = [
        (names[source], float(margin), int(number))
        for source, count in margins.counts.items()
        for margin, number in zip(margins.centres, count, strict=True)
    ]
    write_csv(directory / "margins.csv", ("source", "margin", "count"), bins)


def accuracy_row(run: Run) -> tuple[str, int, float, float]:
    return run.strategy, run.seed, run.clean, run.robust


def curve_rows(curve: Curve) -> Iterator[tuple[object, ...]]:
    """One row per step; empty where nothing was measured."""
    for step, *values in zip(*curve.columns.values(), strict=True):
        yield curve.run, int(step), *(None if math.isnan(value) else float(value) for value in values)
