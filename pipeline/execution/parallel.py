"""Independent stages side by side, which DVC alone cannot do: one `dvc repro --single-item` per ready stage."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from pipeline.execution.plan import plan
from pipeline.params import InputError

# `-s` keeps two processes off each other's upstream stages, --wait-for-lock keeps both results (DVC #11054, #10465).
DVC = [sys.executable, "-m", "dvc", "--wait-for-lock"]


def repro(targets: list[str], jobs: int, *, force: bool = False) -> None:
    """Bring targets up to date, at most jobs stages at a time; stages that are up to date already are not even started. A
    failure lets the running stages finish, starts no new ones and is raised at the end.

    Raises:
        InputError: a stage failed; what was finished is kept, the same command goes on there.
    """
    graph, planned = plan(targets)
    runner = Runner(force)
    for kind in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(kind, signal.default_int_handler)  # end like Ctrl-C, so that no stage is orphaned
    todo = set(graph) if force else {stage.stage for stage in planned}
    waiting = {stage: needs for stage, needs in graph.items() if stage in todo}
    done, failed = set(graph) - todo, list[str]()
    running: dict[Future[int], str] = {}
    with ThreadPoolExecutor(jobs) as pool:
        try:
            while running or (waiting and not failed):
                ready = [stage for stage in waiting if waiting[stage] <= done] if not failed else []
                for stage in ready[: jobs - len(running)]:
                    del waiting[stage]
                    running[pool.submit(runner.run, stage)] = stage
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    stage = running.pop(future)
                    (done.add if future.result() == 0 else failed.append)(stage)
        except BaseException:
            runner.stop()
            raise
    if failed:
        raise InputError(f"{', '.join(failed)} failed (see above); finished stages are kept, run the same command again")


class Runner:
    """Runs stages in child processes and passes their output on, each line marked with its stage."""

    def __init__(self, force: bool) -> None:
        self.flags = ["--force"] if force else []
        self.children: set[subprocess.Popen[str]] = set()
        self.starting, self.printing = threading.Lock(), threading.Lock()
        self.stopping = False

    def run(self, stage: str) -> int:
        """Exit status of `dvc repro --single-item stage`."""
        command = [*DVC, "repro", "--single-item", *self.flags, stage]
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore::FutureWarning"}
        with self.starting:
            if self.stopping:
                return 1
            child = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
            )
            self.children.add(child)
        assert child.stdout is not None
        with child.stdout:
            for line in child.stdout:
                if is_news(line):
                    with self.printing:
                        print(f"[{stage}] {line.rstrip()}", flush=True)
        status = child.wait()
        with self.starting:
            self.children.discard(child)
        return status

    def stop(self) -> None:
        """Interrupt all running stages, as Ctrl-C would."""
        with self.starting:
            self.stopping = True
            for child in self.children:
                os.killpg(child.pid, signal.SIGINT)


def is_news(line: str) -> bool:
    """Whether a line of DVC's output says something that the user of the whole pipeline wants to read."""
    noise = ("Running stage", "Updating lock file", "Generating lock file", "To track", "To enable", "Use `dvc push`", "> ")
    return bool(line.strip()) and not line.startswith((*noise, "\tdvc config", "\tgit add", "Data and pipelines"))
