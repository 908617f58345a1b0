"""The numbers of the report as files (results.csv, metrics.json, plots/*.csv) and on the terminal."""

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np
from rich.console import Console
from rich.table import Table

from pipeline.artifacts import write_json
from pipeline.csv_tables import read_csv, write_csv
from pipeline.reporting.curves import COLUMNS, STEP_COLUMNS, Curve
from pipeline.reporting.distributions import MarginHistogram
from pipeline.reporting.intervals import wilson_interval
from pipeline.reporting.runs import Run, by_strategy

TABLE_FOLLOWS = "PUMA_TABLE_FOLLOWS"  # the environment variable of stages whose caller prints the table at its end
HEADLINE = ("strategy", "seed", "kept", "clean", "robust")
RESULTS = (
    *("strategy", "seed", "kept", "num_kept", "num_total"),
    *("clean", "clean_low", "clean_high", "robust", "robust_low", "robust_high"),
    *("num_examples", "norm", "eps", "checkpoint", "steps", "images_seen"),
)


def write_results(path: Path, runs: Sequence[Run], confidence: float) -> None:
    """One row per run, with Wilson intervals of both accuracies."""
    rows = []
    for run in runs:
        clean = (run.clean, *wilson_interval(run.clean, run.num_examples, confidence))
        robust = (run.robust, *wilson_interval(run.robust, run.num_examples, confidence))
        kept = (run.manifest.kept, run.manifest.num_kept, run.manifest.num_total)
        cost = (run.train.get("steps"), run.train.get("images_seen"))
        rows.append(
            (run.strategy, run.seed, *kept, *clean, *robust, run.num_examples, run.norm, run.eps, run.checkpoint, *cost)
        )
    write_csv(path, RESULTS, rows)


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
    directory: Path, runs: Sequence[Run], curves: Sequence[Curve], steps: Sequence[Curve], margins: MarginHistogram
) -> None:
    """accuracy.csv, training.csv, steps.csv and margins.csv for `dvc plots`."""
    directory.mkdir()
    write_csv(directory / "accuracy.csv", ("strategy", "seed", "clean", "robust"), [accuracy_row(run) for run in runs])
    write_csv(directory / "training.csv", ("run", *COLUMNS), [row for curve in curves for row in curve_rows(curve)])
    write_csv(directory / "steps.csv", ("run", *STEP_COLUMNS), [row for curve in steps for row in curve_rows(curve)])
    bins = [(s, float(x), int(n)) for s, count in margins.counts.items() for x, n in zip(margins.centres, count, strict=True)]
    write_csv(directory / "margins.csv", ("source", "margin", "count"), bins)


def accuracy_row(run: Run) -> tuple[str, int, float, float]:
    return run.strategy, run.seed, run.clean, run.robust


def curve_rows(curve: Curve) -> Iterator[tuple[object, ...]]:
    """One row per step; empty where nothing was measured."""
    for step, *values in zip(*curve.columns.values(), strict=True):
        yield curve.run, int(step), *(None if math.isnan(value) else float(value) for value in values)


def print_headline(report: Path, file: TextIO | None = None) -> None:
    """Print the results of a report directory: a rich table on a terminal, aligned text elsewhere; then the HTML's path.

    Raises:
        InputError: there is no report yet.
    """
    file = file or sys.stdout
    rows = [headline(row) for row in read_csv(report / "results.csv", RESULTS)]
    if file.isatty():
        print_rich(rows, file)
    else:
        print_aligned(rows, file)
    print(report / "report.html", file=file)


def headline(row: dict[str, str]) -> list[str]:
    accuracies = [f"{100 * float(row[name]):.2f}%" for name in ("clean", "robust")]
    return [row["strategy"], row["seed"], f"{100 * float(row['kept']):.1f}%", *accuracies]


def print_rich(rows: Sequence[Sequence[str]], file: TextIO) -> None:
    table = Table(title="Test accuracy by strategy and seed")
    for name in HEADLINE:
        table.add_column(name, justify="left" if name == "strategy" else "right")
    for index, row in enumerate(rows):
        table.add_row(*row, end_section=index + 1 < len(rows) and rows[index + 1][0] != row[0])
    Console(file=file).print(table)


def print_aligned(rows: Sequence[Sequence[str]], file: TextIO) -> None:
    lines = [HEADLINE, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADLINE))]
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        print(line[0].ljust(widths[0]), *cells, sep="  ", file=file)
