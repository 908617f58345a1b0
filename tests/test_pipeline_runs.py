"""DVC run for real on a tiny configuration: what reruns, what is restored, what is published."""

import csv
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline import recipes
from pipeline.params import read_yaml
from tests.conftest import ROOT
from tests.projects import check_same_results, checkout, planned, repro, shell

pytestmark = pytest.mark.xdist_group("pipeline_runs")

TINY = [
    "seeds=[0]",
    "strategies={none: {}, puma: {score: margin, keep: 0.7, eps: {rule: margin}}}",
    "ingest.max_train=150",
    "ingest.max_test=20",
    "generator.training.steps=3",
    "generator.network.channels=4",
    "synthesize.source.num_images=40",
    "synthesize.source.sampler.num_steps=2",
    "margin_model.training.epochs=1",
    "margin_model.training.holdout=20",
    "train.training.epochs=1",
    "train.training.holdout=20",
    "margins.max_not_converged=1.0",
    "margins.shard_rows=100",
    "evaluate.attacks=[apgd-ce]",
    "perceptron={dimension: 8, eps: 0.5, fractions: [0.5], alphas: [1, 4], num_seeds: 2, num_examples: 1000, "
    "weight_decay: 0.001, probe_angle_deg: 0.0, seed: 0}",
    "report.contact_sheet_images=4",
]


def change(project: Path, *assignments: str) -> None:
    content = recipes.read("digits", [*TINY, *assignments])
    (project / "params.yaml").write_text(content)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that has run once, from nothing."""
    project = checkout(tmp_path_factory.mktemp("finished") / "project", recipes.read("digits", TINY))
    ran = repro(project)
    assert ran == {
        "ingest", "generator", "guide", "synthesize", "margin_model", "judge", "margins", "perceptron", "report",
        *(f"manifest@{s}" for s in ("none", "puma")),
        *(f"{stage}@{s}-0" for stage in ("train", "evaluate") for s in ("none", "puma")),
    }  # fmt: skip
    return project


def test_a_second_run_a_comment_and_any_execution_key_rerun_nothing(finished: Path) -> None:
    assert repro(finished) == set()
    text = (finished / "params.yaml").read_text()
    (finished / "params.yaml").write_text("# a comment\n" + text.replace("device: auto", "device: cpu"))
    assert repro(finished) == set()
    (finished / "execution.local.yaml").write_text("threads: 1\n")
    assert repro(finished) == set()
    (finished / "execution.local.yaml").unlink()
    change(finished)


def test_only_what_a_change_touches_reruns_and_going_back_is_free(finished: Path) -> None:
    lock = (finished / "dvc.lock").read_text()
    change(finished, "report.histogram_bins=10")
    assert planned(finished) == {"report": "params changed: report"}
    assert repro(finished) == {"report"}
    change(finished, "strategies.puma.keep=0.6")
    expected = {"manifest@puma", "train@puma-0", "evaluate@puma-0", "report"}
    plan = planned(finished)
    assert set(plan) == expected
    assert plan["manifest@puma"] == "params changed: strategies.puma"
    assert plan["train@puma-0"] == "after manifest@puma"
    assert repro(finished) == expected
    assert planned(finished) == {}
    change(finished)
    assert repro(finished) == set()
    assert (finished / "dvc.lock").read_text() == lock


def test_a_new_strategy_adds_only_its_own_stages_and_tidy_removes_what_it_leaves(finished: Path) -> None:
    change(finished, "strategies.random={score: random, keep: 0.5}")
    assert repro(finished) == {"manifest@random", "train@random-0", "evaluate@random-0", "report"}
    change(finished)
    killed, alive = finished / "data/.real.999999999.tmp", finished / f"data/.margins.{os.getpid()}.tmp"
    for folder in (killed, alive):
        (folder / folder.name.replace("data", "train")).mkdir(parents=True)
    (killed / ".store.json.999999999.tmp").touch()
    (finished / "data/report/.report.json.999999999.tmp").touch()
    tidied = shell("python -m pipeline tidy", finished)
    assert "removed data/manifests/random" in tidied.stdout
    assert [path.name for path in (finished / "data").rglob(".*.tmp")] == [alive.name, alive.name]  # it is being written
    shutil.rmtree(alive)
    assert sorted(path.name for path in (finished / "data/models").iterdir()) == ["none-0", "puma-0"]
    assert repro(finished) == set()


def test_the_table_is_printed_and_the_dvc_commands_show_something_useful(finished: Path) -> None:
    table = shell("dvc repro -s -f report", finished).stdout
    assert re.search(r"strategy +seed +kept +clean +robust\n", table)
    assert re.search(r"puma +0 +70.0%", table)
    assert re.search(r"strategy +seeds +kept +clean, % +robust, % +passes, M +hours\n", table)
    assert re.search(r"puma +1 +70% +\d+\.\d \[\d+\.\d, \d+\.\d\] .*\d\n", table)
    assert "\ndata/report/report.html\n" in table
    assert "puma.robust" in shell("dvc metrics show", finished).stdout
    assert shell("dvc dag", finished).stdout.count("train@puma-0") == 1
    plots = shell("dvc plots show", finished)
    assert plots.returncode == 0, plots.stderr
    html = (finished / "dvc_plots" / "index.html").read_text()
    assert all(title in html for title in ("Accuracy against robustness", "Margins of the training images"))
    commit = shell("git add -A && git -c user.name=t -c user.email=t@t commit -qm result", finished)
    assert commit.returncode == 0, commit.stderr
    change(finished, "report.histogram_bins=20")
    assert "report.histogram_bins" in shell("dvc params diff", finished).stdout
    change(finished)
    ran = shell("dvc exp run -n half -S strategies.puma.keep=0.5", finished)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (command,) = re.findall(r"^    \$ (dvc exp show .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    shown = shell(f"{command} --csv", finished)
    assert shown.returncode == 0, shown.stderr
    header, *rows = csv.reader(shown.stdout.splitlines())
    assert "half" in {row[header.index("Experiment")] for row in rows}
    about = {"Experiment", "rev", "typ", "Created", "parent"}  # an accuracy is shown where it has changed
    assert {"puma.kept", "strategies.puma.keep"} <= set(header) - about <= {
        "strategies.puma.keep", *(f"puma.{name}" for name in ("kept", "clean", "robust"))
    }  # fmt: skip
    assert re.search(r"puma.kept +0.7 +0.5 +-0.2", shell("dvc metrics diff", finished).stdout)


def test_two_clones_give_the_same_bytes_and_so_do_stages_side_by_side(finished: Path, tmp_path: Path) -> None:
    project = checkout(tmp_path / "other", recipes.read("digits", TINY))
    result = shell("python -m pipeline repro -j 2", project)
    assert result.returncode == 0, result.stdout + result.stderr
    change(finished)
    assert repro(finished) == set()
    check_same_results(project, finished)
    assert repro(project) == set()
    again = shell("python -m pipeline repro", project)
    restored = shell("rm -r data/report && python -m pipeline repro", project)
    for printed in (result.stdout, again.stdout, restored.stdout):
        assert len(re.findall(r"strategy +seed +kept +clean +robust", printed)) == 1, printed


@pytest.mark.parametrize(
    ("assignment", "stage", "message"),
    [
        ("train.training.lr=-1.0", "train", "train.training.lr: Input should be greater than 0, got -1"),
        ("train.training.lr=1.0e+30", "train", "the loss is nan at step 1"),
        ("train.model.architecture=alexnet", "train", "wanted an architecture out of preactresnet, resnet"),
        ("train.model.arguments.depth=3", "train", "unexpected keyword argument 'depth'"),
        ("train.training.holdout=1000", "train", "wanted fewer than the 150 real training images, got 1000"),
        ("strategies.puma.keep=0.001", "manifest", "keeps none of 190 rows; raise keep"),
        ("evaluate.version=fast", "evaluate", "evaluate.version: Input should be 'standard' or 'custom', got 'fast'"),
        ("generator={kind: none}", "synthesize", "generator"),
        ("margin_model={kind: import, path: nowhere}", "margin_model", "nowhere: wanted a folder with a model"),
    ],
)
def test_bad_input_ends_in_one_clear_line_and_publishes_nothing(
    finished: Path, tmp_path: Path, assignment: str, stage: str, message: str
) -> None:
    project = tmp_path / "copy"
    shutil.copytree(finished, project, symlinks=True, ignore=shutil.ignore_patterns("models", "evaluations", "report", "*.tmp"))
    out = {"train": "models/puma-0", "manifest": "manifests/puma", "evaluate": "evaluations/puma-0"}.get(stage, stage)
    out = {"synthesize": "synthetic"}.get(stage, out)
    shutil.rmtree(project / "data" / out, ignore_errors=True)
    if stage == "evaluate":
        shutil.copytree(finished / "data/models", project / "data/models")
    change(project, assignment)
    if stage == "synthesize":
        assert shell("python -m stages.generator data/real/train data/generator", project).returncode == 0
    commands = {
        "train": "data/real/train data/synthetic data/manifests/puma data/models/puma-0 0",
        "manifest": "data/margins data/manifests/puma",
        "evaluate": "data/real/test data/models/puma-0 data/evaluations/puma-0 puma 0",
        "synthesize": "data/real/train data/generator data/guide data/synthetic",
        "margin_model": "data/real/train data/synthetic data/margin_model",
    }
    check_refused(shell(f"python -m stages.{stage} {commands[stage]}", project), message, project / "data" / out)


def check_refused(result: subprocess.CompletedProcess[str], message: str, out: Path) -> None:
    """The stage failed with one clear line and left nothing at out or beside it."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 1, result.stderr
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in result.stderr
    assert not out.exists()
    assert not list(out.parent.rglob(".*.tmp"))


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        ({"image": None}, "test.npz: wanted an array 'image', got: label"),
        ({"image": np.zeros((3, 8, 8, 1), np.uint8)}, "test.npz: wanted one label per image, got 3 images and 4 labels"),
        ({"label": np.array([0, 1, 2, 1])}, "test.npz: row 2: wanted a label in [0, 2), got 2"),
        ({"image": np.zeros((4, 9, 8, 1), np.uint8)}, "wanted train and test images of one shape, got (8, 8, 1) and (9, 8, 1)"),
        ({"image": np.zeros((4, 8, 8, 1), np.float32)}, "test.npz: 'image': wanted uint8 (n, H, W, C), got float32"),
        (
            {"image": np.zeros((0, 8, 8, 1), np.uint8), "label": np.zeros(0, int)},
            "npz: wanted at least one test image, got none",
        ),
    ],
    ids=["no key", "lengths", "label", "size", "type", "empty"],
)
def test_bad_data_ends_in_one_clear_line_and_publishes_nothing(
    tmp_path: Path, faulty: dict[str, NDArray[Any] | None], message: str
) -> None:
    good: dict[str, Any] = {"image": np.zeros((4, 8, 8, 1), np.uint8), "label": np.array([0, 1, 0, 1])}
    np.savez(tmp_path / "train.npz", **good)
    np.savez(tmp_path / "test.npz", **{name: array for name, array in (good | faulty).items() if array is not None})
    source = {"kind": "npz", "train": ["train.npz"], "test": ["test.npz"], "classes": ["zero", "one"]}
    section = read_yaml(ROOT / "params.yaml")["ingest"] | {"source": source}
    (tmp_path / "params.yaml").write_text(json.dumps({"ingest": section}))
    result = shell(f"PYTHONPATH={ROOT} python -m stages.ingest data/real", tmp_path)
    check_refused(result, message, tmp_path / "data/real")
