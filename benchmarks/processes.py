"""Each contestant in a process of its own: its seconds, its peak memory, and what it returns."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def measure(
    script: str, arguments: list[str], *, peers: Path | None = None, timeout_s: float = 300, most_gb: float = 9.0
) -> dict[str, Any]:
    """Run a benchmark's script with `--run` arguments in a new process: what `finish` printed, or {"error": ...}."""
    paths = [os.environ.get("PYTHONPATH"), str(peers or "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "POLARS_MAX_THREADS": "2"}
    command = ["prlimit", f"--data={int(most_gb * 2**30)}", sys.executable, "-W", "ignore", script, *arguments]
    try:
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return {"error": f"over {timeout_s:.0f} s"}
    if run.returncode:
        return {"error": (run.stderr.strip().splitlines() or [f"status {run.returncode}"])[-1][:100]}
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return result


def finish(work: Callable[[], dict[str, Any] | None]) -> None:
    """In the new process: do the work and print its figures; `base_gb` is the memory before it began."""
    base, begin = peak_gb(), time.perf_counter()
    result = work() or {}
    print(json.dumps({"seconds": time.perf_counter() - begin, "base_gb": base, "peak_gb": peak_gb()} | result))


def peak_gb() -> float:
    """Peak resident memory of this process so far, GiB (not ru_maxrss, which begins with that of the parent)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 2**20


def flush(folder: Path) -> None:
    """Every file below folder to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
