"""What an operator asks: which runs there are, how far they are, what they print; ending them, and freeing their room."""

import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.execution.store import RunStore, root, runs
from pipeline.params import InputError


@dataclass(frozen=True)
class TaskStatus:
    """One task of a run; `state` is done, running, pending (in SLURM's words why), failed, stopped or waiting."""

    stage: str
    key: str
    task: str
    state: str
    job: str | None
    done: int
    total: int
    seconds: float | None
    log: str | None


def status(stage: str | None = None) -> list[TaskStatus]:
    """Every task of the latest run of each stage."""
    return [task_status(run, name, live) for run in latest(stage) for live in [live_jobs(run)] for name in run.tasks()]


def latest(stage: str | None) -> list[RunStore]:
    """The run of each stage that was started last and is not published yet, in the order of their start."""
    newest = {run.stage: run for run in runs(stage) if "published" not in run.description()}
    return list(newest.values())


def task_status(run: RunStore, name: str, live: dict[str, str]) -> TaskStatus:
    job = run.jobs().get(name)
    note, owner = run.progress(name), run.owner(name)
    if run.is_done(name):
        done = total = run.size(name)
        state = "done"
    else:
        done, total = int(note.get("done", 0)), int(note.get("total", 0))
        if job in live:
            state = live[job].lower()
        elif run.error(name):
            state = "failed"
        elif job is None and run.is_locked():
            state = "running" if owner else "waiting"
        else:
            state = "stopped" if owner or job else "waiting"
    seconds = float(note["time"]) - float(owner["started"]) if note and owner else None
    log = log_of(run, job)
    return TaskStatus(run.stage, run.key, name, state, job, done, total, seconds, os.path.relpath(log) if log else None)


def live_jobs(run: RunStore) -> dict[str, str]:
    """The run's jobs in the queue; none where it never submitted any."""
    if not run.jobs():
        return {}
    from pipeline.execution.slurm import queue

    return queue(run.job_name)


def log_of(run: RunStore, job: str | None) -> Path | None:
    """What the first rank of a job printed, if it has begun."""
    log = run.path / "logs" / f"{job}_0_log.out"
    return log if job and log.is_file() else None


def logs(stage: str, task: str | None, lines: int) -> str:
    """The last lines of every log of a stage's latest run, or of one task.

    Raises:
        InputError: there is none.
    """
    found = runs(stage)
    if not found:
        raise InputError(f"{stage}: wanted a stage with a run in {root()}, found none; `python -m pipeline status` lists them")
    parts = []
    for run in {run.stage: run for run in found}.values():
        for name, job in run.jobs().items():
            log = log_of(run, job)
            if log and task in (None, name):
                tail = log.read_text(errors="replace").splitlines()[-lines:]
                parts.append("\n".join([f"==> {run.stage} {name}, job {job}: {log}", *tail]))
    if not parts:
        raise InputError(f"{stage}: no job has printed anything; a local run prints to the terminal")
    return "\n\n".join(parts)


def cancel(stage: str) -> list[str]:
    """End the jobs of a stage's runs; their ids. What is done is kept."""
    from pipeline.execution.slurm import queue, slurm

    ended = []
    for run in runs(stage):
        if run.jobs() and (jobs := list(queue(run.job_name))):
            slurm("scancel", *jobs)
            ended += jobs
    return ended


@dataclass(frozen=True)
class Freed:
    """A run that was removed, and the bytes that this freed."""

    stage: str
    key: str
    bytes: int


def collect_garbage(keep: int, *, dry: bool = False) -> list[Freed]:
    """Remove all but the last `keep` runs of every stage; one that a controller or a job works on always stays."""
    by_stage: dict[str, list[RunStore]] = {}
    for run in runs():
        by_stage.setdefault(run.stage, []).append(run)
    freed = []
    for found in by_stage.values():
        for run in found[: max(0, len(found) - keep)]:
            if run.is_locked() or live_jobs(run):
                continue
            size = sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file() and path.stat().st_nlink == 1)
            freed.append(Freed(run.stage, run.key, size))
            if not dry:
                shutil.rmtree(run.path)
    return freed


def as_dicts(items: list[TaskStatus] | list[Freed]) -> list[dict[str, object]]:
    return [asdict(item) for item in items]
