"""Tasks on this machine: one after the other in the stage's own process, or each in several ranks."""

import os
import socket
import subprocess
import sys

from pipeline.execution.progress import progress
from pipeline.execution.settings import StageExecution
from pipeline.execution.store import RunStore
from pipeline.execution.worker import WORKER, run_task
from pipeline.params import InputError


def run_local(store: RunStore, tasks: list[str], resources: StageExecution) -> None:
    """Run the tasks that are not done yet.

    Raises:
        InputError: a task fails; what is done is kept.
    """
    missing = [name for name in tasks if not store.is_done(name)]
    if len(missing) < len(tasks):
        print(f"{store.stage}: {len(tasks) - len(missing)} of {len(tasks)} tasks are done already", flush=True)
    for name in missing:
        label = store.stage if len(tasks) == 1 else f"{store.stage} {name}"
        if resources.ranks > 1:
            run_ranks(store, name, resources.ranks)
            continue
        with progress(label) as draw:
            run_task(store, name, draw)


def run_ranks(store: RunStore, name: str, ranks: int) -> None:
    """One task in several processes of this machine; the others end when one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", WORKER, str(store.path), name]
    children = [subprocess.Popen(command, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(ranks)]
    try:
        while any(child.poll() is None for child in children):
            if any(child.poll() for child in children):
                break
            try:
                next(child for child in children if child.poll() is None).wait(0.2)
            except subprocess.TimeoutExpired:
                continue
    finally:
        for child in children:
            child.kill() if child.poll() is None else None
            child.wait()
    if not store.is_done(name):
        told = store.error(name)
        raise InputError(told["message"] if told else f"{store.stage} {name}: a rank ended with an error, see above")
