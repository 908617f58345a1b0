"""Training curves of all runs, thinned to what a plot can show."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
from numpy.typing import NDArray

from pipeline.params import InputError
from pipeline.reporting.runs import need

Floats = NDArray[np.float64]

MAX_POINTS = 300  # of one curve
COLUMNS = ("step", "loss", "clean_accuracy", "robust_accuracy")
STEP_COLUMNS = ("step", "loss", "lr", "mean_eps")


@dataclass(frozen=True)
class Curve:
    """One run: `columns` (n,) by name, NaN where nothing was measured."""

    run: str
    strategy: str
    columns: dict[str, Floats]


def read_curve(path: Path, stage: str, columns: tuple[str, ...] = COLUMNS) -> dict[str, Floats]:
    """The named columns of a training.csv or steps.csv, thinned; an empty field is NaN.

    Raises:
        InputError: the file is missing or lacks a column.
    """
    convert = pacsv.ConvertOptions(column_types=dict.fromkeys(columns, pa.float64()), include_columns=list(columns))
    try:
        table = pacsv.read_csv(need(path, stage), convert_options=convert)
    except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
        raise InputError(
            f"{path}: wanted numbers in the columns {', '.join(columns)}: {error}; run `dvc repro {stage}`"
        ) from None
    return thin({name: table[name].to_numpy() for name in columns}, MAX_POINTS)


def thin(columns: dict[str, Floats], max_points: int) -> dict[str, Floats]:
    """At most max_points rows: of each piece of equal length the last step, the means of loss and eps, the last of the rest."""
    num_rows = len(columns["step"])
    if num_rows <= max_points:
        return columns
    pieces = np.array_split(np.arange(num_rows), max_points)
    summary = {"loss": mean_known, "mean_eps": mean_known}
    return {name: np.array([summary.get(name, last_known)(values[p]) for p in pieces]) for name, values in columns.items()}


def last_known(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known[-1]) if len(known) else float("nan")


def mean_known(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
