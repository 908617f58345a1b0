"""What an operator asks: which runs there are, how far they are, what they print; ending them, and freeing their room."""

import fcntl
import os
import re
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.execution.store import RunStore, root, runs
from pipeline.params import InputError

ABANDONED_AFTER_S = 3600.0  # a run that was not even described: its controller ended at once, or begins just now


@dataclass(frozen=True)
class TaskStatus:
    """One task of a run; `state` is done, running, pending (in SLURM's words why), failed, stopped, waiting, or unknown while
    SLURM does not answer."""

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
    found = latest(stage)
    try:
        live = live_jobs(found)
    except InputError as error:
        print(f"{error}; what became of the jobs is unknown", file=sys.stderr)
        live = None
    return [task_status(run, name, live) for run in found for name in run.tasks()]


def latest(stage: str | None) -> list[RunStore]:
    """The run of each stage that was started last and is not published yet, in the order of their start."""
    newest = {run.stage: run for run in runs(stage) if "published" not in run.description()}
    return list(newest.values())


def task_status(run: RunStore, name: str, live: dict[str, str] | None) -> TaskStatus:
    """live: the jobs in the queue and their states; None if SLURM does not tell."""
    job = run.jobs().get(name)
    note, owner = run.progress(name), run.owner(name)
    if run.is_done(name):
        done = total = run.size(name)
        state = "done"
    else:
        done, total = int(note.get("done", 0)), int(note.get("total", 0))
        if job and live is None:
            state = "unknown"
        elif job and live and job in live:
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


def live_jobs(found: list[RunStore]) -> dict[str, str]:
    """State of those jobs of some runs that are in the queue; SLURM is asked once, and only if there are any.

    Raises:
        InputError: SLURM does not answer.
    """
    names = [run.job_name for run in found if run.jobs()]
    if not names:
        return {}
    from pipeline.execution.slurm import queue_now

    return queue_now(*names)


def log_of(run: RunStore, job: str | None) -> Path | None:
    """What the first rank of a job printed, if it has begun."""
    return next(iter(logs_of(run, job)), None) if job else None


def logs_of(run: RunStore, job: str) -> list[Path]:
    """What the ranks of a job printed, in their order."""
    ranks = {path: re.fullmatch(rf"{job}_(\d+)_log\.out", path.name) for path in (run.path / "logs").glob(f"{job}_*_log.out")}
    return [path for _, path in sorted((int(rank[1]), path) for path, rank in ranks.items() if rank)]


def logs(stage: str, task: str | None, lines: int) -> str:
    """The last lines of every log of a stage's latest run, or of one task; each rank has its own.

    Raises:
        InputError: there is none.
    """
    parts = []
    for run in {run.stage: run for run in runs_of(stage)}.values():
        for name, job in run.jobs().items():
            for log in logs_of(run, job) if task in (None, name) else []:
                tail = log.read_text(errors="replace").splitlines()[-lines:]
                parts.append("\n".join([f"==> {run.stage} {name}, job {job}: {log}", *tail]))
    if not parts:
        raise InputError(f"{stage}: no job has printed anything; a local run prints to the terminal")
    return "\n\n".join(parts)


def runs_of(stage: str) -> list[RunStore]:
    """The runs of a stage, oldest first.

    Raises:
        InputError: there is none.
    """
    found = runs(stage)
    if not found:
        known = ", ".join(sorted({run.stage for run in runs()})) or "none"
        raise InputError(f"{stage}: wanted a stage with a run in {root()}; these have one: {known}")
    return found


def cancel(stage: str) -> list[str]:
    """End the jobs of a stage's runs, and have their controllers submit no more; the ids of the jobs. What is done is kept.

    Raises:
        InputError: the stage has no run, or SLURM does not answer.
    """
    from pipeline.execution.slurm import slurm

    found = runs_of(stage)
    for run in found:
        if run.is_locked():
            run.cancelled.touch()  # before the queue is read: what is submitted later, the controller itself cancels
    if jobs := list(live_jobs(found)):
        slurm("scancel", *jobs)
    return jobs


@dataclass(frozen=True)
class Freed:
    """A run that was removed, and the bytes that this freed."""

    stage: str
    key: str
    bytes: int


def collect_garbage(keep: int, *, dry: bool = False) -> list[Freed]:
    """Remove all but the last `keep` runs of every stage, and what a controller that ended at once left; one that a controller
    or a job works on always stays. dry: only tell."""
    by_stage: dict[str, list[RunStore]] = {}
    for run in runs():
        by_stage.setdefault(run.stage, []).append(run)
    old = [run for found in by_stage.values() for run in found[: max(0, len(found) - keep)]]
    freed = (free(run, dry=dry) for run in [*old, *abandoned()])
    return [run for run in freed if run]


def abandoned() -> list[RunStore]:
    """Runs without a description, untouched for a while."""
    before = time.time() - ABANDONED_AFTER_S
    found = [path for path in sorted(root().glob("*/*")) if path.is_dir() and not (path / "run.json").is_file()]
    return [RunStore(path) for path in found if path.stat().st_mtime < before]


def free(run: RunStore, *, dry: bool) -> Freed | None:
    """Remove a run while no controller can begin to work on it; None if one does already, or a job."""
    if run.is_locked() or may_have_jobs(run):
        return None
    size = sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file() and path.stat().st_nlink == 1)
    return Freed(run.stage, run.key, size) if dry or remove(run) else None


def may_have_jobs(run: RunStore) -> bool:
    try:
        return bool(live_jobs([run]))
    except InputError as error:
        print(f"{run.stage} {run.key} is kept, it may have jobs: {error}", file=sys.stderr)
        return True


def remove(run: RunStore) -> bool:
    """Whether the run could be removed: under its lock, and in one step, so that no half of it is taken for a run."""
    with (run.path / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if may_have_jobs(run):  # of a controller that has come and gone
            return False
        (run.path / "run.json").unlink(missing_ok=True)
        gone = run.path.with_name(f".{run.key}.removed")
        run.path.rename(gone)
        shutil.rmtree(gone)
    return True


def as_dicts(items: list[TaskStatus] | list[Freed]) -> list[dict[str, object]]:
    return [asdict(item) for item in items]
