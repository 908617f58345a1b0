"""Is this machine ready? Each check says what it found and, where something is amiss, what to do."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline.execution.settings import ExecutionSection, belongs_to_a_cluster, settings
from pipeline.params import InputError

FREE_GB = 5


@dataclass(frozen=True)
class Finding:
    """`ok` is None for what is merely absent."""

    what: str
    ok: bool | None
    found: str
    advice: str = ""


def examine() -> Iterator[Finding]:
    """All checks, one after the other."""
    yield python()
    try:
        chosen = settings()
    except InputError as error:
        chosen = None
        yield Finding("execution", False, str(error), "correct it; until then torch and SLURM are not held against it")
    yield torch_and_gpu(chosen)
    yield from packages()
    yield slurm(chosen)
    yield remote()
    yield disk(Path.cwd())


def python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    return Finding("Python", sys.version_info >= (3, 11), found, "install Python 3.11 or later, then `make setup`")


def torch_and_gpu(chosen: ExecutionSection | None) -> Finding:
    try:
        import torch
        import torchvision
    except (ImportError, RuntimeError, OSError) as error:
        return Finding("torch", False, str(error), "run `make setup`: torch and torchvision must be a matched pair")
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    found = f"torch {torch.__version__}, torchvision {torchvision.__version__}, {', '.join(gpus) or 'no GPU'}"
    ok = bool(gpus) or chosen is None or chosen.device != "cuda"
    return Finding("torch", ok, found, "execution.device is cuda: set it to auto, or check `nvidia-smi` and the driver")


def packages() -> Iterator[Finding]:
    for name in ("dvc", "submitit", "pyautoattack"):
        try:
            yield Finding(name, True, version(name))
        except PackageNotFoundError:
            yield Finding(name, False, "not installed", "run `make setup`")


def slurm(chosen: ExecutionSection | None) -> Finding:
    stages = [chosen, *map(chosen.of_stage, chosen.stages)] if chosen else []
    wanted = any(stage.backend == "slurm" for stage in stages)
    if shutil.which("sbatch") is None:
        advice = "install SLURM's client programs"
        advice = f"execution.backend is slurm: set it to auto or local, or {advice}" if wanted else f"for a cluster, {advice}"
        return Finding("SLURM", False if wanted else None, "no sbatch: stages run on this machine", advice)
    if not wanted and not belongs_to_a_cluster():
        return Finding("SLURM", None, "installed, but it knows no cluster: stages run on this machine")
    on_slurm = chosen is None or chosen.on_slurm
    shown = subprocess.run(["sinfo", "-h", "-o", "%P %a %D nodes"], capture_output=True, text=True, check=False)
    if shown.returncode:
        advice = "ask the site, or set execution.backend: local in execution.local.yaml"
        return Finding("SLURM", not on_slurm, " ".join(shown.stderr.split()), advice)
    accounting = subprocess.run(["sacct", "-n", "-X"], capture_output=True, check=False).returncode == 0
    told = f"{'; '.join(shown.stdout.split(chr(10))).strip('; ')}; {'with' if accounting else 'without'} accounting"
    return Finding("SLURM", True, told if on_slurm else f"{told}; not used: execution.backend is local")


def remote() -> Finding:
    shown = subprocess.run(
        [sys.executable, "-m", "dvc", "remote", "list"], capture_output=True, text=True, check=False
    )  # fmt: skip
    found = "; ".join(shown.stdout.splitlines())
    return Finding("DVC remote", True if found else None, found or "none", "to share artifacts: `dvc remote add -d NAME URL`")


def disk(path: Path) -> Finding:
    free = shutil.disk_usage(path).free / 2**30
    return Finding("disk", free >= FREE_GB, f"{free:.0f} GB free", f"free {FREE_GB} GB: `python -m pipeline gc`, `dvc gc -w`")
