"""The run of one stage: its tasks wherever they execute, then one publication."""

import signal
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
from pipeline.params import InputError, StageParams


class InterruptedRunError(InputError):
    """The process that waited was interrupted; the jobs go on."""

    exit_status = 130


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
        name = f"{module_of(function)}:{function.__name__}"
        note = {
            "stage": self.store.stage,
            "root": str(Path.cwd()),
            "target": str(self.target),
            "paths": [str(path) for path in self.inputs],
            "params": self.params.model_dump_json(by_alias=True),
            "tasks": self.store.tasks() | {task: {"function": name, "arguments": given} for task, given in tasks.items()},
            "started": self.store.description().get("started", time.time()),
        }
        write_json(self.store.path / "run.json", note)
        execution = settings()
        resources = execution.of_stage(self.stage)
        try:
            if resources.on_slurm:
                from pipeline.execution.slurm import Controller

                Controller(self.store, list(tasks), resources, execution).run()
            else:
                run_local(self.store, list(tasks), resources)
        except KeyboardInterrupt:
            raise InterruptedRunError(interrupted(self.store, resources.on_slurm)) from None
        return [self.store.output(name) for name in tasks]

    @contextmanager
    def publish(self) -> Iterator[Path]:
        """Yield a fresh directory that becomes the target; afterwards the run store lets go of the tasks.

        Raises:
            InputError: params, inputs or code are no longer those that the tasks were computed from.
        """
        self.check_drift()
        with publish(self.target) as work:
            yield work
            self.check_drift()
        self.store.clear()

    def check_drift(self) -> None:
        now = run_key(self.stage, self.target, type(self.params).load(), self.inputs)
        if now != self.store.key:
            raise InputError(
                f"{self.store.stage}: its params, inputs or code were edited while it ran; nothing is published, the "
                f"finished tasks are kept: undo the edit to publish them, or run the same command again to compute anew"
            )


@contextmanager
def stage_run(
    stage: str, params: StageParams, inputs: Sequence[Path], target: Path, *, item: bool = False
) -> Iterator[StageRun]:
    """Hold the run that computes target from params and inputs: found again, with its finished tasks and checkpoints, by
    whoever asks for the same. item: the stage has many targets, each named by its last part."""
    key = run_key(stage, target, params, list(inputs))
    name = f"{stage}@{target.name}" if item else stage
    store = RunStore(run_store.root() / name / key)
    for kind in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(kind, signal.default_int_handler)
    with store.locked():
        yield StageRun(stage, params, list(inputs), target, store)


def run_key(stage: str, target: Path, params: StageParams, inputs: list[Path]) -> str:
    return run_store.run_key(stage, target, params.model_dump(mode="json"), inputs)


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
