"""The run store, .runs/<stage>/<key>/: everything of a run that must outlive the process that started it.

run.json      stage, target, params, tasks with their functions and arguments; written before the first of them starts
lock          held by the one controller
code/         the modules that jobs on a cluster run
jobs.jsonl    every submission: job, task
work/<task>/  checkpoints, progress.json, owner.json, error.json
tasks/<task>/ the output of a finished task, moved there in one rename
live/         <task>.csv: figures and images per second of a task as it goes
logs/         what jobs print
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifacts import digest_file, sync, write_json
from pipeline.dependencies import code_deps

PROJECT = Path(__file__).parents[2]
DONE = "done.json"


def root() -> Path:
    """The folder of all runs. DVC sets DVC_ROOT for a stage; under `dvc exp run --temp` it is the parent project, so that
    its runs are shared."""
    return Path(os.environ.get("DVC_ROOT", ".")).resolve() / ".runs"


def digest_artifact(path: Path) -> str:
    """SHA-256 of an input: an image store by its description, which holds the digests of its shards, else all files."""
    if (path / "store.json").is_file():
        return digest_file(path / "store.json")
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    lines = [f"{file.relative_to(path)} {digest_file(file)}" for file in files if file.is_file()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def run_key(stage: str, target: Path, params: dict[str, Any], inputs: list[Path]) -> str:
    """What the result of a run is a function of: its params, its inputs and the code of its stage."""
    code = {path: digest_file(PROJECT / path) for path in code_deps(stage, PROJECT)}
    known = {"target": target.name, "params": params, "inputs": [digest_artifact(path) for path in inputs], "code": code}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class RunStore:
    """The folder of one run, `.runs/<stage>/<key>`; `stage` is its address in dvc.yaml, such as train@puma-0."""

    path: Path

    @property
    def stage(self) -> str:
        return self.path.parent.name

    @property
    def key(self) -> str:
        return self.path.name

    @property
    def job_name(self) -> str:
        return f"{self.stage}-{self.key}"

    def work(self, task: str) -> Path:
        return self.path / "work" / task

    def output(self, task: str) -> Path:
        return self.path / "tasks" / task

    def live(self, task: str) -> Path:
        return self.path / "live" / f"{task}.csv"

    def is_done(self, task: str) -> bool:
        return (self.output(task) / DONE).is_file()

    def description(self) -> dict[str, Any]:
        return read_state(self.path / "run.json") or {}

    def tasks(self) -> dict[str, dict[str, Any]]:
        """Name -> function and arguments of every task."""
        found: dict[str, dict[str, Any]] = self.description().get("tasks", {})
        return found

    def progress(self, task: str) -> dict[str, Any]:
        """done, total and figures that a task reported last; empty if it has not begun."""
        return read_state(self.work(task) / "progress.json") or {}

    def size(self, task: str) -> int:
        """How many images a finished task went through."""
        return int((read_state(self.output(task) / DONE) or {}).get("total", 0))

    def error(self, task: str) -> dict[str, Any]:
        """message and job of the error that a task ended with last; empty if there was none."""
        return read_state(self.work(task) / "error.json") or {}

    def owner(self, task: str) -> dict[str, Any]:
        """Who works on a task, or did last, since when; empty if nobody has."""
        return read_state(self.work(task) / "owner.json") or {}

    def jobs(self) -> dict[str, str]:
        """The latest job of every task that was submitted."""
        file = self.path / "jobs.jsonl"
        if not file.is_file():
            return {}
        lines = [line for line in file.read_text().splitlines() if line.endswith("}")]  # the last may be cut off
        return {entry["task"]: entry["job"] for entry in map(json.loads, lines)}

    def record(self, jobs: dict[str, str]) -> None:
        """Append submissions, task -> job, and force them to the disk."""
        with (self.path / "jobs.jsonl").open("a") as file:
            file.writelines(json.dumps({"job": job, "task": task, "time": time.time()}) + "\n" for task, job in jobs.items())
            file.flush()
            os.fsync(file.fileno())

    def finish(self, task: str, output: Path, note: dict[str, Any]) -> None:
        """Move the output of a task to where finished ones are, in one step."""
        write_json(output / DONE, note)
        sync(output)
        target = self.output(task)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not self.is_done(task):
            output.rename(target)

    def clear(self) -> None:
        """Free the outputs and checkpoints of a run whose result is published; its description and logs stay."""
        for name in ("tasks", "work", "code"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        write_json(self.path / "run.json", self.description() | {"published": time.time()})

    def snapshot_code(self) -> Path:
        """A copy of the project's modules, so that jobs run the code they were submitted with."""
        target = self.path / "code"
        if not target.is_dir():
            work = self.path / f".code.{os.getpid()}.tmp"
            for name in ("pipeline", "stages"):
                shutil.copytree(PROJECT / name, work / name, ignore=shutil.ignore_patterns("__pycache__"))
            for own in code_deps(self.stage.partition("@")[0], PROJECT):  # modules of the user's outside these two
                (work / own).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(PROJECT / own, work / own)
            work.rename(target)
        return target

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only controller of the run; a second one waits."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{self.stage}: another process runs it; waiting for that to end", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def is_locked(self) -> bool:
        """Whether a controller is at work."""
        if not (self.path / "lock").is_file():
            return False
        with (self.path / "lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False


def read_state(path: Path) -> dict[str, Any] | None:
    """A JSON file that another process may be replacing; None if it is not there."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return content if isinstance(content, dict) else None


def runs(stage: str | None = None) -> list[RunStore]:
    """Runs in the store, oldest first; of a stage and its items (train means every train@...) or of all."""
    found = [RunStore(path.parent) for path in root().glob("*/*/run.json")]
    chosen = [run for run in found if stage is None or run.stage == stage or run.stage.startswith(f"{stage}@")]
    return sorted(chosen, key=lambda run: (run.description().get("started", 0.0), run.path.name))
