"""Whole pipelines on a cluster: the default beside what `make repro` gave on this machine, and a tiny one as README does it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import recipes
from tests.conftest import ROOT
from tests.projects import check_same_results, checkout, planned, shell
from tests.slurm.cluster import Cluster, wait_for
from tests.test_pipeline_runs import TINY

pytestmark = pytest.mark.xdist_group("slurm")


def test_a_cluster_gives_the_bytes_of_one_machine(plain: Cluster, tmp_path: Path) -> None:
    if not (ROOT / "dvc.lock").is_file() or planned(ROOT):
        reason = "wants what `make repro` gives, to compare with"
        pytest.fail(reason) if os.environ.get("REQUIRE_SLURM") else pytest.skip(reason)
    project = checkout(tmp_path / "project", (ROOT / "params.yaml").read_text())
    settings = {"backend": "slurm", "poll_s": 1, "timeout_min": 30, "cpus_per_task": 1}
    (project / "execution.local.yaml").write_text(json.dumps(settings))
    start = f"PATH=$PATH:/usr/sbin SLURM_CONF={plain.environment['SLURM_CONF']} PUMA_EXECUTION= "
    result = shell(f"{start} python -m pipeline repro -j 3", project)
    assert result.returncode == 0, result.stdout + result.stderr
    check_same_results(project, ROOT)
    submitted = {file.parent.parent.name.split("@")[0] for file in project.glob(".runs/*/*/jobs.jsonl")}
    assert submitted == {"generator", "synthesize", "margin_model", "judge", "margins", "train", "evaluate"}


SHARDED = [
    "strategies={puma: {score: margin, keep: 0.7, eps: {rule: margin}}}",
    "synthesize.shard_rows=20",
    "evaluate.reference_attacks=[fgsm]",
    "evaluate.batch_size=10",
    "evaluate.shard_rows=10",
]
AGAIN = {
    "synthetic": "stages.synthesize data/real/train data/generator data/guide here/synthetic",
    "margins": "stages.margins data/real/train data/synthetic data/margin_model here/margins",
    "evaluations/puma-0": "stages.evaluate data/real/test data/models/puma-0 here/evaluations/puma-0 puma 0",
}


def test_the_readme_moves_a_project_to_a_cluster_and_shards_give_the_bytes_of_one_machine(
    plain: Cluster, tmp_path: Path
) -> None:
    section = (ROOT / "README.md").read_text().split("## On a cluster\n")[1].split("\n## ")[0]
    (settings,) = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)
    activate, doctor, plan, repro, status, logs, cancel = re.findall(r"(?m)^    (\S.*)$", section)
    project = checkout(tmp_path / "project", recipes.read("digits", [*TINY, *SHARDED]))
    (project / "execution.local.yaml").write_text(settings)
    (project / ".venv").symlink_to(sys.prefix)
    on_cluster = f"export PATH=$PATH:/usr/sbin SLURM_CONF={plain.environment['SLURM_CONF']} PUMA_EXECUTION=; {activate}; "

    def run(command: str) -> str:
        result = shell(on_cluster + command, project)
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout

    assert re.search(r"ok +SLURM +low", run(doctor))
    assert "generator" in run(plan)
    with (project / "output").open("w") as output:
        environment = os.environ | {"PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"}
        start = ["bash", "-c", f"{on_cluster}exec {repro}"]
        waiting = subprocess.Popen(start, cwd=project, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            wait_for(lambda: "RUNNING" in plain.jobs().values() and re.search(r" running +\d+ ", run(status)), "a running job")
            assert waiting.wait(600) == 0, (project / "output").read_text()
        finally:
            waiting.terminate()
            waiting.wait(60)
    assert "started on" in run(logs)
    assert run(cancel) == "margins has no jobs in the queue\n"
    jobs = {file.parents[1].name: len(file.read_text().splitlines()) for file in project.glob(".runs/*/*/jobs.jsonl")}
    assert (jobs["generator"], jobs["synthesize"], jobs["margins"]) == (1, 2, 4)
    assert jobs["evaluate@puma-0"] >= 3
    for target, command in AGAIN.items():
        (project / "here" / target).parent.mkdir(parents=True, exist_ok=True)
        result = shell(f"PUMA_EXECUTION='{{backend: local}}' DVC_ROOT=$PWD/here python -m {command}", project)
        assert result.returncode == 0, result.stderr
        assert contents(project / "here" / target) == contents(project / "data" / target)


def contents(folder: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found
    return found
