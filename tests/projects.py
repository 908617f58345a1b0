"""Copies of this project in which tests run DVC for real."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from pipeline.params import read_yaml
from tests.conftest import ROOT


def shell(command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(cwd), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(["bash", "-c", command], cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def checkout(target: Path, params: str) -> Path:
    """A checkout of the working tree with the given params.yaml, all committed."""
    target.mkdir()
    for name in (
        "dvc.yaml",
        "pipeline",
        "stages",
        "recipes",
        "data/.gitignore",
        ".dvc/config",
        ".dvc/plots",
        ".dvc/.gitignore",
        ".dvcignore",
    ):
        source = ROOT / name
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target / name)
    (target / "params.yaml").write_text(params)
    assert shell("git init -q && git add -A && git -c user.name=t -c user.email=t@t commit -qm start", target).returncode == 0
    return target


def repro(project: Path, *flags: str) -> set[str]:
    """The stages that `dvc repro` ran; its failure is the test's."""
    result = shell(" ".join(["dvc repro", *flags]), project)
    assert result.returncode == 0, result.stdout + result.stderr
    return set(re.findall(r"Running stage '(.+)'", result.stdout))


def planned(project: Path) -> dict[str, str]:
    """What `plan` says will run, and why."""
    shown = shell("python -m pipeline plan --json", project)
    assert shown.returncode == 0, shown.stderr
    return {stage["stage"]: stage["reason"] for stage in json.loads(shown.stdout)}


def has_ended(pid: int) -> bool:
    """Whether a process runs no more; in a container whose first process reaps no orphans, it stays as a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"


def check_same_results(project: Path, other: Path) -> None:
    """Every stage of project took and gave what it did in other, which may remember more."""
    stages, known = (read_yaml(path / "dvc.lock")["stages"] for path in (project, other))
    assert stages == {name: known[name] for name in stages}
