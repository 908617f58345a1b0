"""Exponential moving average of a model: its weights and, in a copy of their own, its BatchNorm statistics."""

import copy
from collections.abc import Iterator
from itertools import chain
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


class EMA(Generic[Module]):
    """`model` is the average, in eval mode. It follows the model exactly for the first `warmup` updates; after them the decay
    ramps up as min(decay, (1 + t) / (10 + t)) over updates t (as in the code of Wang et al., arXiv:2302.04638, whose
    averaged model however shares the BatchNorm statistics of the trained one)."""

    def __init__(self, model: Module, decay: float, warmup: int = 0) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.warmup = decay, warmup

    @torch.no_grad()
    def update(self, model: Module, step: int) -> None:
        """Move the average towards model after its update number step (from 0)."""
        since = step - self.warmup
        weight = 1.0 if since < 0 else 1 - min(self.decay, (1 + since) / (10 + since))
        pairs = list(zip(tensors(self.model), tensors(model), strict=True))
        moving = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_([average for average, _ in moving], [value for _, value in moving], weight)
        for average, value in pairs:
            if not average.is_floating_point():
                average.copy_(value)


def tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers of model, each once: weights may have several names."""
    return chain(model.parameters(), model.buffers())
