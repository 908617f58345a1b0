"""How processes end: signals, lost parents, ranks, and the stages of a parallel repro, as real processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.execution import Task, parallel, stage_run
from pipeline.execution.stage_run import StillRunningError
from pipeline.params import InputError, StageParams
from tests.conftest import ROOT
from tests.projects import has_ended

SLOW_STAGE = """
import os, time
from pathlib import Path
from pipeline.stage import run

def main() -> None:
    try:
        Path("pid").write_text(str(os.getpid()))
        time.sleep(100)
    finally:
        time.sleep(0.3)
        Path("cleaned").touch()

run(main)
"""
# A destructor swallows what is raised in it.
DEAF_STAGE = """
import os, signal, time
from pathlib import Path
from pipeline.stage import interruption, run

class Deaf:
    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)

def main() -> None:
    Deaf()
    Path("deaf").touch()
    while True:
        interruption.check()
        time.sleep(0.1)

run(main)
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "params.yaml").write_text("execution: {backend: local, ranks: 2, device: cpu, threads: 1}\n")
    (tmp_path / "slow.py").write_text(SLOW_STAGE)
    (tmp_path / "deaf.py").write_text(DEAF_STAGE)
    return tmp_path


def start(*words: str, new_session: bool = False) -> subprocess.Popen[bytes]:
    """A Python process that Ctrl-C ends, whatever the shell of the tests says; it tells its troubles to the file `told`."""
    command = ["env", "--default-signal=INT", sys.executable, *words]
    with Path("told").open("wb") as told:
        return subprocess.Popen(command, stderr=told, stdout=subprocess.DEVNULL, start_new_session=new_session)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def pid_in(path: Path) -> int:
    wait_until(lambda: path.is_file() and path.read_text())
    return int(path.read_text())


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_stage_cleans_up_undisturbed_by_a_second_signal(project: Path, kind: signal.Signals) -> None:
    child = start("slow.py")
    pid_in(project / "pid")
    child.send_signal(kind)
    time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    child.wait(60)
    assert (project / "told").read_text() == "interrupted; the same command goes on where it stopped\n"
    assert child.returncode == 130
    assert (project / "cleaned").exists()


def test_an_interrupt_that_python_dropped_is_found_at_the_next_look(project: Path) -> None:
    child = start("deaf.py")
    child.wait(60)
    assert (project / "deaf").exists(), "it was not dropped, so this shows nothing"
    assert child.returncode == 130
    assert (project / "told").read_text().endswith("interrupted; the same command goes on where it stopped\n")


def test_a_stage_ends_with_its_parent(project: Path) -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, 'slow.py'])"
    parent = start("-c", code)
    stage = pid_in(project / "pid")
    parent.kill()
    parent.wait()
    wait_until(lambda: has_ended(stage))
    assert (project / "cleaned").exists()


def test_a_stage_whose_parent_was_gone_before_it_began_ends_at_once(project: Path) -> None:
    head = "import os, time; open('orphan', 'w').write(str(os.getpid())); time.sleep(1)\n"
    (project / "late.py").write_text(head + SLOW_STAGE)
    code = "import subprocess, sys; subprocess.Popen([sys.executable, 'late.py'])"
    parent = start("-c", code, new_session=True)
    parent.wait()
    orphan = pid_in(project / "orphan")
    wait_until(lambda: has_ended(orphan))
    assert not (project / "pid").exists()


def rank_and_sum(task: Task) -> None:
    import torch
    from torch import distributed

    mine = torch.tensor(float(distributed.get_rank() + 1))
    distributed.all_reduce(mine)
    (task.output / "sum").write_text(str(mine.item()))


def fail_in_the_second_rank(task: Task) -> None:
    from torch import distributed

    if distributed.get_rank() == 1:
        raise RuntimeError(f"this rank is wrong, the other one of {task.scratch.name} is not")
    time.sleep(1000)


def sleep_in_both(task: Task) -> None:
    from torch import distributed

    (task.scratch / f"pid-{distributed.get_rank()}").write_text(str(os.getpid()))
    time.sleep(1000)


def run_in_ranks(function: Callable[..., None]) -> list[Path]:
    with stage_run("perceptron", StageParams(), [], Path(function.__name__)) as this:
        return this.run(function, {"train": {}})


def test_ranks_on_this_machine_find_each_other_and_end_together(project: Path) -> None:
    (output,) = run_in_ranks(rank_and_sum)
    assert (output / "sum").read_text() == "3.0"
    with pytest.raises(InputError, match="perceptron train: a rank ended with an error, see above"):
        run_in_ranks(fail_in_the_second_rank)
    assert project.is_dir()


def test_ranks_end_with_their_stage(project: Path) -> None:
    code = "from tests import test_endings as t; t.run_in_ranks(t.sleep_in_both)"
    parent = start("-c", code)
    wait_until(lambda: len(list(project.glob(".runs/*/*/work/train/pid-*"))) == 2)
    ranks = [pid_in(path) for path in project.glob(".runs/*/*/work/train/pid-*")]
    parent.kill()
    parent.wait()
    wait_until(lambda: all(has_ended(rank) for rank in ranks))


def make_dvc_project(stages: str) -> None:
    Path("dvc.yaml").write_text(f"stages: {stages}\n")
    subprocess.run(["git", "init", "-q"], check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], check=True)


def test_the_stages_of_a_parallel_repro_end_with_it(project: Path) -> None:
    make_dvc_project(f"{{slow: {{cmd: {sys.executable} slow.py, outs: [never]}}}}")
    parent = start("-c", "from pipeline.execution import parallel; parallel.repro([], 1)")
    stage = pid_in(project / "pid")
    parent.kill()
    parent.wait()
    wait_until(lambda: has_ended(stage))
    assert (project / "cleaned").exists()


def test_a_stage_that_only_submitted_its_jobs_has_not_failed(project: Path) -> None:
    make_dvc_project(
        "{there: {cmd: exit 75, outs: [a]}, after: {cmd: touch b, deps: [a], outs: [b]}, other: {cmd: touch c, outs: [c]}}"
    )
    with pytest.raises(StillRunningError, match="^there: submitted; run the same command again"):
        parallel.repro([], 1)
    assert (project / "c").exists()
    assert not (project / "b").exists()
