"""The tables of a report as Markdown, and their place in a page: generated, never typed."""

import re
from pathlib import Path
from typing import Literal

from pipeline import recipes
from pipeline.params import InputError
from pipeline.reporting.text_tables import difference_rows, summary_rows

Table = Literal["summary", "differences"]


def markdown_table(report: Path, table: Table = "summary") -> str:
    """The table of a folder with summary.csv or differences.csv.

    Raises:
        InputError: there is no such file, or it is not that of a report.
    """
    header, *rows = {"summary": summary_rows, "differences": difference_rows}[table](report / f"{table}.csv")
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, ["---"] * len(header), *rows))


def insert(page: Path, name: str, text: str) -> None:
    """Replace what stands between the comments <!-- name --> and <!-- /name --> of page, which is written anew at once.

    Raises:
        InputError: the page does not exist, or has no such place.
    """
    before = page.read_text() if page.is_file() else ""
    place = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
    if len(place.findall(before)) != 1:
        raise InputError(f"{page}: wanted one place between <!-- {name} --> and <!-- /{name} -->, found none or several")
    recipes.write(page, place.sub(lambda found: found[1] + text + found[2], before))
