"""Small CSV tables: every float with six decimals, so that equal numbers are equal bytes."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.params import InputError


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write rows; None is an empty field."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([f"{value:.6f}" if isinstance(value, float) else value for value in row] for row in rows)


def read_csv(path: Path, header: Sequence[str]) -> list[dict[str, str]]:
    """Rows as text by column.

    Raises:
        InputError: the file is missing, or lacks a column of header.
    """
    if not path.is_file():
        raise InputError(f"{path}: wanted an artifact of an earlier stage, found none; run `dvc repro`")
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in header if name not in (reader.fieldnames or [])]
        if missing:
            raise InputError(f"{path}: wanted the column {missing[0]}, got {reader.fieldnames}; run `dvc repro`")
        return list(reader)
