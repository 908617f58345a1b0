"""The run store, .runs/<stage>/<key>/: everything of a run that must outlive the process that started it.

run.json      stage, target, params, tasks with their functions and arguments; written before the first of them starts
lock          held by the one controller
cancelled     asks it to end the jobs and itself
code/         the modules that jobs on a cluster run
jobs.jsonl    every submission: job, task
work/<task>/  checkpoints, progress.json, owner.json, error.json
tasks/<task>/ the output of a finished task, moved there in one rename; kept after publication, until another run of the
              stage is published, as DVC still has to hash the result (its files are the published ones, where links can be)
live/         <task>.csv: figures and images per second of a task as it goes
logs/         what jobs print
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
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


def run_key(stage: str, target: Path, params: dict[str, Any], inputs: list[Path], copy: Path = PROJECT) -> str:
    """What the result of a run is a function of: its params, its inputs and the code of its stage, as it is in a copy."""
    code = {path: digest_file(copy / path) for path in code_deps(stage, PROJECT) if (copy / path).is_file()}
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
        """Of all jobs of this run, and of no other: two clones of a project have runs with the same key."""
        return f"{self.stage}-{self.key}-{hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:8]}"

    def work(self, task: str) -> Path:
        return self.path / "work" / task

    def output(self, task: str) -> Path:
        return self.path / "tasks" / task

    @property
    def cancelled(self) -> Path:
        """The file whose presence asks the controller to end the jobs of the run and itself."""
        return self.path / "cancelled"

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

    def set_reported(self, task: str) -> None:
        """Note that somebody was told the error of a task."""
        write_json(self.work(task) / "error.json", self.error(task) | {"reported": True})

    def owner(self, task: str) -> dict[str, Any]:
        """Who works on a task, or did last, since when; empty if nobody has."""
        return read_state(self.work(task) / "owner.json") or {}

    def jobs(self) -> dict[str, str]:
        """The latest job of every task that was submitted."""
        file = self.path / "jobs.jsonl"
        entries = map(parse_record, file.read_text(errors="replace").splitlines() if file.is_file() else [])
        return {entry["task"]: entry["job"] for entry in entries if entry}

    def record(self, jobs: dict[str, str]) -> None:
        """Append submissions, task -> job, and force them to the disk."""
        path = self.path / "jobs.jsonl"
        cut_off = path.is_file() and not path.read_bytes().endswith(b"\n")
        with path.open("a") as file:
            file.write("\n" if cut_off else "")
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
            shutil.rmtree(target, ignore_errors=True)  # what is there is not finished
            output.rename(target)

    def set_published(self) -> None:
        """Note that the result is published and free the checkpoints of the run. The outputs of its tasks stay, those of
        earlier runs of the stage go."""
        write_json(self.path / "run.json", self.description() | {"published": time.time()})
        self.remove("work", "code")
        for path in self.path.parent.iterdir():
            other = RunStore(path)
            if path != self.path and "published" in other.description() and not other.is_locked():
                other.remove("tasks", "work", "code")

    def remove(self, *names: str) -> None:
        """Remove folders of the run. They are renamed first, so that nobody takes one that is half removed for whole."""
        for name in names:
            if (self.path / name).exists():
                (self.path / name).rename(self.path / f".{name}.{uuid.uuid4().hex}.removed")
        for path in self.path.glob(".*.removed"):
            shutil.rmtree(path, ignore_errors=True)

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
    def locked(self) -> Iterator[bool]:
        """Be the only controller of the run; a second one waits. Yields whether this one did."""
        waited = False
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            with (self.path / "lock").open("a") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    print(f"{self.stage}: another process runs it; waiting for that to end", flush=True)
                    fcntl.flock(file, fcntl.LOCK_EX)
                    waited = True
                now = self.path / "lock"
                if not now.is_file() or not os.path.samestat(now.stat(), os.fstat(file.fileno())):
                    continue  # `gc` removed the run meanwhile
                self.cancelled.unlink(missing_ok=True)
                yield waited
                return

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


def parse_record(line: str) -> dict[str, str] | None:
    """A line of jobs.jsonl; None if it was cut off."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        return None
    return entry if isinstance(entry, dict) and {"task", "job"} <= set(entry) else None


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
