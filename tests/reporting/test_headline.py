"""What is printed at the end, in a log and on a terminal, against hand-worked cases."""

import io
from pathlib import Path

import pytest

from pipeline.params import InputError
from pipeline.reporting.costs import Cost
from pipeline.reporting.headline import MAX_RUNS, print_headline
from pipeline.reporting.runs import by_strategy, read_runs
from pipeline.reporting.summary import summarise, write_summary_csv
from pipeline.reporting.tables import write_results
from tests.reporting.conftest import SEEDS, STRATEGIES

COST = Cost(images_seen=5000, images_attacked=4000, training=50_000, margins=22_000)
BY_STRATEGY = """\
Test accuracy (intervals over the seeds) and cost by strategy
strategy  seeds  kept            clean, %           robust, %  passes, M  hours
none          2  100%  97.5 [65.7, 100.0]  77.5 [45.7, 100.0]      0.072      2
random        2   90%  92.5 [60.7, 100.0]  72.5 [40.7, 100.0]      0.072      2
puma          2   80%  87.5 [55.7, 100.0]   67.5 [35.7, 99.3]      0.072      2

"""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def report(made: Path, tmp_path: Path) -> Path:
    runs = read_runs(made / "manifests", made / "evaluations", STRATEGIES, SEEDS)
    write_results(tmp_path / "results.csv", runs, 0.95)
    summary = summarise(by_strategy(runs), dict.fromkeys(STRATEGIES, COST), 0.95, 10.0)
    write_summary_csv(tmp_path / "summary.csv", summary)
    return tmp_path


def test_a_log_has_every_run_every_strategy_and_the_path_in_aligned_lines(report: Path) -> None:
    out = io.StringIO()
    print_headline(report, out)
    text = out.getvalue()
    runs = text.splitlines()[:8]
    assert runs[:3] == [
        "Test accuracy of every run",
        "strategy  seed    kept    clean  robust",
        "none         0  100.0%  100.00%  80.00%",
    ]
    assert runs[6:] == ["puma         0   80.0%   90.00%  70.00%", "puma         1   80.0%   85.00%  65.00%"]
    assert text.endswith(f"\n\n{BY_STRATEGY}{report / 'report.html'}\n")


def test_the_intervals_of_a_single_seed_are_over_the_test_images(made: Path, report: Path) -> None:
    runs = read_runs(made / "manifests", made / "evaluations", STRATEGIES, SEEDS[:1])
    write_summary_csv(report / "summary.csv", summarise(by_strategy(runs), dict.fromkeys(STRATEGIES, COST), 0.95, 10.0))
    out = io.StringIO()
    print_headline(report, out)
    assert "(intervals over the test images)" in out.getvalue()


def test_many_runs_are_left_to_the_report(report: Path) -> None:
    results = report / "results.csv"
    lines = results.read_text().splitlines(keepends=True)
    for count, shown in ((MAX_RUNS, True), (MAX_RUNS + 1, False)):
        results.write_text("".join([lines[0], *[lines[1]] * count]))
        out = io.StringIO()
        print_headline(report, out)
        assert ("Test accuracy of every run" in out.getvalue()) is shown
        assert BY_STRATEGY in out.getvalue()


def test_a_narrow_terminal_shows_every_number_whole(report: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = Terminal()
    print_headline(report, out)
    assert "─" in out.getvalue()
    assert " ".join(out.getvalue().split()).count("(intervals over the seeds)") == 1
    for cell in ("85.00%", "67.5 [35.7, 99.3]", "97.5 [65.7, 100.0]", "100%", "0.072"):
        assert cell in out.getvalue()


def test_without_a_report_there_is_nothing_to_print(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="results.csv"):
        print_headline(tmp_path)
