"""The run of one stage: its tasks wherever they execute, then one publication."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifacts import publish, write_json
from pipeline.execution import store as run_store
from pipeline.execution.local import run_local
from pipeline.execution.settings import settings
from pipeline.execution.store import RunStore
from pipeline.params import PARAMS_FILE, InputError, StageParams

ANEW = "PUMA_ANEW"  # set by `python -m pipeline repro --force`: compute what is published already again
EDITED = "its params, inputs or code were edited while it ran; nothing is published"
KEPT = "the finished tasks are kept: undo the edit to publish them, or run the same command again to compute anew"


class InterruptedRunError(InputError):
    """The process that waited was interrupted; the jobs go on."""

    exit_status = 130


class StillRunningError(InputError):
    """`wait: false`: jobs are in the queue, and nobody waits for them."""

    exit_status = 75  # EX_TEMPFAIL: try again later


@dataclass(frozen=True)
class StageRun:
    """See `stage_run`."""

    stage: str
    params: StageParams
    inputs: list[Path]
    target: Path
    store: RunStore

    def run(self, function: Callable[..., None], tasks: dict[str, dict[str, Any]]) -> list[Path]:
        """Call function(task, *inputs, **arguments) for every task that is not done yet, on this machine or on SLURM.
        function is named by its module, arguments are plain values. Returns the folders of their outputs, in order.

        Raises:
            InputError: a task fails; what is done is kept for the next time.
        """
        self.describe(f"{module_of(function)}:{function.__name__}", tasks)
        execution = settings()
        resources = execution.of_stage(self.stage)
        try:
            if resources.on_slurm:
                from pipeline.execution.slurm import Controller

                if not all(map(self.store.is_done, tasks)):
                    self.check_snapshot()
                Controller(self.store, list(tasks), resources, execution).run()
            else:
                run_local(self.store, list(tasks), resources)
        except KeyboardInterrupt:
            raise InterruptedRunError(interrupted(self.store, resources.on_slurm)) from None
        return [self.store.output(name) for name in tasks]

    def describe(self, function: str, tasks: dict[str, dict[str, Any]]) -> None:
        """Write run.json, from which others know the run and its jobs do what they must."""
        note = {
            "stage": self.store.stage,
            "root": str(Path.cwd()),
            "target": str(self.target),
            "paths": [str(path) for path in self.inputs],
            "params": self.params.model_dump_json(by_alias=True),
            "tasks": self.store.tasks() | {task: {"function": function, "arguments": given} for task, given in tasks.items()},
            "started": self.store.description().get("started", time.time()),
        }
        write_json(self.store.path / "run.json", note)

    @contextmanager
    def publish(self) -> Iterator[Path]:
        """Yield a fresh directory that becomes the target; afterwards the run store lets go of the checkpoints.

        Raises:
            InputError: params, inputs or code are no longer those that the tasks were computed from.
        """
        self.check_drift()
        with publish(self.target) as work:
            yield work
            self.check_drift()
        self.store.set_published()

    def check_drift(self) -> None:
        if run_key(self.stage, self.target, type(self.params).load(), self.inputs) != self.store.key:
            raise InputError(f"{self.store.stage}: {EDITED}, {KEPT}")

    def check_snapshot(self) -> None:
        """Take the copy of the code that jobs run, unless there is one.

        Raises:
            InputError: it is not the code that the run is named after.
        """
        copy = self.store.snapshot_code()
        if run_key(self.stage, self.target, self.params, self.inputs, copy) != self.store.key:
            self.store.remove("code")
            raise InputError(f"{self.store.stage}: {EDITED}, {KEPT}")


@contextmanager
def stage_run(
    stage: str, params: StageParams, inputs: Sequence[Path], target: Path, *, item: bool = False
) -> Iterator[StageRun]:
    """Hold the run that computes target from params and inputs: found again, with its finished tasks and checkpoints, by
    whoever asks for the same. item: the stage has many targets, each named by its last part."""
    key = run_key(stage, target, params, list(inputs))
    name = f"{stage}@{target.name}" if item else stage
    this = StageRun(stage, params, list(inputs), target, RunStore(run_store.root() / name / key))
    with this.store.locked() as waited:
        if waited:
            this.check_drift()
        if ANEW in os.environ and "published" in this.store.description():
            this.store.remove("tasks")
        yield this


@contextmanager
def guarded_publish(stage: str, params: StageParams, inputs: list[Path], target: Path, **items: str) -> Iterator[Path]:
    """`publish` for a stage without tasks. items are those that its params were loaded with.

    Raises:
        InputError: params, inputs or code are edited meanwhile; nothing is published.
    """
    before = run_key(stage, target, params, []), stamps(inputs)
    with publish(target) as work:
        yield work
        if before != (run_key(stage, target, type(params).load(PARAMS_FILE, **items), []), stamps(inputs)):
            raise InputError(f"{stage}: {EDITED}; run the same command again")


def stamps(paths: list[Path]) -> list[tuple[str, int, int]]:
    """What changes when a file below one of paths is written: cheaper than a digest of all that it holds."""
    files = sorted(file for path in paths for file in [path, *path.rglob("*")] if file.is_file())
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def run_key(stage: str, target: Path, params: StageParams, inputs: list[Path], copy: Path = run_store.PROJECT) -> str:
    return run_store.run_key(stage, target, params.model_dump(mode="json"), inputs, copy)


def module_of(function: Callable[..., None]) -> str:
    """The module to import a function from, also when it is the one that Python was started with."""
    module = function.__module__
    if module != "__main__":
        return module
    path = Path(function.__code__.co_filename)
    return f"{path.parent.name}.{path.stem}"


def interrupted(store: RunStore, on_slurm: bool) -> str:
    if on_slurm:
        return (
            f"{store.stage}: interrupted; its jobs go on. Run the same command again to re-attach, or "
            f"`python -m pipeline cancel {store.stage}` to end them"
        )
    return f"{store.stage}: interrupted; the same command goes on where it stopped"
