"""What a run of the whole pipeline ends with on the terminal: every run if they are few, every strategy, the page's path."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from rich import box
from rich.console import Console
from rich.table import Table

from pipeline.csv_tables import read_csv
from pipeline.reporting.text_tables import IMAGES, summary_rows

TABLE_FOLLOWS = "PUMA_TABLE_FOLLOWS"  # the environment variable of stages whose caller prints the table at its end
MAX_RUNS = 12
RUN = ("strategy", "seed", "kept", "clean", "robust")


def print_headline(report: Path, file: TextIO | None = None) -> None:
    """Print the results of a report directory: rich tables on a terminal, aligned text elsewhere; then the HTML's path.

    Raises:
        InputError: there is no report yet.
    """
    file = file or sys.stdout
    show = print_rich if file.isatty() else print_aligned
    runs = run_rows(report / "results.csv")
    if len(runs) - 1 <= MAX_RUNS:
        show("Test accuracy of every run", runs, file)
    strategies = without(summary_rows(report / "summary.csv"), IMAGES)
    several = strategies[1][strategies[0].index("seeds")] != "1"
    over = "seeds" if several else "test images"
    show(f"Test accuracy (intervals over the {over}) and cost by strategy", strategies, file)
    print(report / "report.html", file=file)


def run_rows(results: Path) -> list[list[str]]:
    """Names, then one row per run."""
    found = [list(RUN)]
    for row in read_csv(results, RUN):
        accuracies = [f"{100 * float(row[name]):.2f}%" for name in ("clean", "robust")]
        found.append([row["strategy"], row["seed"], f"{100 * float(row['kept']):.1f}%", *accuracies])
    return found


def without(rows: list[list[str]], name: str) -> list[list[str]]:
    """Less a column, so that the rest fits on a terminal."""
    column = rows[0].index(name)
    return [row[:column] + row[column + 1 :] for row in rows]


def print_rich(title: str, rows: Sequence[Sequence[str]], file: TextIO) -> None:
    header, *body = rows
    table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for column, name in enumerate(header):
        table.add_column(name, justify="right" if column else "left", overflow="fold")
    for row in body:
        table.add_row(*row)
    Console(file=file).print(table, "")


def print_aligned(title: str, rows: Sequence[Sequence[str]], file: TextIO) -> None:
    print(title, file=file)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print(row[0].ljust(widths[0]), *cells, sep="  ", file=file)
    print(file=file)
