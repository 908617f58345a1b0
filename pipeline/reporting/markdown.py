"""The headline table of a report as Markdown, and its place in a page: generated, never typed."""

import re
from pathlib import Path

from pipeline import recipes
from pipeline.csv_tables import read_csv
from pipeline.params import InputError

ENDS = ("seeds_low", "seeds_high", "examples_low", "examples_high")
ACCURACIES = [name for metric in ("clean", "robust") for name in (metric, *(f"{metric}_{end}" for end in ENDS))]
COLUMNS = ("strategy", "seeds", "kept", "training_passes", "margin_passes", *ACCURACIES)


def markdown_table(summary: Path) -> str:
    """One line per strategy of a summary.csv: accuracies with the interval over the seeds if there are several, else over
    the test images, and the passes of one image forward and backward in millions, those of the margins included.

    Raises:
        InputError: there is no such file, or it is not a summary.
    """
    lines = ["| strategy | seeds | kept | clean | robust | million passes |", "|---|---|---|---|---|---|"]
    for row in read_csv(summary, COLUMNS):
        passes = (int(row["training_passes"]) + int(row["margin_passes"])) / 1e6
        cells = [row["strategy"], row["seeds"], f"{float(row['kept']):.0%}", accuracy(row, "clean"), accuracy(row, "robust")]
        lines.append(f"| {' | '.join(cells)} | {passes:.2f} |")
    return "\n".join(lines) + "\n"


def accuracy(row: dict[str, str], metric: str) -> str:
    over = "seeds" if row[f"{metric}_seeds_low"] else "examples"
    low, high = (float(row[f"{metric}_{over}_{end}"]) for end in ("low", "high"))
    return f"{100 * float(row[metric]):.1f} % ({100 * low:.1f} to {100 * high:.1f})"


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
