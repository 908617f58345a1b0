"""Independent stages side by side, which DVC alone cannot do: one `dvc repro --single-item` per ready stage."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress

from pipeline.execution.plan import plan
from pipeline.execution.stage_run import ANEW, StillRunningError
from pipeline.params import InputError
from pipeline.stage import interruption

# `-s` keeps two processes off each other's upstream stages, --wait-for-lock keeps both results (DVC #11054, #10465).
# It ends with this process, and with it its stage.
START = (
    f"import sys; from pipeline.stage import end_with_parent; end_with_parent({os.getpid()}); "
    "from dvc.cli import main; sys.exit(main())"
)
DVC = [sys.executable, "-c", START, "--wait-for-lock"]
SUBMITTED = StillRunningError.exit_status
BUSY = "is busy, it is being blocked by"
BUSY_POLL_S = 2.0


def repro(targets: list[str], jobs: int, *, force: bool = False) -> None:
    """Bring targets up to date, at most jobs stages at a time; stages that are up to date already are not even started. A
    failure lets the running stages finish, starts no new ones and is raised at the end.

    Raises:
        InputError: a stage failed; what was finished is kept, the same command goes on there.
    """
    graph, planned = plan(targets)
    runner = Runner(force)
    interruption.listen()
    todo = set(graph) if force else {stage.stage for stage in planned}
    waiting = {stage: needs for stage, needs in graph.items() if stage in todo}
    done, failed = set(graph) - todo, list[str]()
    submitted: list[str] = []
    running: dict[Future[int], str] = {}
    with ThreadPoolExecutor(jobs) as pool:
        try:
            while True:
                ready = [stage for stage in waiting if waiting[stage] <= done] if not failed else []
                if not running and not ready:
                    break
                for stage in ready[: jobs - len(running)]:
                    del waiting[stage]
                    running[pool.submit(runner.run, stage)] = stage
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    stage = running.pop(future)
                    {0: done.add, SUBMITTED: submitted.append}.get(future.result(), failed.append)(stage)
        except BaseException:
            runner.stop()
            raise
    if failed:
        raise InputError(f"{', '.join(failed)} failed (see above); finished stages are kept, run the same command again")
    if submitted:
        raise StillRunningError(
            f"{', '.join(submitted)}: submitted; run the same command again to go on when the jobs have ended"
        )


class Runner:
    """Runs stages in child processes and passes their output on, each line marked with its stage."""

    def __init__(self, force: bool) -> None:
        self.flags = ["--force"] if force else []
        self.children: set[subprocess.Popen[str]] = set()
        self.starting, self.printing = threading.Lock(), threading.Lock()
        self.stopping = False

    def run(self, stage: str) -> int:
        """Exit status of `dvc repro --single-item stage`; of the stage itself if that is `SUBMITTED`, which DVC hides. While
        another DVC is at work on its files, which DVC takes for an error, this waits."""
        said = False
        while True:
            status, told = self.run_once(stage, silent_if_busy=said)
            if BUSY not in told or self.stopping:
                return SUBMITTED if f"exited with {SUBMITTED}" in told else status
            said = True
            time.sleep(BUSY_POLL_S)

    def run_once(self, stage: str, *, silent_if_busy: bool) -> tuple[int, str]:
        """Exit status of DVC, and the errors that it prints."""
        command = [*DVC, "repro", "--single-item", *self.flags, stage]
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore::FutureWarning"}
        environment |= {ANEW: "1"} if self.flags else {}
        with self.starting:
            if self.stopping:
                return 1, ""
            child = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
            )
            self.children.add(child)
        assert child.stdout is not None
        told = ""
        with child.stdout:
            for line in child.stdout:
                told += line if "ERROR" in line else ""
                if is_news(line) and not (silent_if_busy and BUSY in told):
                    with self.printing:
                        print(f"[{stage}] {line.rstrip()}", flush=True)
        status = child.wait()
        with self.starting:
            self.children.discard(child)
        return status, told

    def stop(self) -> None:
        """Interrupt all running stages, as Ctrl-C would."""
        with self.starting:
            self.stopping = True
            for child in self.children:
                with suppress(ProcessLookupError):  # it has just ended
                    os.killpg(child.pid, signal.SIGINT)


def is_news(line: str) -> bool:
    """Whether a line of DVC's output says something that the user of the whole pipeline wants to read."""
    noise = ("Running stage", "Updating lock file", "Generating lock file", "To track", "To enable", "Use `dvc push`", "> ")
    return bool(line.strip()) and not line.startswith((*noise, "\tdvc config", "\tgit add", "Data and pipelines"))
