"""What an operator asks, as far as it needs no cluster: garbage, the plan, the doctor, states, logs, the line a minute."""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner, Result

from pipeline.artifacts import write_json
from pipeline.cli import app
from pipeline.execution import Task, operate, stage_run
from pipeline.execution.plan import plan, stored
from pipeline.execution.progress import Watch
from pipeline.execution.store import RunStore
from pipeline.params import InputError, read_yaml
from stages.judge import JudgeParams
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return tmp_path


def make_run(stage: str, key: str, *, started: float = 0.0, num_bytes: int = 1000, job: str | None = None) -> RunStore:
    """A run with one task that is done, and one that was submitted as the job, if any."""
    run = RunStore(Path(".runs").resolve() / stage / key)
    (run.path / "tasks/a").mkdir(parents=True)
    (run.path / "tasks/a/done.json").write_text("{}")
    (run.path / "tasks/a/output").write_bytes(bytes(num_bytes))
    (run.path / "lock").touch()
    write_json(run.path / "run.json", {"stage": stage, "tasks": {"a": {}, "b": {}}, "started": started})
    if job:
        run.record({"b": job})
    return run


def kept() -> list[str]:
    return sorted(f"{path.parent.name}/{path.name}" for path in Path(".runs").glob("*/*"))


def pipeline(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def answer(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """squeue is a shell script that notes how it was called."""
    Path("bin").mkdir(exist_ok=True)
    Path("bin/squeue").write_text(f'#!/bin/sh\necho "$@" >> calls\n{script}\n')
    Path("bin/squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{Path('bin').resolve()}:{os.environ['PATH']}")


def test_gc_keeps_the_last_runs_of_every_stage_and_says_what_it_frees() -> None:
    for key, started in (("new", 3.0), ("old", 1.0), ("middle", 2.0)):
        make_run("train@puma-0", key, started=started, num_bytes=2_000_000)
    make_run("margins", "only")
    before = kept()
    would = pipeline("gc", "--keep", "1", "--dry")
    assert kept() == before
    assert "would free" in would.stdout
    assert re.search(r"total +2 runs +4.0 MB", would.stdout)
    freed = json.loads(pipeline("gc", "--keep", "1", "--json").stdout)
    assert [(run["stage"], run["key"]) for run in freed] == [("train@puma-0", "old"), ("train@puma-0", "middle")]
    assert all(2_000_000 < run["bytes"] < 2_001_000 for run in freed)
    assert kept() == ["margins/only", "train@puma-0/new"]
    assert pipeline("gc", "--keep", "1").stdout == "nothing to remove\n"
    assert re.search(r"margins +only +1.\d kB", pipeline("gc", "--keep", "0").stdout)


def test_gc_leaves_a_run_that_a_controller_or_a_job_works_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held, live, over = make_run("judge", "held"), make_run("margins", "live", job="7_0"), make_run("margins", "over", job="8_0")
    answer(monkeypatch, f'case "$*" in *{live.job_name}*) echo "7_0|RUNNING|None";; esac')
    with held.locked():
        assert [run.key for run in operate.collect_garbage(0, dry=True)] == ["over"]
        assert [run.key for run in operate.collect_garbage(0)] == ["over"]
    answer(monkeypatch, "echo no route to host >&2; exit 1")
    assert [run.key for run in operate.collect_garbage(0)] == ["held"]
    assert "margins live is kept, it may have jobs: squeue failed: no route to host" in capsys.readouterr().err
    assert kept() == ["margins/live"]
    assert not over.path.exists()


def test_gc_deletes_under_the_lock_what_nobody_can_take_for_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    run, remove = make_run("margins", "old"), shutil.rmtree
    removed: list[Path] = []

    def watched(path: Path) -> None:
        with (path / "lock").open("a") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert not run.path.exists()
        assert not list(Path(".runs").glob("*/*/run.json"))
        removed.append(path)
        remove(path)

    monkeypatch.setattr(shutil, "rmtree", watched)
    operate.collect_garbage(0)
    assert len(removed) == 1
    assert kept() == []


def test_whoever_waits_for_a_run_that_is_removed_begins_anew() -> None:
    run, found = make_run("margins", "old"), list[bool]()

    def begin() -> None:
        with run.locked():
            found.append(run.is_locked() and not (run.path / "tasks").exists())

    with (run.path / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = threading.Thread(target=begin)
        waiting.start()
        waiting.join(0.3)
        assert not found
        shutil.rmtree(run.path)
    waiting.join(10)
    assert found == [True]


def test_gc_removes_what_a_controller_that_ended_at_once_left() -> None:
    for key in ("old", "young", "held"):
        RunStore(Path(".runs/margins").resolve() / key).path.mkdir(parents=True)
        Path(".runs/margins", key, "lock").touch()
    with RunStore(Path(".runs/margins/held").resolve()).locked():
        for key in ("old", "held"):
            os.utime(Path(".runs/margins", key), (0, 0))
        for dry in (True, False):
            assert [run.key for run in operate.collect_garbage(2, dry=dry)] == ["old"]
    assert kept() == ["margins/held", "margins/young"]


def test_the_status_asks_slurm_once_and_does_not_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    make_run("judge", "key", job="6")
    make_run("margins", "key", job="7_0", started=1.0)
    answer(monkeypatch, 'echo "6|PENDING|Resources"; echo "7_0|RUNNING|None"')
    states = [(task.stage, task.task, task.state, task.job) for task in operate.status()]
    assert states == [
        ("judge", "a", "done", None),
        ("judge", "b", "pending (resources)", "6"),
        ("margins", "a", "done", None),
        ("margins", "b", "running", "7_0"),
    ]
    answer(monkeypatch, "echo no route to host >&2; exit 1")
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waited for {seconds} s"))
    shown = pipeline("status", "--json")
    assert shown.exit_code == 0
    assert [task["state"] for task in json.loads(shown.stdout)] == ["done", "unknown", "done", "unknown"]
    assert "squeue failed: no route to host" in shown.stderr
    assert "what became of the jobs is unknown" in shown.stderr
    assert len(Path("calls").read_text().splitlines()) == 2


def test_a_stage_without_a_run_is_named_with_those_that_have_one() -> None:
    make_run("train@puma-0", "key")
    for command in (["cancel", "trian"], ["logs", "trian"]):
        told = pipeline(*command)
        assert isinstance(told.exception, InputError)
        assert re.search(r"trian: wanted a stage with a run in .*; these have one: train@puma-0", str(told.exception))
    assert pipeline("cancel", "train").stdout == "train has no jobs in the queue\n"


def test_the_logs_of_all_ranks_are_shown_in_their_order() -> None:
    run = make_run("train@puma-0", "key", job="7")
    (run.path / "logs").mkdir()
    for name in ("7_10", "7_2", "7_0", "77_0", "7_0_1"):
        (run.path / f"logs/{name}_log.out").write_text(f"first line\nrank {name}\n")
    shown = operate.logs("train", "b", 1)
    assert re.findall(r"^rank (\S+)", shown, re.MULTILINE) == ["7_0", "7_2", "7_10"]
    assert "first line" not in shown


def half_done(task: Task, source: Path, index: int) -> None:
    if index:
        raise InputError(f"{source}: stopped")
    task.report(1, 1)


FIRST = '  first: {cmd: "true", outs: [source]}\n'
JUDGE = "  judge: {cmd: exec python -m stages.judge, deps: [source], params: [judge], outs: [data/judge]}\n"


def test_the_plan_counts_only_the_tasks_that_the_stage_would_find_done() -> None:
    params = {"judge": read_yaml(ROOT / "params.yaml")["judge"]}
    Path("params.yaml").write_text(json.dumps(params))
    Path("source").write_text("1")
    with (
        pytest.raises(InputError, match="stopped"),
        stage_run("judge", JudgeParams.load(), [Path("source")], Path("data/judge")) as this,
    ):
        this.run(half_done, {"a": {"index": 0}, "b": {"index": 1}})
    assert stored("judge") == (1, 2)
    Path("params.yaml").write_text(json.dumps({"judge": params["judge"] | {"neighbours": 6}}))
    assert stored("judge") == (0, 0)
    Path("params.yaml").write_text(json.dumps(params))
    Path("source").write_text("2")
    assert stored("judge") == (0, 0)
    Path("source").write_text("1")
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, check=True)
    Path("dvc.yaml").write_text(f"stages:\n{FIRST}{JUDGE}")
    planned = {stage.stage: (stage.tasks_done, stage.tasks) for stage in plan([])[1]}
    assert planned == {"first": (0, 0), "judge": (0, 0)}, "what is before it runs, so its input is not known"
    Path("dvc.yaml").write_text(f"stages:\n{JUDGE}")
    assert [(stage.tasks_done, stage.tasks) for stage in plan([])[1]] == [(1, 2)]


def test_the_doctor_says_what_is_wrong_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("execution.local.yaml").write_text("thread: 5\n")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))
    told = pipeline("doctor", "--json")
    assert told.exit_code == 1
    findings = {finding["what"]: finding for finding in json.loads(told.stdout)}
    assert {what for what, finding in findings.items() if finding["ok"] is False} == {"execution", "disk"}
    assert "execution.thread: no such parameter" in findings["execution"]["found"]
    assert findings["execution"]["advice"].startswith("correct it")
    assert (findings["DVC remote"]["ok"], findings["DVC remote"]["found"]) == (None, "none")
    assert (findings["disk"]["found"], findings["torch"]["ok"]) == ("1 GB free", True)
    assert findings["disk"]["advice"].startswith("free 5 GB: `python -m pipeline gc`")
    Path("execution.local.yaml").unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**40))
    told = pipeline("doctor")
    assert told.exit_code == 0, told.stdout
    assert re.search(r"^- +DVC remote +none +to share artifacts: `dvc remote add -d NAME URL`$", told.stdout, re.MULTILINE)
    assert "wrong" not in told.stdout


def test_whoever_waits_writes_a_line_a_minute_with_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    run = make_run("margins", "key")
    write_json(run.path / "tasks/a/done.json", {"total": 100})
    run.work("b").mkdir(parents=True)
    with Watch(run, ["a", "b"]) as watch:
        for minute in range(3):
            write_json(run.work("b") / "progress.json", {"done": 10 + 30 * minute, "total": 100})
            for _ in range(12):
                watch.show({"b": "RUNNING"})
                now += 5.0
    assert capsys.readouterr().err.splitlines() == [
        "margins: 140/200 images, 120 s left, 0.5 images/s 1 tasks done, 1 running, 0 pending",
        "margins: 170/200 images, 60 s left, 0.5 images/s 1 tasks done, 1 running, 0 pending",
    ]
