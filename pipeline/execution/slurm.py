"""Tasks on SLURM through submitit: submit what is missing, watch, submit again what died, and survive one's own death.

A task is done when its output is in the run store, alive when squeue knows its job, and dead otherwise; submitit's own
account of a job is not asked (without accounting it waits for ever, and it calls a job of a lost node done while SLURM
runs it again).
"""

import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError
from submitit.helpers import DelayedSubmission

from pipeline.execution.distributed import export_slurm_ranks, process_group
from pipeline.execution.progress import Watch
from pipeline.execution.settings import FROZEN, ExecutionSection, StageExecution
from pipeline.execution.stage_run import StillRunningError
from pipeline.execution.store import RunStore
from pipeline.execution.worker import run_task
from pipeline.params import InputError
from pipeline.stage import interruption

MAX_RETRIES = 2  # of a task that makes no progress in between
MAX_TIMEOUTS = 3  # how often a job that reaches its time limit puts itself back into the queue
DEAD_AFTER = 2  # looks at the queue without the job: a finished task may become visible late on a network disk
MAX_REFUSALS = 10  # of sbatch, one after the other, for reasons that pass
TRANSIENT = re.compile("(?i)timed out|contact|connect|temporarily|try again|zero bytes were transmitted")


@dataclass(frozen=True)
class TaskJob:
    """What submitit calls in a job, with the settings of the moment when it was submitted. On a signal before the end (time
    limit, preemption where the site sends one) the job goes back into the queue; its checkpoint is on the disk already."""

    execution: str

    def __call__(self, run: str, task: str) -> None:
        os.environ[FROZEN] = self.execution
        export_slurm_ranks()
        store = RunStore(Path(run))
        os.chdir(store.description()["root"])
        with process_group():
            run_task(store, task)

    def checkpoint(self, run: str, task: str) -> DelayedSubmission:
        return DelayedSubmission(self, run, task)


@dataclass
class Attempt:
    """What the controller remembers of a task: whether it saw the task alive, for how many looks it has not, tries that
    brought nothing, the progress at the last death, and why it gave up."""

    watched: bool = False
    unseen: int = 0
    vain: int = 0
    done: float = 0.0
    failure: str | None = None


@dataclass
class Controller:
    """Runs the tasks of one run on SLURM; the run store is locked, so it is the only one."""

    store: RunStore
    tasks: list[str]
    resources: StageExecution
    execution: ExecutionSection
    attempts: dict[str, Attempt] = field(init=False)
    refusals: int = 0

    def run(self) -> None:
        """Return when all tasks are done.

        Raises:
            InputError: a task cannot be finished, and all others are; or `wait: false` and there is something to wait for.
        """
        self.attempts = {name: Attempt() for name in self.tasks}
        self.cancel_unrecorded()
        if attached := sorted(set(self.store.jobs().values()) & set(queue(self.store.job_name))):
            print(f"{self.store.stage}: re-attached to {len(attached)} jobs, {attached[0]} and following", flush=True)
        looks = 0
        with Watch(self.store, self.tasks) as watch:
            while not self.look(watch):
                self.end_if_cancelled()
                looks += 1
                if not self.execution.wait and looks >= DEAD_AFTER and not self.refusals:
                    raise StillRunningError(
                        f"{self.store.stage}: submitted; run the same command again to go on when the jobs have ended "
                        f"(`python -m pipeline status` shows them)"
                    )
                time.sleep(self.execution.poll_s)

    def look(self, watch: Watch) -> bool:
        """Look at the queue once and submit what must be; whether all tasks are done."""
        interruption.check()
        self.end_if_cancelled()
        live = queue(self.store.job_name)  # before the markers: a job that ends in between has left one
        recorded = self.store.jobs()
        missing = [name for name in self.tasks if not self.store.is_done(name)]
        alive = [name for name in missing if recorded.get(name) in live]
        for name in alive:
            self.attempts[name].watched, self.attempts[name].unseen = True, 0
        idle = [name for name in missing if name not in alive and not self.attempts[name].failure]
        wanted = [name for name in idle if name not in recorded or self.is_to_be_repeated(name, recorded[name])]
        self.submit(wanted, self.resources.max_parallel - len(live))
        watch.show({name: live[recorded[name]] for name in alive})
        failed = {name: self.attempts[name].failure for name in missing if self.attempts[name].failure}
        if failed and len(failed) == len(missing):
            told = "; ".join(f"{name}: {failure}" for name, failure in sorted(failed.items())[:3])
            raise InputError(
                f"{self.store.stage}: {len(failed)} of {len(self.tasks)} tasks failed, the others are kept: {told}; "
                f"`python -m pipeline logs {self.store.stage}` shows their output"
            )
        return not missing

    def is_to_be_repeated(self, name: str, job: str) -> bool:
        """Whether a task that was submitted, is not done and not in the queue is to be submitted again."""
        attempt = self.attempts[name]
        attempt.unseen += 1
        if attempt.unseen < DEAD_AFTER:
            return False
        told = self.store.error(name)
        if attempt.watched:
            attempt.failure = self.final_cause(name, job, attempt)
        elif not self.execution.wait and told.get("job") == job and not told.get("reported"):
            attempt.failure = str(told["message"])
        else:  # died before this controller began: has a new chance
            why = f"had failed, it said: {told['message']}" if told else f"had died as {job_state(job) or 'unknown to SLURM'}"
            print(f"{self.store.stage} {name}: job {job} {why}; submitting again", flush=True)
        if attempt.failure and told:
            self.store.set_reported(name)
        return attempt.failure is None

    def final_cause(self, name: str, job: str, attempt: Attempt) -> str | None:
        """Why a dead task is not tried again; None if it is."""
        told = self.store.error(name)
        if told.get("job") == job:
            return str(told["message"])
        state = job_state(job)
        done = float(self.store.progress(name).get("done", 0))
        advanced, attempt.done = done > attempt.done, done
        attempt.vain = 0 if advanced else attempt.vain + 1
        if state.startswith("CANCELLED"):
            return f"job {job} was cancelled; run the same command again to go on"
        if state.startswith("OUT_OF_MEMORY"):
            return f"job {job} ran out of memory; raise mem_gb in execution.stages.{self.store.stage.split('@')[0]}"
        if state.startswith("TIMEOUT") and not advanced:
            return f"job {job} reached its time limit without progress; raise timeout_min in execution.stages"
        if attempt.vain > MAX_RETRIES:
            return f"job {job} died again without progress, as {state or 'unknown to SLURM'}"
        print(f"{self.store.stage} {name}: job {job} died as {state or 'unknown to SLURM'}, submitting again", flush=True)
        return None

    def submit(self, names: list[str], room: int) -> None:
        """Submit as many tasks as one array takes, at most room of them at a time, and record the jobs."""
        if not names or room <= 0:
            return
        names = names[: max_array_size()]
        executor = make_executor(self.store, self.resources, min(room, len(names)))
        run, job = str(self.store.path), TaskJob(self.execution.model_dump_json())
        try:
            jobs = executor.map_array(job, [run] * len(names), names) if names[1:] else [executor.submit(job, run, *names)]
        except FailedJobError as error:
            self.excuse(" ".join(str(error).split()))
            return
        self.refusals = 0
        self.store.record({name: job.job_id for name, job in zip(names, jobs, strict=True)})
        for name in names:
            self.attempts[name].watched, self.attempts[name].unseen = True, 0

    def excuse(self, told: str) -> None:
        """After sbatch failed: the next look tries again, if that may help. SLURM may have taken the jobs all the same.

        Raises:
            InputError: it will not.
        """
        self.refusals += 1
        if not TRANSIENT.search(told) or self.refusals > MAX_REFUSALS:
            raise InputError(
                f"{self.store.stage}: sbatch refused its jobs: {told}; correct `execution` (partition, account, qos, time, "
                f"memory, extra; `sinfo` lists the partitions) and run the same command again: what is done is kept"
            )
        print(f"{self.store.stage}: sbatch failed: {told}; trying again", file=sys.stderr, flush=True)
        self.cancel_unrecorded()

    def cancel_unrecorded(self) -> None:
        """Cancel jobs of this run that a controller submitted but was killed before it could write them down."""
        recorded = set(self.store.jobs().values())
        if unknown := [job for job in queue(self.store.job_name) if job not in recorded]:
            print(f"{self.store.stage}: cancelling {len(unknown)} jobs whose submission was not recorded", flush=True)
            self.cancel(unknown)

    def end_if_cancelled(self) -> None:
        """Raise an InputError if `python -m pipeline cancel` asks for the end, once no job is left."""
        if self.store.cancelled.exists():
            self.cancel(list(queue(self.store.job_name)))
            raise InputError(f"{self.store.stage}: cancelled; what is done is kept, run the same command again to go on")

    def cancel(self, jobs: list[str]) -> None:
        """Return when SLURM has ended the jobs."""
        if jobs:
            slurm("scancel", *jobs)
        while set(jobs) & set(queue(self.store.job_name)):
            time.sleep(0.5)


def make_executor(store: RunStore, resources: StageExecution, parallel: int) -> submitit.SlurmExecutor:
    """submitit's executor for jobs that run the snapshot of the code."""
    code = store.snapshot_code()
    paths = [f"export PYTHONPATH={shlex.quote(str(code))} PYTHONSAFEPATH=1"]
    options: dict[str, Any] = {
        "job_name": store.job_name,
        "time": resources.timeout_min,
        "nodes": resources.nodes,
        "ntasks_per_node": resources.ranks,
        "setup": [*paths, *resources.setup],
        "array_parallelism": parallel,
        "stderr_to_stdout": True,
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "cpus_per_task": resources.cpus_per_task,
        "gpus_per_node": resources.gpus_per_node or None,
        "mem": f"{int(resources.mem_gb * 1024)}M" if resources.mem_gb else None,
        "additional_parameters": dict(resources.extra) or None,
        "srun_args": ["--kill-on-bad-exit=1"] if resources.ranks * resources.nodes > 1 else None,
    }
    executor = submitit.SlurmExecutor(store.path / "logs", max_num_timeout=MAX_TIMEOUTS)
    executor.update_parameters(**{name: value for name, value in options.items() if value is not None})
    return executor


def slurm(*command: str) -> str:
    """Output of a SLURM command.

    Raises:
        InputError: it fails.
    """
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise InputError(f"{command[0]}: not found; on a machine without SLURM set execution.backend: local") from None
    if result.returncode:
        told = " ".join(result.stderr.split())
        raise InputError(f"{command[0]} failed: {told}; without a working SLURM set execution.backend: local")
    return result.stdout


def queue_now(*names: str) -> dict[str, str]:
    """State of every job of these names that is not over, by id (14, or 14_0 in an array).

    Raises:
        InputError: SLURM does not answer.
    """
    lines = slurm("squeue", "--me", "-h", "-r", "--name", ",".join(names), "-o", "%i|%T|%r").splitlines()
    return {job: state if state != "PENDING" else f"PENDING ({why})" for job, state, why in (x.split("|") for x in lines)}


def queue(name: str) -> dict[str, str]:
    """As `queue_now`, for the controller: while SLURM does not answer for a moment, this waits."""
    for wait_s in (1, 2, 4, 8, 15, 30, 60, 60, 60, 60):
        try:
            return queue_now(name)
        except InputError as error:
            print(f"{error}; trying again in {wait_s} s", file=sys.stderr, flush=True)
            time.sleep(wait_s)
            interruption.check()
    raise InputError("squeue does not answer; the jobs go on, run the same command again to re-attach")


def job_state(job: str) -> str:
    """The final state of a job: from accounting where there is any, else from what slurmctld still remembers; "" if
    nobody knows."""
    shown = subprocess.run(["sacct", "-n", "-P", "-X", "-j", job, "-o", "State"], capture_output=True, text=True, check=False)
    if shown.returncode == 0 and shown.stdout.strip():
        return shown.stdout.splitlines()[-1].strip()
    shown = subprocess.run(["scontrol", "-o", "show", "job", job], capture_output=True, text=True, check=False)
    match = re.search(r"JobState=(\S+)", shown.stdout)
    return match[1] if match else ""


def max_array_size() -> int:
    """How many tasks one array may have."""
    match = re.search(r"MaxArraySize\s*=\s*(\d+)", slurm("scontrol", "show", "config"))
    return max(1, int(match[1])) if match else 1000
