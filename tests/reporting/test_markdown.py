"""The tables as Markdown against hand-worked cases, their place in a page, and the pages of this project."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.params import InputError
from pipeline.reporting.contrasts import Contrast, write_differences_csv
from pipeline.reporting.costs import Cost
from pipeline.reporting.intervals import Difference
from pipeline.reporting.markdown import Table, insert, markdown_table
from pipeline.reporting.summary import Accuracy, Row, write_summary_csv
from tests.conftest import ROOT

COST = Cost(images_seen=5000, images_attacked=4000, training=1_500_000, margins=250_000)
ROWS = [
    Row("none", 1, 1.0, 100, Accuracy(0.9, None, (0.7, 0.97)), Accuracy(0.5, None, (0.3, 0.7)), COST, None),
    Row("puma", 2, 0.704, 70, Accuracy(0.8, (0.75, 0.85), (0.6, 0.9)), Accuracy(0.6, (0.5, 0.7), (0.4, 0.8)), COST, None),
]
TABLE = """\
| strategy | seeds | kept | clean, % | robust, % | images, M | passes, M |
| --- | --- | --- | --- | --- | --- | --- |
| none | 1 | 100% | 90.0 [70.0, 97.0] | 50.0 [30.0, 70.0] | 0.005 | 1.75 |
| puma | 2 | 70% | 80.0 [75.0, 85.0] | 60.0 [50.0, 70.0] | 0.005 | 1.75 |
"""
CONTRAST = Contrast(
    "puma", "none", ["score", "eps"], 0.704, 1.0,
    Difference(-0.1, -0.15, -0.05, 0.0012, 0.99, 2), Difference(0.1, -0.05, 0.25, 0.5, 0.99, 2),
)  # fmt: skip
DIFFERENCES = """\
| contrast | differs in | kept | clean, points | clean, p | clean, verdict | robust, points | robust, p | robust, verdict |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
| puma less none | score, eps | 70% / 100% | -10.0 [-15.0, -5.0] | 0.0012 | lower | +10.0 [-5.0, +25.0] | 0.5 | not told apart |
"""


def test_a_line_has_the_interval_over_the_seeds_or_else_over_the_images(tmp_path: Path) -> None:
    write_summary_csv(tmp_path / "summary.csv", ROWS)
    assert markdown_table(tmp_path) == TABLE


def test_hours_are_a_column_where_they_are_known(tmp_path: Path) -> None:
    write_summary_csv(tmp_path / "summary.csv", [Row(**vars(row) | {"hours": 1234.5}) for row in ROWS])
    lines = markdown_table(tmp_path).splitlines()
    assert lines[0].endswith("| passes, M | hours |")
    assert lines[2].endswith("| 1.75 | 1,234 |")


def test_the_differences_are_a_table_too(tmp_path: Path) -> None:
    write_differences_csv(tmp_path / "differences.csv", [CONTRAST])
    assert markdown_table(tmp_path, "differences") == DIFFERENCES


def test_the_command_prints_either_table_and_writes_it_into_a_page(tmp_path: Path) -> None:
    write_summary_csv(tmp_path / "summary.csv", ROWS)
    write_differences_csv(tmp_path / "differences.csv", [CONTRAST])
    (tmp_path / "page.md").write_text("<!-- here -->\n<!-- /here -->\n")
    command = [sys.executable, "-m", "pipeline", "table", str(tmp_path)]
    for more, wanted in (([], TABLE), (["--table", "differences"], DIFFERENCES)):
        assert subprocess.run([*command, *more], capture_output=True, text=True, check=True, cwd=ROOT).stdout == wanted
    into = ["--table", "differences", "--into", str(tmp_path / "page.md"), "--name", "here"]
    subprocess.run([*command, *into], check=True, cwd=ROOT)
    assert (tmp_path / "page.md").read_text() == f"<!-- here -->\n{DIFFERENCES}<!-- /here -->\n"


def test_the_table_replaces_what_stands_in_its_place_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("a\n<!-- here -->\nold \\1\n<!-- /here -->\nb\n<!-- there -->\n<!-- /there -->\n")
    for _ in range(2):
        insert(page, "here", TABLE)
        assert page.read_text() == f"a\n<!-- here -->\n{TABLE}<!-- /here -->\nb\n<!-- there -->\n<!-- /there -->\n"
    with pytest.raises(InputError, match="wanted one place between <!-- nowhere -->"):
        insert(page, "nowhere", TABLE)


def stale(page: Path, results: Path) -> list[str]:
    """Names of the places in page, <!-- FOLDER --> or <!-- FOLDER-differences -->, that do not hold what the command `table`
    makes of results/FOLDER; those that have no such folder are of another report."""
    found = []
    for name, text in re.findall(r"<!-- ([\w-]+) -->\n(.*?)<!-- /\1 -->", page.read_text(), re.DOTALL):
        folder: Path = results / name
        table: Table = "summary"
        if not folder.is_dir() and name.endswith("-differences"):
            folder, table = results / name.removesuffix("-differences"), "differences"
        if (folder / f"{table}.csv").is_file() and text != markdown_table(folder, table):
            found.append(name)
    return found


@pytest.mark.parametrize("page", ["README.md", "results/README.md"])
def test_the_tables_of_the_pages_are_those_of_the_committed_results(page: str) -> None:
    if (ROOT / page).is_file():
        assert stale(ROOT / page, ROOT / "results") == [], "run `python -m pipeline table`, see README.md"


def test_a_table_that_was_typed_is_found(tmp_path: Path) -> None:
    write_summary_csv(tmp_path / "summary.csv", ROWS)
    write_differences_csv(tmp_path / "differences.csv", [CONTRAST])
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "study").symlink_to(tmp_path)
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in ("study", "study-differences", "elsewhere")))
    assert stale(page, tmp_path / "results") == ["study", "study-differences"]
    insert(page, "study", TABLE)
    insert(page, "study-differences", DIFFERENCES)
    assert stale(page, tmp_path / "results") == []
    page.write_text(page.read_text().replace("80.0 [75.0", "81.0 [75.0"))
    assert stale(page, tmp_path / "results") == ["study"]
