"""Tasks on this machine: one after the other in the stage's own process, or each in several ranks."""

import os
import socket
import subprocess
import sys
import time

from pipeline.execution.progress import Report, progress
from pipeline.execution.settings import FROZEN, ExecutionSection, StageExecution, settings
from pipeline.execution.store import RunStore
from pipeline.execution.worker import run_task
from pipeline.params import InputError
from pipeline.stage import interruption

RANK = "import sys; from pipeline.execution.worker import main; main(*sys.argv[1:])"


def run_local(store: RunStore, tasks: list[str], resources: StageExecution) -> None:
    """Run the tasks that are not done yet.

    Raises:
        InputError: a task fails; what is done is kept.
    """
    missing = [name for name in tasks if not store.is_done(name)]
    if len(missing) < len(tasks):
        print(f"{store.stage}: {len(tasks) - len(missing)} of {len(tasks)} tasks are done already", flush=True)
    for name in missing:
        label = store.stage if len(store.tasks()) == 1 else f"{store.stage} {name}"
        if resources.ranks > 1:
            run_ranks(store, name, resources.ranks, settings())
            continue
        with progress(label) as draw:
            run_task(store, name, interruptible(draw))


def interruptible(draw: Report) -> Report:
    """draw, which also ends the task whose interruption got lost."""

    def report(done: int, total: int, figures: dict[str, float] | None = None) -> None:
        interruption.check()
        draw(done, total, figures)

    return report


def run_ranks(store: RunStore, name: str, ranks: int, execution: ExecutionSection) -> None:
    """One task in several processes of this machine; the others end when one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared[FROZEN] = execution.model_dump_json()
    command = [sys.executable, "-c", RANK, str(store.path), name, str(os.getpid())]
    children = [subprocess.Popen(command, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(ranks)]
    try:
        while all(child.poll() in (None, 0) for child in children) and any(child.poll() is None for child in children):
            interruption.check()
            time.sleep(0.2)
    finally:
        for child in children:
            child.kill()
        for child in children:
            child.wait()
    if not store.is_done(name):
        told = store.error(name)
        raise InputError(told["message"] if told else f"{store.stage} {name}: a rank ended with an error, see above")
