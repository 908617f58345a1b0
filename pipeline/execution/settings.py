"""The `execution` section: where work runs and with what. No stage declares it, so editing it reruns nothing."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from pipeline.params import PARAMS_FILE, InputError, Section, StageParams, parse_yaml, read_yaml

if TYPE_CHECKING:
    import torch

LOCAL_FILE = Path("execution.local.yaml")
VARIABLE = "PUMA_EXECUTION"
FROZEN = "PUMA_FROZEN_EXECUTION"  # in jobs and ranks: the whole section as JSON, whatever the files have become

Placement = Literal["auto", "device", "memmap"]


class Resources(Section):
    """What one job asks SLURM for; null leaves a choice to the site. `setup` are shell lines that run before a job, `extra`
    any other option of sbatch by its long name."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    timeout_min: PositiveInt = 60
    nodes: PositiveInt = 1
    gpus_per_node: NonNegativeInt = 0
    cpus_per_task: PositiveInt | None = None
    mem_gb: PositiveFloat | None = None
    setup: tuple[str, ...] = ()
    extra: dict[str, str | int | bool] = Field(default_factory=dict)


class StageExecution(Resources):
    """`ranks` are the processes of one task on each node, each with a share of the global batch (train, margin_model and
    generator only); `max_parallel` bounds the tasks of a stage that run at a time."""

    backend: Literal["auto", "local", "slurm"] = "auto"
    ranks: PositiveInt = 1
    max_parallel: PositiveInt = 64

    @property
    def on_slurm(self) -> bool:
        return self.backend == "slurm" or (self.backend == "auto" and belongs_to_a_cluster())


def belongs_to_a_cluster() -> bool:
    """Whether this machine has SLURM's programs and they know a cluster, be its controller reachable now or not. A package
    that is installed without any configuration does not count."""
    if shutil.which("sbatch") is None:
        return False
    shown = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, check=False)
    return "configuration source" not in shown.stderr


class ExecutionSection(StageExecution):
    """The settings of every stage; `stages` overrides them for one.

    `device: auto` is the GPU if there is one; `threads: null` leaves the number of CPU threads to PyTorch. `placement` says
    where the images of a training lie: on the GPU, in the memory maps of their stores, or (auto) on a GPU that has room for
    them. A run saves a checkpoint every `checkpoint_s` seconds. `tensorboard` is a folder for TensorBoard's files (null:
    none). `wait: false` submits and returns, for sites that forbid long processes on the login node. The controller looks at
    the queue every `poll_s` seconds."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: PositiveInt | None = None
    checkpoint_s: NonNegativeFloat = 300.0
    tensorboard: str | None = None
    placement: Placement = "auto"
    wait: bool = True
    poll_s: PositiveFloat = 5.0
    stages: dict[str, dict[str, Any]] = Field(default_factory=dict)

    def of_stage(self, stage: str) -> StageExecution:
        """The settings of one stage.

        Raises:
            InputError: its override has an unknown key or a wrong value.
        """
        given = self.model_dump(include=set(StageExecution.model_fields)) | self.stages.get(stage, {})
        return StageParameters.from_dict({"stage": given}, f"execution.stages.{stage}").stage


class ExecutionParams(StageParams):
    execution: ExecutionSection


class StageParameters(StageParams):
    stage: StageExecution


def settings(params_file: Path = PARAMS_FILE, local_file: Path = LOCAL_FILE) -> ExecutionSection:
    """The `execution` section of params.yaml, overridden key by key by a git-ignored execution.local.yaml, and that by the
    variable PUMA_EXECUTION, a YAML mapping such as "{backend: local}". A job has those of its submission."""
    if FROZEN in os.environ:
        return ExecutionSection.model_validate_json(os.environ[FROZEN])
    execution = dict((read_yaml(params_file).get("execution") or {}) if params_file.is_file() else {})
    if local_file.is_file():
        execution |= read_yaml(local_file)
    if os.environ.get(VARIABLE):
        execution |= parse_yaml(os.environ[VARIABLE], VARIABLE)
    chosen = ExecutionParams.from_dict({"execution": execution}, f"{params_file} with {local_file}").execution
    for stage in chosen.stages:
        chosen.of_stage(stage)
    return chosen


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


def placement() -> Placement:
    """Where the images of a training lie."""
    return settings().placement
