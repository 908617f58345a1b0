"""The headline table: one row per strategy, on the page, as CSV and as LaTeX."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.csv_tables import write_csv
from pipeline.reporting.costs import Cost, hours
from pipeline.reporting.intervals import seed_interval, wilson_interval
from pipeline.reporting.runs import Run
from pipeline.reporting.verdict import METRICS, Groups

Interval = tuple[float, float]


@dataclass(frozen=True)
class Accuracy:
    """Mean over the seeds; its t-interval over them (None for one seed); Wilson's over the examples, at this mean."""

    mean: float
    over_seeds: Interval | None
    over_examples: Interval


@dataclass(frozen=True)
class Row:
    """`hours` is None where no rate is given."""

    strategy: str
    num_seeds: int
    kept: float
    num_kept: int
    clean: Accuracy
    robust: Accuracy
    cost: Cost
    hours: float | None


def summarise(groups: Groups, costs: Mapping[str, Cost], confidence: float, passes_per_second: float | None) -> list[Row]:
    """One row per strategy, in the order of groups."""
    rows = []
    for name, runs in groups.items():
        clean, robust = (accuracy([getattr(run, metric) for run in runs], runs[0], confidence) for metric in METRICS)
        cost, kept = costs[name], runs[0].manifest
        time = hours(cost.passes, passes_per_second) if passes_per_second else None
        rows.append(Row(name, len(runs), kept.kept, kept.num_kept, clean, robust, cost, time))
    return rows


def accuracy(values: Sequence[float], run: Run, confidence: float) -> Accuracy:
    mean = float(np.mean(values))
    return Accuracy(mean, seed_interval(values, confidence), wilson_interval(mean, run.num_examples, confidence))


def write_summary_csv(path: Path, rows: Sequence[Row]) -> None:
    """Accuracies and intervals as fractions; empty where there is none."""
    header = ["strategy", "seeds", "kept"]
    for metric in METRICS:
        header += [metric, *(f"{metric}_{kind}_{end}" for kind in ("seeds", "examples") for end in ("low", "high"))]
    header += ["images_seen", "images_attacked", "training_passes", "margin_passes", "hours"]
    lines: list[list[object]] = []
    for row in rows:
        line: list[object] = [row.strategy, row.num_seeds, row.kept]
        for cell in (row.clean, row.robust):
            line += [cell.mean, *(cell.over_seeds or (None, None)), *cell.over_examples]
        cost = row.cost
        lines.append([*line, cost.images_seen, cost.images_attacked, cost.training, cost.margins, row.hours])
    write_csv(path, header, lines)


def write_summary_tex(path: Path, rows: Sequence[Row]) -> None:
    """A table for booktabs: accuracies in percent with their intervals, images seen and passes (those of the margins
    included) in millions, hours where they are known."""
    columns = {
        "strategy": [tex_name(row.strategy) for row in rows],
        "kept (\\%)": [f"{100 * row.kept:.0f}" for row in rows],
        "clean (\\%)": [tex_accuracy(row.clean) for row in rows],
        "robust (\\%)": [tex_accuracy(row.robust) for row in rows],
        "images seen ($10^6$)": [amount(row.cost.images_seen / 1e6) for row in rows],
        "passes ($10^6$)": [amount(row.cost.passes / 1e6) for row in rows],
    }
    if times := [amount(row.hours) for row in rows if row.hours is not None]:
        columns["hours"] = times
    write_tex(path, columns, "l" + "r" * (len(columns) - 1))


def write_tex(path: Path, columns: Mapping[str, Sequence[str]], column_format: str) -> None:
    import pandas as pd  # as heavy as the rest of the module together, and needed here alone

    path.write_text(pd.DataFrame(columns).to_latex(index=False, column_format=column_format))


def tex_name(name: str) -> str:
    """Escaped: the underscore is the only sign of LaTeX that names may have."""
    return name.replace("_", "\\_")


def amount(value: float) -> str:
    """Three digits, or all of them before the point."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def tex_accuracy(cell: Accuracy) -> str:
    """ "64.1 [60.2, 68.0]", the interval over the seeds if there are several, else over the examples."""
    low, high = cell.over_seeds or cell.over_examples
    return f"{100 * cell.mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
