"""The `execution` section: which device and how many threads. No stage declares it, so editing it reruns nothing."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import PositiveInt

from pipeline.params import PARAMS_FILE, InputError, Section, StageParams, read_yaml

if TYPE_CHECKING:
    import torch

LOCAL_FILE = Path("execution.local.yaml")


class ExecutionSection(Section):
    """`device: auto` is the GPU if there is one; `threads: null` leaves the number of CPU threads to PyTorch."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: PositiveInt | None = None


class ExecutionParams(StageParams):
    execution: ExecutionSection


def settings(params_file: Path = PARAMS_FILE, local_file: Path = LOCAL_FILE) -> ExecutionSection:
    """The `execution` section of params.yaml, overridden key by key by a git-ignored execution.local.yaml."""
    execution = dict(read_yaml(params_file).get("execution") or {})
    if local_file.is_file():
        execution |= read_yaml(local_file)
    return ExecutionParams.from_dict({"execution": execution}, f"{params_file} with {local_file}").execution


def device() -> "torch.device":
    """The device to compute on; also applies the number of threads.

    Raises:
        InputError: a GPU is asked for and there is none.
    """
    import torch

    chosen = settings()
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        raise InputError("execution.device: wanted cuda, but PyTorch sees no GPU; choose auto or cpu")
    use_gpu = chosen.device == "cuda" or (chosen.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if use_gpu else "cpu")
