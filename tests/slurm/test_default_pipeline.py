"""The whole default pipeline on a cluster, beside what `make repro` gave on this machine."""

import json
import os
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.projects import check_same_results, checkout, planned, shell
from tests.slurm.cluster import Cluster

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
