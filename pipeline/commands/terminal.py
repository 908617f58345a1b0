"""How commands print: a table on a terminal, plain columns in a log, JSON for a script."""

import json
from collections.abc import Sequence
from datetime import timedelta

from rich.console import Console
from rich.markup import escape
from rich.table import Table

console = Console(highlight=False, soft_wrap=True)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], data: object, empty: str, as_json: bool) -> None:
    """A table on a terminal, plain columns in a log, JSON for a script; `empty` when there is nothing to show."""
    if as_json:
        print(json.dumps(data, indent=2))
    elif not rows:
        console.print(empty)
    elif console.is_terminal:
        table = Table(*header)
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
    else:
        widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
        for row in [header, *rows]:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def duration(seconds: float | None) -> str:
    return "" if seconds is None else str(timedelta(seconds=round(seconds)))


def size(num_bytes: int) -> str:
    unit, name = next(((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB")) if num_bytes >= unit), (1e3, "kB"))
    return f"{num_bytes / unit:.1f} {name}"
