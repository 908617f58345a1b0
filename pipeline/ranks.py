"""Several processes training one model: who I am, whose part is mine, and sums over all. One process needs none of it."""

from collections.abc import Iterable

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.params import InputError


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def my_part(batch_size: int) -> NDArray[np.int64]:
    """The places of the global batch that this rank computes: every world_size-th, as many on each rank.

    Raises:
        InputError: the ranks cannot have equally many.
    """
    if batch_size % world_size():
        raise InputError(f"training.batch_size: wanted a multiple of the {world_size()} ranks, got {batch_size}")
    return np.arange(rank(), batch_size, world_size())


def any_rank(conditions: list[bool], device: torch.device) -> list[bool]:
    """Whether each of the conditions holds on some rank; all ranks must ask."""
    if world_size() == 1:
        return conditions
    flags = torch.tensor(conditions, dtype=torch.float32, device=device)
    dist.all_reduce(flags)
    return [flag > 0 for flag in flags.tolist()]


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the ranks, in one message."""
    if world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of value over the ranks."""
    return sum_over_ranks(value) / world_size() if world_size() > 1 else value


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of x over the ranks."""
    if world_size() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total


def gather_over_ranks(x: Tensor) -> Tensor:
    """The x of every rank, (world_size, ...)."""
    if world_size() == 1:
        return x[None]
    parts = x.new_zeros(world_size(), *x.shape)
    parts[rank()] = x
    return sum_over_ranks(parts)
