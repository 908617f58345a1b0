"""The optimiser and its schedule."""

import math
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from pipeline.training.recipe import TrainingParams


def make_optimizer(model: nn.Module, params: TrainingParams) -> torch.optim.SGD:
    """Nesterov SGD with momentum 0.9; as in the recipe, weight decay is on everything but normalisation layers."""
    norms = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
    spared = {p for module in model.modules() if isinstance(module, norms) for p in module.parameters(recurse=False)}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p not in spared], "weight_decay": params.weight_decay},
        {"params": [p for p in model.parameters() if p in spared], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=params.lr, momentum=0.9, nesterov=True)


def make_schedule(optimizer: torch.optim.Optimizer, params: TrainingParams, steps: int) -> OneCycleLR:
    """One cycle of the learning rate over the steps: up to lr in the first warmup_fraction of them, then down to about 0."""
    # A warm-up of exactly one step divides by zero in PyTorch.
    one_step = math.isclose(params.warmup_fraction * (steps + 1), 1)
    pct_start = params.warmup_fraction * (1.01 if one_step else 1)
    return OneCycleLR(optimizer, params.lr, total_steps=steps + 1, pct_start=pct_start)
