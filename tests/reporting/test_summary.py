"""The headline table as CSV and LaTeX against hand-worked cases."""

from pathlib import Path

import pytest
from scipy import stats

from pipeline.csv_tables import read_csv
from pipeline.reporting.costs import Cost
from pipeline.reporting.runs import by_strategy, read_runs
from pipeline.reporting.summary import Accuracy, Row, amount, summarise, write_summary_csv, write_summary_tex
from tests.reporting.conftest import SEEDS, STRATEGIES

COST = Cost(images_seen=5000, images_attacked=4000, training=50_000, margins=22_000)


def rows(made: Path, seeds: tuple[int, ...] = SEEDS, rate: float | None = None) -> list[Row]:
    groups = by_strategy(read_runs(made / "manifests", made / "evaluations", STRATEGIES, seeds))
    return summarise(groups, dict.fromkeys(STRATEGIES, COST), 0.95, rate)


def test_a_row_has_the_mean_both_intervals_and_the_cost(made: Path) -> None:
    puma = rows(made, rate=10.0)[2]
    assert (puma.strategy, puma.num_seeds, puma.kept, puma.num_kept) == ("puma", 2, 0.8, 80)
    assert puma.robust.mean == pytest.approx(0.675)  # 0.70 and 0.65 of 20 images
    wanted = stats.ttest_1samp([0.7, 0.65], 0).confidence_interval(0.95)
    assert puma.robust.over_seeds == pytest.approx((wanted.low, wanted.high))
    wilson = stats.binomtest(18, 20).proportion_ci(0.95, method="wilson")
    assert rows(made, (0,))[2].clean == Accuracy(0.9, None, pytest.approx((wilson.low, wilson.high)))  # type: ignore[arg-type]
    assert puma.hours == 72_000 / 10 / 3600
    assert rows(made)[2].hours is None


@pytest.mark.parametrize(("value", "text"), [(0.0723456, "0.0723"), (2.0, "2"), (999.4, "999"), (1440.6, "1,441")])
def test_amounts_have_three_digits_or_all_before_the_point(value: float, text: str) -> None:
    assert amount(value) == text


def test_the_csv_leaves_empty_what_there_is_not(made: Path, tmp_path: Path) -> None:
    write_summary_csv(tmp_path / "summary.csv", rows(made, (0,)))
    found = read_csv(tmp_path / "summary.csv", ["strategy", "robust", "training_passes", "margin_passes"])
    assert [row["strategy"] for row in found] == list(STRATEGIES)
    assert (found[2]["robust"], found[2]["training_passes"], found[2]["margin_passes"]) == ("0.700000", "50000", "22000")
    assert found[2]["robust_seeds_low"] == found[2]["hours"] == ""


@pytest.mark.parametrize(("rate", "hours"), [(None, ""), (10.0, " & 2")])
def test_the_latex_table_is_one_row_per_strategy_and_escapes_names(
    made: Path, tmp_path: Path, rate: float | None, hours: str
) -> None:
    table = rows(made, rate=rate)
    named = Row(**(vars(table[2]) | {"strategy": "prune_easy"}))
    write_summary_tex(tmp_path / "summary.tex", [*table[:2], named])
    text = (tmp_path / "summary.tex").read_text()
    lines = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(lines) == 4
    assert lines[3].startswith(r"prune\_easy & 80 & 87.5 [55.7, 100.0] & 67.5 [35.7, 99.3] & 0.005 & 0.072" + hours)
    assert {line.count("&") for line in lines} == {5 + bool(rate)}
    assert r"\toprule" in text
