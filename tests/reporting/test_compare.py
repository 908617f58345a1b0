"""Two revisions of a small DVC project against hand-worked differences."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from dvc.repo import Repo
from scipy import stats

from pipeline.params import InputError
from pipeline.reporting.compare import changed_params, compare, read_experiment, report_lines
from tests.reporting.artifacts import Sizes, write_artifacts, write_evaluation

PARAMS = "seeds: [0, 1]\nstrategies: {none: {}, puma: {keep: 0.8}}\nexecution: {device: cpu}\n"


def git(*arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments], check=True, capture_output=True)


def save(message: str) -> None:
    with Repo() as repo:
        repo.add(["data/real", "data/manifests", "data/evaluations"])
    git("add", "-A")
    git("commit", "-qm", message)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two commits and a dvc experiment: in the second commit puma gets 100 more images wrong, in the experiment none does."""
    root = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("DVC_SITE_CACHE_DIR", str(root / ".site"))
        git("init", "-q")
        Repo.init().close()
        Path(".gitignore").write_text(".site\n")
        Path("params.yaml").write_text(PARAMS)
        write_artifacts(root / "data", ["none", "puma"], [0, 1], Sizes(test=400))
        save("first")
        git("tag", "first")
        rewrite("puma", 100)
        Path("params.yaml").write_text(PARAMS.replace("0.8", "0.6").replace("device: cpu", "device: cuda"))
        save("second")
        rewrite("puma", 0)
        rewrite("none", 200)
        with Repo() as repo:
            repo.add(["data/evaluations"])
            repo.experiments.save(name="worse-none")
        git("checkout", "-q", "-f", "HEAD")
        with Repo() as repo:
            repo.checkout(force=True)
    return root


def rewrite(strategy: str, more: int) -> None:
    """The evaluations with `more` further images wrong under the attacks."""
    for seed in (0, 1):
        wrong = (strategy == "puma") + seed
        path = Path("data/evaluations") / f"{strategy}-{seed}"
        shutil.rmtree(path)
        write_evaluation(path, strategy, seed, 400, wrong, wrong + 2 + more, wrong + 4 + more)


@pytest.fixture(autouse=True)
def in_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(project / ".site"))


def test_two_revisions_differ_as_worked_by_hand() -> None:
    first, second = read_experiment("first"), read_experiment("HEAD")
    assert changed_params(first, second) == [("strategies.puma.keep", 0.8, 0.6)]
    changes = {(change.strategy, change.metric): change for change in compare(first, second, 0.95)}
    assert set(changes) == {("puma", "clean"), ("puma", "robust")}  # the models of none are the same
    puma = changes["puma", "robust"]
    assert (puma.first, puma.second) == pytest.approx((1 - 5.5 / 400, 1 - 105.5 / 400))
    assert puma.difference.mean == pytest.approx(-0.25)
    assert puma.difference.sign == -1
    assert puma.difference.p_value == pytest.approx(stats.binomtest(0, 101).pvalue)  # rows 5 to 105 are lost by a seed or two
    clean = changes["puma", "clean"].difference
    assert (clean.mean, clean.sign) == (0, 0)
    spread = np.std([1 - wrong / 400 for wrong in (0, 1)], ddof=1)  # of the seeds, the same in all three groups: 3 degrees
    assert clean.high == pytest.approx(stats.t.ppf(0.975, 3) * spread)


def test_a_dvc_experiment_is_read_by_its_name_and_the_workspace_too() -> None:
    changes = {
        c.strategy: c
        for c in compare(read_experiment("workspace"), read_experiment("worse-none"), 0.95)
        if c.metric == "robust"
    }
    assert changes["none"].difference.mean == pytest.approx(-0.5)
    assert changes["puma"].difference.mean == pytest.approx(0.25)


def test_the_command_prints_params_differences_and_a_verdict() -> None:
    command = [sys.executable, "-m", "pipeline", "compare", "first", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "strategies.puma.keep: 0.8 -> 0.6" in result.stdout
    line = next(line for line in result.stdout.splitlines() if line.startswith("puma      robust"))
    assert line.split()[2:5] == ["98.62%", "73.62%", "-25.00"]
    assert line.endswith("lower")
    assert result.stdout.count("not told apart") == 1
    assert "the same models in both: none" in result.stdout
    again = subprocess.run([*command[:-2], "first", "first"], capture_output=True, text=True, check=False).stdout
    assert "the same models in both: none, puma" in again
    assert "points" not in again


def test_one_seed_calls_no_difference_real() -> None:
    first, second = read_experiment("first"), read_experiment("HEAD")
    for experiment in (first, second):
        experiment.runs[:] = [run for run in experiment.runs if run.seed == 0]
    lines = list(report_lines(first, second, compare(first, second, 0.95), 0.95))
    assert not any(line.endswith(("higher", "lower")) for line in lines)
    assert "One seed compares models" in lines[-1]


def test_a_strategy_that_one_of_them_lacks_is_named_and_its_settings_are_not() -> None:
    first, second = read_experiment("first"), read_experiment("HEAD")
    second.params["strategies"].pop("none")
    second.params["strategies"]["band"] = {"prune": "both", "keep": 0.5}
    assert changed_params(first, second) == [("strategies.puma.keep", 0.8, 0.6)]
    lines = list(report_lines(first, second, [], 0.95))
    assert lines[2:4] == ["  only in first: none", "  only in HEAD: band"]


def test_other_test_images_other_attacks_and_unknown_names_are_input_errors() -> None:
    first, second = read_experiment("first"), read_experiment("HEAD")
    with pytest.raises(InputError, match="no revision or experiment 'nowhere'"):
        read_experiment("nowhere")
    with pytest.raises(InputError, match="got an empty name"):
        read_experiment("")
    second.runs[0].attacks.pop("apgd-t")
    with pytest.raises(InputError, match="first was attacked by"):
        compare(first, second, 0.95)
    object.__setattr__(second, "test", "others")
    with pytest.raises(InputError, match="different test images"):
        compare(first, second, 0.95)
