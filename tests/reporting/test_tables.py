"""Curves, sentences and tables against hand-worked cases."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binomtest

from pipeline.csv_tables import read_csv
from pipeline.reporting.curves import read_curve, thin
from pipeline.reporting.runs import Run, by_strategy, read_runs
from pipeline.reporting.tables import RESULTS, write_results
from pipeline.reporting.verdict import verdict
from tests.reporting.conftest import SEEDS, STRATEGIES


def test_short_curves_are_left_alone_and_gaps_are_nan(made: Path) -> None:
    curve = read_curve(made / "models" / "puma-0" / "training.csv", "train@puma-0")
    assert curve["step"].tolist() == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(curve["loss"], 1 / curve["step"], atol=1e-12)
    np.testing.assert_allclose(curve["clean_accuracy"], [np.nan, 0.54, np.nan, 0.58, np.nan])


def test_long_curves_keep_the_mean_loss_and_the_last_accuracy() -> None:
    gaps = np.array([np.nan, 0.5, np.nan, np.nan, 0.6, 0.7])
    found = thin({"step": np.arange(6.0), "loss": np.array([1, 2, 3, 5, 6, 7.0]), "clean_accuracy": gaps}, 3)
    assert found["step"].tolist() == [1, 3, 5]
    assert found["loss"].tolist() == [1.5, 4, 6.5]
    np.testing.assert_array_equal(found["clean_accuracy"], [0.5, np.nan, 0.7])


@pytest.fixture
def results(made: Path, tmp_path: Path) -> Path:
    write_results(tmp_path / "results.csv", read_runs(made / "manifests", made / "evaluations", STRATEGIES, SEEDS), 0.95)
    return tmp_path


def test_results_have_one_row_per_run(results: Path) -> None:
    lines = (results / "results.csv").read_text().splitlines()
    header = lines[0].split(",")
    assert header == [*RESULTS, "fgsm", "after_apgd-ce", "after_apgd-t"]
    row = dict(zip(header, lines[-1].split(","), strict=True))
    assert row["strategy"] == "puma"
    assert (row["kept"], row["num_kept"], row["num_total"]) == ("0.800000", "80", "100")
    assert (row["clean"], row["robust"], row["num_examples"], row["eps"]) == ("0.850000", "0.650000", "20", "8/255")
    wilson = binomtest(17, 20).proportion_ci(0.95, method="wilson")
    assert (row["clean_low"], row["clean_high"]) == (f"{wilson.low:.6f}", f"{wilson.high:.6f}")
    assert (row["checkpoint"], row["steps"], row["images_seen"]) == ("best", "5", "5000")
    assert (row["fgsm"], row["after_apgd-ce"], row["after_apgd-t"]) == ("0.750000", "0.750000", "0.650000")


def test_an_attack_that_only_some_runs_met_is_left_empty_for_the_others(made: Path, tmp_path: Path) -> None:
    runs = read_runs(made / "manifests", made / "evaluations", STRATEGIES, SEEDS)
    runs[1] = replace(runs[1], reference={"pgd-20-ce": 0.5})
    write_results(tmp_path / "results.csv", runs, 0.95)
    rows = read_csv(tmp_path / "results.csv", ["fgsm", "pgd-20-ce"])
    assert [(row["fgsm"], row["pgd-20-ce"]) for row in rows[:2]] == [("0.900000", ""), ("", "0.500000")]


def test_the_sentences_follow_the_outcomes(made: Path) -> None:
    groups = by_strategy(read_runs(made / "manifests", made / "evaluations", STRATEGIES, SEEDS))
    told = verdict(groups, 0.95)
    assert told[0] == "Highest robust accuracy: none with 77.5%; random and puma cannot be told apart from it."
    assert told[1] == "Highest clean accuracy: none with 97.5%; random and puma cannot be told apart from it."
    assert told[2].startswith("Least data of those not told apart in robust accuracy: puma keeps 80.0% of the training samples")
    assert told[2].endswith("points from none, which does not show that it is as robust.")
    assert len(told) == 3
    alone = verdict({"none": groups["none"]}, 0.95)
    assert alone == ["Highest robust accuracy: none with 77.5%.", "Highest clean accuracy: none with 97.5%."]


def with_outcomes(run: Run, robust: NDArray[np.bool_]) -> Run:
    return replace(run, robust=float(robust.mean()), robust_outcomes=robust, num_examples=len(robust))


def test_only_supported_differences_are_called_lower(made: Path) -> None:
    none, puma = (
        by_strategy(read_runs(made / "manifests", made / "evaluations", STRATEGIES, SEEDS))[n] for n in ("none", "puma")
    )
    rows = np.arange(400)
    far = {
        "none": [with_outcomes(run, rows < 300 + run.seed) for run in none],
        "puma": [with_outcomes(run, rows < 200 + run.seed) for run in puma],
    }
    assert verdict(far, 0.95)[0] == "Highest robust accuracy: none with 75.1%; puma is lower."
    assert verdict(far, 0.95)[2].endswith("none keeps 100.0% of the training samples and is itself the best.")
    one_seed = {name: group[:1] for name, group in far.items()}
    told = verdict(one_seed, 0.95)
    assert told[0] == "Highest robust accuracy: none with 75.0%; puma cannot be told apart from it."
    assert told[-1].startswith("One seed compares models, not strategies")
    many = far | {f"puma-{share}": far["puma"] for share in range(6)}
    assert verdict(many, 0.95)[0] == "Highest robust accuracy: none with 75.1%; 7 others are lower."
    unsteady = far | {"puma": [with_outcomes(run, rows < 120 + 160 * run.seed) for run in puma]}
    assert verdict(unsteady, 0.95)[0] == "Highest robust accuracy: none with 75.1%; puma cannot be told apart from it."


def test_which_strategy_is_best_is_judged_over_all_pairs_because_it_is_known_only_afterwards(made: Path) -> None:
    runs = read_runs(made / "manifests", made / "evaluations", ["none"], SEEDS)
    rows = np.arange(400)
    best, second = ([with_outcomes(run, rows < count + run.seed) for run in runs] for count in (300, 292))
    assert verdict({"a": best, "b": second}, 0.95)[0] == "Highest robust accuracy: a with 75.1%; b is lower."
    others = {f"b{index}": second for index in range(6)}
    assert "b5 cannot be told apart from it" in verdict({"a": best, **others}, 0.95)[0]
