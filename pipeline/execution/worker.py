"""One task of a run, wherever it executes: in the stage's own process, in one of several local ranks, or in a job."""

import importlib
import os
import shutil
import socket
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from pipeline.artifacts import write_json
from pipeline.checkpoints import Checkpoint
from pipeline.execution.distributed import is_first_rank, process_group
from pipeline.execution.live import live_table, tensorboard
from pipeline.execution.progress import Report
from pipeline.execution.settings import settings
from pipeline.execution.store import RunStore, read_state
from pipeline.params import InputError
from pipeline.stage import end_with_parent

PROGRESS_EVERY_S = 2.0


class SupersededError(Exception):
    """Another job has taken the task over, because this one was taken for dead: it must write nothing more."""


@dataclass(frozen=True)
class Task:
    """What the function of a task is given: the params of its stage as JSON, where its result goes, where it keeps what
    must survive a restart, and how it reports. With several ranks only the first one's output counts."""

    params: str
    output: Path
    scratch: Path
    report: Report
    checkpoint: Checkpoint


class OwnedCheckpoint(Checkpoint):
    """A checkpoint that only the present owner of the task may replace."""

    def __init__(self, path: Path, every_s: float, owner: "Owner") -> None:
        super().__init__(path, every_s)
        self.owner = owner

    def save(self, state: Any) -> None:
        self.owner.check()
        super().save(state)


class Owner:
    """Marks a task as taken by this process. SLURM restarts the jobs of a lost node although they may still be running."""

    def __init__(self, work: Path) -> None:
        self.file, self.token = work / "owner.json", uuid.uuid4().hex
        note = {"token": self.token, "host": socket.gethostname(), "pid": os.getpid(), "job": job_id(), "started": time.time()}
        write_json(self.file, note)

    def is_present(self) -> bool:
        return (read_state(self.file) or {}).get("token") == self.token

    def check(self) -> None:
        """
        Raises:
            SupersededError: another process has taken the task since.
        """
        if not self.is_present():
            raise SupersededError(f"{self.file.parent.name}: taken over by another job; this one ends without writing")


def job_id() -> str | None:
    """The id of the SLURM job that this process belongs to, as squeue shows it."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID")


def run_task(store: RunStore, name: str, draw: Report | None = None) -> None:
    """Run one task to its end, from its checkpoint if there is one, and publish its output. draw also shows progress.

    Raises:
        InputError: what the function raises; anything else that goes wrong is noted in error.json too.
    """
    description = store.description()
    wanted = store.tasks()[name]
    module, function = wanted["function"].split(":")
    work = store.work(name)
    work.mkdir(parents=True, exist_ok=True)
    first = is_first_rank()
    if first:
        discard(work)
    owner = Owner(work) if first else None
    output = work / f"output-{owner.token}" if owner else Path(mkdtemp(prefix="rank-", dir=work))
    output.mkdir(exist_ok=True)
    path, every_s = work / "checkpoint.safetensors", settings().checkpoint_s
    checkpoint = OwnedCheckpoint(path, every_s, owner) if owner else Checkpoint(path, every_s)
    call: Callable[..., None] = getattr(importlib.import_module(module), function)
    paths = [Path(path) for path in description["paths"]]
    try:
        with reports(store, name, draw) if first else nullcontext(quiet) as report:
            task = Task(description["params"], output, work, report, checkpoint)
            call(task, *paths, **wanted["arguments"])
        if owner:
            owner.check()
            store.finish(name, output, {"job": job_id(), "total": store.progress(name).get("total", 0)})
            shutil.rmtree(work, ignore_errors=True)
    except SupersededError as error:
        print(error, file=sys.stderr)
    except Exception as error:
        if owner and owner.is_present() and not is_restart(error):
            told = str(error) if isinstance(error, InputError) else "".join(traceback.format_exception(error))
            write_json(work / "error.json", {"message": told, "expected": isinstance(error, InputError), "job": job_id()})
        raise
    finally:
        shutil.rmtree(output, ignore_errors=True)


def discard(work: Path) -> None:
    """Remove what earlier attempts at a task left half done."""
    for path in work.glob("output-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in work.glob(".checkpoint.safetensors.*.tmp"):
        path.unlink(missing_ok=True)
    (work / "error.json").unlink(missing_ok=True)


def is_restart(error: Exception) -> bool:
    """Whether submitit ended the task from its signal handler: no fault of the task."""
    return type(error).__module__.startswith("submitit")


def quiet(done: int, total: int, figures: dict[str, float] | None = None) -> None:
    """The report of a rank that is not the first."""


@contextmanager
def reports(store: RunStore, name: str, draw: Report | None) -> Iterator[Report]:
    """All that follow a task: progress.json, the live table, TensorBoard, and draw."""
    followers = [file_report(store.work(name), draw)]
    with ExitStack() as stack:
        followers.append(stack.enter_context(live_table(store.live(name))))
        if folder := settings().tensorboard:
            followers.append(stack.enter_context(tensorboard(Path(folder) / f"{store.stage}-{store.key}-{name}")))

        def report(done: int, total: int, figures: dict[str, float] | None = None) -> None:
            for follower in followers:
                follower(done, total, figures)

        yield report


def file_report(work: Path, draw: Report | None) -> Report:
    """Write what is reported to progress.json now and then, for whoever watches the run."""
    last = 0.0

    def report(done: int, total: int, figures: dict[str, float] | None = None) -> None:
        nonlocal last
        if draw is not None:
            draw(done, total, figures)
        now = time.time()
        if now - last >= PROGRESS_EVERY_S or done == total:
            last = now
            finite = {name: value for name, value in (figures or {}).items() if value == value and abs(value) != float("inf")}
            write_json(work / "progress.json", {"done": done, "total": total, "figures": finite, "time": now})

    return report


def main(run: str, task: str, parent: str) -> None:
    """As a process of its own: one of several ranks."""
    end_with_parent(int(parent))
    description = RunStore(Path(run)).description()
    os.chdir(description["root"])
    with process_group():
        run_task(RunStore(Path(run)), task)
