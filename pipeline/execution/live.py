"""Figures of a running task as it goes: a CSV in the run store, for `dvc plots show`, and TensorBoard where that is asked for.
They hold how fast a machine was, so they are no part of an artifact."""

import csv
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.execution.progress import Report
from pipeline.params import InputError

FLUSH_EVERY_S = 2.0


@contextmanager
def live_table(path: Path) -> Iterator[Report]:
    """Yield a `Report` that appends rows to a CSV: images done, images per second since the row before, figures (empty where a
    row lacks one; a new one gets a column). A task that goes on from a checkpoint continues the table there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table: LiveTable | None = None

    def report(done: int, total: int, figures: dict[str, float] | None = None) -> None:  # noqa: ARG001
        nonlocal table
        if figures:
            table = table or LiveTable(path, done, figures)
            table.add(done, figures)

    try:
        yield report
    finally:
        if table:
            table.file.close()


class LiveTable:
    def __init__(self, path: Path, done: int, figures: dict[str, float]) -> None:
        """Continue the file at path with what comes after the first `done` images, or begin it."""
        self.path = path
        self.open(done, figures)
        self.done, self.time, self.flushed = done, math.nan, 0.0

    def open(self, done: int, figures: dict[str, float]) -> None:
        """Rewrite the file with its rows before `done` images, and columns for figures beside those that it has."""
        rows = []
        if self.path.is_file():
            with self.path.open(newline="") as file:
                rows = list(csv.DictReader(file))
        columns = list(dict.fromkeys(["images", "images_per_s", *(rows[0] if rows else ()), *figures]))
        work = self.path.with_name(f".{self.path.name}.tmp")
        with work.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(row for row in rows if int(row["images"] or 0) < done)
        work.replace(self.path)
        self.names, self.file = columns[2:], self.path.open("a", newline="")

    def add(self, done: int, figures: dict[str, float]) -> None:
        if not figures.keys() <= set(self.names):
            self.file.close()
            self.open(done, figures)
        now = time.monotonic()
        speed = (done - self.done) / (now - self.time) if now > self.time else math.nan
        values = [speed, *(figures.get(name, math.nan) for name in self.names)]
        self.file.write(",".join([str(done), *("" if math.isnan(value) else f"{value:.6g}" for value in values)]) + "\n")
        self.done, self.time = done, now
        if now - self.flushed >= FLUSH_EVERY_S:
            self.file.flush()
            self.flushed = now


@contextmanager
def tensorboard(folder: Path) -> Iterator[Report]:
    """Yield a `Report` that writes figures to a folder for TensorBoard, by images done.

    Raises:
        InputError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError(
            'execution.tensorboard: TensorBoard is not installed; install the extra ".[tensorboard]", or set it to null'
        ) from None
    writer: SummaryWriter | None = None

    def report(done: int, total: int, figures: dict[str, float] | None = None) -> None:  # noqa: ARG001
        nonlocal writer
        if figures:
            # What a killed task wrote after its checkpoint is dropped.
            writer = writer or SummaryWriter(str(folder), purge_step=done)
            for label, value in figures.items():
                writer.add_scalar(label, value, done)

    try:
        yield report
    finally:
        if writer:
            writer.close()
