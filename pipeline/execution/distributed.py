"""Several ranks of one task: torch.distributed over NCCL on GPUs and Gloo on CPUs, described by the usual variables."""

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from submitit.helpers import TorchDistributedEnvironment


def is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def process_group() -> Iterator[None]:
    """Join the other ranks that WORLD_SIZE counts, if it does; RANK, MASTER_ADDR, MASTER_PORT and LOCAL_RANK as torchrun
    sets them."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    import torch
    from torch import distributed

    from pipeline.execution.settings import device

    on_gpu = device().type == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def export_slurm_ranks() -> None:
    """Set those variables from the ones of a SLURM job with several tasks."""
    if int(os.environ.get("SLURM_NTASKS", "1")) == 1:
        return
    found = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    os.environ["MASTER_ADDR"] = node_address(found.master_addr)


def node_address(node: str) -> str:
    """The address of a node as SLURM knows it; the name of a node need not be one."""
    shown = subprocess.run(["scontrol", "show", "node", node], capture_output=True, text=True, check=False).stdout
    match = re.search(r"NodeAddr=(\S+)", shown)
    return match[1] if match else node
