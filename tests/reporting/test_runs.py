"""Reading the evaluated runs, and what is said when something is missing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.params import InputError
from pipeline.reporting.curves import read_curve
from pipeline.reporting.runs import by_strategy, radius, read_runs
from tests.reporting.conftest import SEEDS, STRATEGIES


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    for name in ("manifests", "evaluations"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


def read(root: Path) -> None:
    read_runs(root / "manifests", root / "evaluations", STRATEGIES, SEEDS)


def test_runs_come_in_the_order_of_the_parameters(made: Path) -> None:
    runs = read_runs(made / "manifests", made / "evaluations", STRATEGIES, SEEDS)
    assert [run.name for run in runs] == ["none-0", "none-1", "random-0", "random-1", "puma-0", "puma-1"]
    assert {name: len(group) for name, group in by_strategy(runs).items()} == {"none": 2, "random": 2, "puma": 2}
    last = runs[-1]  # 20 images, 3 wrong, 5 after apgd-ce, 7 after apgd-t; 20 of 100 rows pruned
    assert (last.clean, last.robust, last.attacks) == (0.85, 0.65, {"apgd-ce": 0.75, "apgd-t": 0.65})
    assert (last.manifest.kept, last.manifest.reasons) == (0.8, {"kept": 80, "high_margin": 20})
    assert last.robust_outcomes.tolist() == [False] * 7 + [True] * 13


@pytest.mark.parametrize(
    ("path", "stage"),
    [
        ("evaluations/puma-1/metrics.json", "evaluate@puma-1"),
        ("evaluations/puma-1/samples.parquet", "evaluate@puma-1"),
        ("manifests/random/summary.json", "manifest@random"),
        ("manifests/random/manifest.parquet", "manifest@random"),
    ],
)
def test_a_missing_artifact_is_an_input_error_that_names_the_stage(copied: Path, path: str, stage: str) -> None:
    (copied / path).unlink()
    with pytest.raises(InputError, match=f"dvc repro {stage}"):
        read(copied)


def test_metrics_that_disagree_with_the_samples_are_an_input_error(copied: Path) -> None:
    change(copied / "evaluations" / "none-0" / "metrics.json", robust=0.75)
    with pytest.raises(InputError, match=r"robust accuracy is 0\.75 of 20 in metrics\.json but 0\.8 of 20"):
        read(copied)


def test_runs_under_different_attacks_are_an_input_error(copied: Path) -> None:
    change(copied / "evaluations" / "none-1" / "metrics.json", eps="4/255")
    with pytest.raises(InputError, match="none-1: 20 examples in linf of 4/255, but none-0"):
        read(copied)


def test_a_missing_key_or_column_is_an_input_error(copied: Path) -> None:
    change(copied / "evaluations" / "none-1" / "metrics.json", attacks={"square": 0.5})
    with pytest.raises(InputError, match="column square"):
        read(copied)
    (copied / "manifests" / "none" / "summary.json").write_text("{}")
    with pytest.raises(InputError, match="wanted the key 'total'"):
        read(copied)


def test_a_missing_or_damaged_training_curve_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="dvc repro train@puma-0"):
        read_curve(tmp_path / "training.csv", "train@puma-0")
    (tmp_path / "training.csv").write_text("step,loss\n1,x\n")
    for columns in (("step", "loss"), ("step", "clean_accuracy")):
        with pytest.raises(InputError, match="wanted numbers in the columns"):
            read_curve(tmp_path / "training.csv", "train@puma-0", columns)


@pytest.mark.parametrize(("exact", "value"), [("8/255", 8 / 255), ("2.5/255", 2.5 / 255), ("0.5", 0.5)])
def test_radii_are_read_from_their_exact_form(exact: str, value: float) -> None:
    assert radius(exact) == value
