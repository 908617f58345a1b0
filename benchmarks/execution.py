"""What the orchestration costs, on a throw-away SLURM of two nodes on this machine (see tests/slurm).

    python -m benchmarks.execution

Prints: a no-op `dvc repro`, what one more executed stage costs, independent stages side by side against one after the other,
the CPU that a waiting controller takes, and the time from submission to the first line of a job.
"""

import json
import re
import resource
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Toy

STAGES = 4


def timed(toy: Toy, command: str) -> float:
    """Seconds of a command that must succeed."""
    began = time.perf_counter()
    toy.run(command)
    return time.perf_counter() - began


def stages(toy: Toy, command: str) -> None:
    """A dvc.yaml of independent stages."""
    body = {"cmd": command.replace("OUT", "${key}"), "deps": ["source.txt"], "params": ["toy"], "outs": ["${key}"]}
    names: dict[str, dict[str, str]] = {f"out{index}": {} for index in range(STAGES)}
    (toy.path / "dvc.yaml").write_text(json.dumps({"stages": {"toy": {"foreach": names, "do": body}}}))


def submit_to_start(toy: Toy) -> float:
    """Median seconds from the record of a submission to what the job prints first."""
    delays = []
    for file in toy.path.glob(".runs/*/*/jobs.jsonl"):
        for entry in map(json.loads, file.read_text().splitlines()):
            log = (file.parent / "logs" / f"{entry['job']}_0_log.out").read_text()
            match = re.search(r"INFO \((\S+ \S+?),(\d+)\)", log)
            assert match
            printed = datetime.strptime(f"{match[1]}.{match[2]}", "%Y-%m-%d %H:%M:%S.%f").replace(tzinfo=UTC)
            delays.append(printed.timestamp() - entry["time"])
    return statistics.median(delays)


def waiting_cpu(toy: Toy, poll_s: float = 0.25) -> float:
    """CPU seconds that the controller takes for one look at the queue: a long wait less a short one."""
    used, steps = [], (10, 90)
    for count in steps:
        toy.set(tasks=1, steps=count, step_s=0.5, poll_s=poll_s)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        toy.start().communicate()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return (used[1] - used[0]) / ((steps[1] - steps[0]) * 0.5 / poll_s)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(Path(folder) / "cluster")
        cluster.up()
        try:
            toy = Toy(Path(folder) / "project", cluster)
            stages(toy, "mkdir OUT")
            first = timed(toy, "dvc repro")
            idle = timed(toy, "dvc repro")
            print(f"no-op dvc repro, {STAGES} stages: {idle:.1f} s; per executed stage: {(first - idle) / STAGES:.2f} s more")
            stages(toy, "exec python -m stages.toy source.txt OUT")
            toy.set(tasks=1, steps=20, step_s=0.5)
            serial = timed(toy, "dvc repro")
            toy.set(tasks=1, steps=20, step_s=0.5, fail=99)
            parallel = timed(toy, "python -c 'from pipeline.execution.parallel import repro; repro([], 4)'")
            turns = f"in turn {serial:.0f} s, side by side {parallel:.0f} s, {serial / parallel:.1f} x"
            print(f"{STAGES} stages of 10 s: {turns}")
            print(f"submission to the first line of a job: {submit_to_start(toy):.1f} s (median)")
            look = waiting_cpu(toy)
            print(f"controller: {1000 * look:.0f} ms of CPU a look, {12 * look:.2f} s a minute at the default poll_s of 5 s")
        finally:
            cluster.down()


if __name__ == "__main__":
    main()
