"""The headline table as Markdown against a hand-worked case, and its place in a page."""

from pathlib import Path

import pytest

from pipeline.params import InputError
from pipeline.reporting.costs import Cost
from pipeline.reporting.markdown import insert, markdown_table
from pipeline.reporting.summary import Accuracy, Row, write_summary_csv

COST = Cost(images_seen=5000, images_attacked=4000, training=1_500_000, margins=250_000)
ROWS = [
    Row("none", 1, 1.0, 100, Accuracy(0.9, None, (0.7, 0.97)), Accuracy(0.5, None, (0.3, 0.7)), COST, None),
    Row("puma", 2, 0.704, 70, Accuracy(0.8, (0.75, 0.85), (0.6, 0.9)), Accuracy(0.6, (0.5, 0.7), (0.4, 0.8)), COST, None),
]
TABLE = """\
| strategy | seeds | kept | clean | robust | million passes |
|---|---|---|---|---|---|
| none | 1 | 100% | 90.0 % (70.0 to 97.0) | 50.0 % (30.0 to 70.0) | 1.75 |
| puma | 2 | 70% | 80.0 % (75.0 to 85.0) | 60.0 % (50.0 to 70.0) | 1.75 |
"""


def test_a_line_has_the_interval_over_the_seeds_or_else_over_the_images(tmp_path: Path) -> None:
    write_summary_csv(tmp_path / "summary.csv", ROWS)
    assert markdown_table(tmp_path / "summary.csv") == TABLE


def test_the_table_replaces_what_stands_in_its_place_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("a\n<!-- here -->\nold \\1\n<!-- /here -->\nb\n<!-- there -->\n<!-- /there -->\n")
    for _ in range(2):
        insert(page, "here", TABLE)
        assert page.read_text() == f"a\n<!-- here -->\n{TABLE}<!-- /here -->\nb\n<!-- there -->\n<!-- /there -->\n"
    with pytest.raises(InputError, match="wanted one place between <!-- nowhere -->"):
        insert(page, "nowhere", TABLE)
