"""Real clusters, and a project with a stage whose tasks are slow enough to be disturbed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.slurm.cluster import Cluster, missing, wait_for

TOY = '''
import time
from pathlib import Path

from pydantic import PositiveInt

from pipeline.execution import Task, stage_run
from pipeline.params import Section, StageParams
from pipeline.stage import run


class ToySection(Section):
    tasks: PositiveInt
    steps: int
    step_s: float
    fail: int = -1
    die: int = -1
    stall: int = -1


class ToyParams(StageParams):
    toy: ToySection


def count(task: Task, source: Path, index: int) -> None:
    """Add up numbers, a step at a time, and leave a trace of every step."""
    import os
    import signal

    toy = ToyParams.model_validate_json(task.params).toy
    if index == toy.fail:
        raise RuntimeError("this task is wrong")
    if index == toy.die:
        os.kill(os.getpid(), signal.SIGKILL)
    if index == toy.stall:
        for kind in (signal.SIGUSR2, signal.SIGTERM, signal.SIGCONT):
            signal.signal(kind, signal.SIG_IGN)
        time.sleep(1000)
    state = task.checkpoint.load() or {"step": 0, "sum": 0}
    while state["step"] < toy.steps:
        time.sleep(toy.step_s)
        while state["step"] >= 3 and Path("hold").exists():
            time.sleep(0.05)
        state = {"step": state["step"] + 1, "sum": state["sum"] + int(source.read_text()) * state["step"]}
        task.checkpoint.save(state)
        with Path("trace").open("a") as file:
            file.write(f"{index} {state['step']} {os.getpid()}\\n")
        task.report(state["step"], toy.steps)
    (task.output / "sum.txt").write_text(f"{index} {state['sum']}\\n")


def main(source: Path, target: Path) -> None:
    params = ToyParams.load()
    with stage_run("toy", params, [source], target) as this:
        parts = this.run(count, {f"{index:02d}": {"index": index} for index in range(params.toy.tasks)})
        with this.publish() as work:
            (work / "sums.txt").write_text("".join((part / "sum.txt").read_text() for part in parts))


if __name__ == "__main__":
    run(main)
'''
DVC_YAML = """
stages:
  toy: {cmd: exec python -m stages.toy source.txt out, params: [toy], deps: [source.txt, stages/toy.py], outs: [out]}
"""


def clusters(tmp_path_factory: pytest.TempPathFactory, name: str, **options: Any) -> Iterator[Cluster]:
    if absent := missing(accounting=bool(options.get("accounting"))):
        if os.environ.get("REQUIRE_SLURM"):
            pytest.fail(f"REQUIRE_SLURM is set, but these programs are not installed: {', '.join(absent)}")
        pytest.skip(f"SLURM is not installed ({', '.join(absent)}); on Debian: see .ci/run")
    cluster = Cluster(tmp_path_factory.mktemp(name), **options)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()


@pytest.fixture(scope="package")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """No accounting, and preemption without a signal."""
    yield from clusters(tmp_path_factory, "plain")


@pytest.fixture(scope="package")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Accounting, and preemption that sends submitit's signal first."""
    yield from clusters(tmp_path_factory, "full", accounting=True, preempt_signal=True, grace_s=5)


@pytest.fixture(params=["plain", "full"])
def either(request: pytest.FixtureRequest) -> Cluster:
    cluster: Cluster = request.getfixturevalue(request.param)
    return cluster


class Toy:
    """A project with the toy stage on a cluster."""

    def __init__(self, path: Path, cluster: Cluster) -> None:
        self.path, self.cluster = path, cluster
        self.started: list[subprocess.Popen[bytes]] = []
        for name in ("pipeline", "stages"):
            shutil.copytree(ROOT / name, path / name, ignore=shutil.ignore_patterns("__pycache__"))
        (path / "stages/toy.py").write_text(TOY)
        (path / "source.txt").write_text("3")
        (path / "dvc.yaml").write_text(DVC_YAML)
        for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
            subprocess.run(command, cwd=path, check=True)
        self.set()

    def set(
        self, *, tasks: int = 3, steps: int = 8, step_s: float = 0.25, fail: int = -1, die: int = -1, stall: int = -1,
        **execution: Any,
    ) -> None:  # fmt: skip
        """fail, die and stall are the tasks that do so."""
        settings = {"backend": "slurm", "poll_s": 0.5, "checkpoint_s": 0, "timeout_min": 30, "cpus_per_task": 1, **execution}
        toy = {"tasks": tasks, "steps": steps, "step_s": step_s, "fail": fail, "die": die, "stall": stall}
        (self.path / "params.yaml").write_text(json.dumps({"toy": toy, "execution": settings}))

    @property
    def environment(self) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{self.cluster.environment['PATH']}"
        extra = {"PATH": path, "PYTHONPATH": str(self.path), "DVC_ROOT": str(self.path), "COLUMNS": "200", "SHELL": "/bin/sh"}
        known = {name: value for name, value in self.cluster.environment.items() if name != "PUMA_EXECUTION"}
        return known | extra

    def hold(self) -> None:
        """No task gets beyond its third step before `release`."""
        (self.path / "hold").touch()

    def release(self) -> None:
        (self.path / "hold").unlink()

    def start(self, command: str = "exec python -m stages.toy source.txt out") -> subprocess.Popen[bytes]:
        with (self.path / f"output{len(self.started)}").open("wb") as output:
            child = subprocess.Popen(
                ["env", "--default-signal=INT", "bash", "-c", command], cwd=self.path, env=self.environment,
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.started.append(child)
        return child

    def finish(self, child: subprocess.Popen[bytes], status: int = 0, timeout_s: float = 120) -> str:
        """What it printed; its exit status must be the one given. Requeued jobs do not wait."""
        deadline = time.monotonic() + timeout_s
        while child.poll() is None and time.monotonic() < deadline:
            self.cluster.start_now()
            time.sleep(0.5)
        if child.poll() is None:
            child.kill()
        child.wait(30)
        output = self.output(child)
        assert child.returncode == status, output + "\n" + self.all_logs()
        return output

    def output(self, child: subprocess.Popen[bytes]) -> str:
        return (self.path / f"output{self.started.index(child)}").read_text()

    def until(self, condition: Callable[[], object], what: str) -> None:
        wait_for(condition, what, tell=self.describe)

    def until_said(self, child: subprocess.Popen[bytes], text: str) -> None:
        self.until(lambda: text in self.output(child), repr(text))

    def describe(self) -> str:
        """What the commands printed, and what those that still run are about."""
        told = [f"{self.cluster.jobs()}"]
        for child in self.started:
            told.append(f"==> {child.args!r}: {child.poll()}\n{self.output(child)}")
            told += [about(pid) for pid in ([child.pid, *descendants(child.pid)] if child.poll() is None else [])]
        return "\n".join(told)

    def stage_of(self, child: subprocess.Popen[bytes]) -> int:
        """The process of the stage that child, a dvc, runs."""
        found: list[int] = []

        def find() -> bool:
            found[:] = [pid for pid in descendants(child.pid) if "stages.toy" in words_of(pid)]
            return bool(found)

        self.until(find, "the stage")
        return found[0]

    def run(self, command: str = "exec python -m stages.toy source.txt out", status: int = 0) -> str:
        return self.finish(self.start(command), status)

    def all_logs(self) -> str:
        return "\n".join(path.read_text() for path in self.path.glob(".runs/*/*/logs/*.out"))

    @property
    def run_folder(self) -> Path:
        (folder,) = self.path.glob(".runs/toy/*")
        return folder

    def submissions(self) -> list[tuple[str, str]]:
        """(job, task) in the order in which they were recorded."""
        file = self.path.glob(".runs/toy/*/jobs.jsonl")
        return [(entry["job"], entry["task"]) for part in file for entry in map(json.loads, part.read_text().splitlines())]

    def trace(self) -> list[tuple[int, int, int]]:
        """(task, step, pid) of every step that was made, in order."""
        file = self.path / "trace"
        lines = file.read_text().splitlines() if file.is_file() else []
        return [(int(a), int(b), int(c)) for a, b, c in (line.split() for line in lines)]

    def until_steps(self, count: int) -> None:
        self.until(lambda: len(self.trace()) >= count, f"{count} steps")

    def check_result(self, tasks: int = 3, steps: int = 8) -> None:
        """The published sums are those of the closed form."""
        total = 3 * sum(range(steps))
        expected = "".join(f"{index} {total}\n" for index in range(tasks))
        assert (self.path / "out/sums.txt").read_text() == expected

    def check_each_step_once(self, tasks: int = 3, steps: int = 8) -> None:
        """No step was made twice by two processes: every task went on where it was."""
        made = [(task, step) for task, step, _ in self.trace()]
        assert sorted(made) == [(task, step) for task in range(tasks) for step in range(1, steps + 1)]


def descendants(pid: int) -> list[int]:
    """All processes below pid."""
    parents: dict[int, int] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):  # not every kernel has /proc/PID/task/TID/children
        with suppress(OSError):
            parents[int(file.parent.name)] = int(file.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for above in found:
        found += [child for child, parent in parents.items() if parent == above]
    return found[1:]


def words_of(pid: int) -> list[str]:
    """The command line of a process; none if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return []


def about(pid: int) -> str:
    """What the kernel says of a process."""
    told = []
    for name in ("status", "wchan"):
        try:
            told.append(Path(f"/proc/{pid}/{name}").read_text())
        except OSError as error:
            told.append(f"{name}: {error}")
    return "\n".join([f"-- {pid} {words_of(pid)}", *told])


@pytest.fixture
def make_toy(tmp_path: Path) -> Iterator[Callable[[Cluster], Toy]]:
    toys: list[Toy] = []

    def make(cluster: Cluster) -> Toy:
        toys.append(Toy(tmp_path / f"project{len(toys)}", cluster))
        return toys[-1]

    yield make
    for toy in toys:
        for child in toy.started:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        if jobs := list(toy.cluster.jobs()):
            toy.cluster.succeeds("scancel", *jobs)
            wait_for(partial(is_empty, toy.cluster), "an empty queue")


def is_empty(cluster: Cluster) -> bool:
    return not cluster.jobs()
