"""Classifiers by name. To add one: write a function (shape, num_classes, **arguments) -> nn.Module and register it."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.models.preactresnet import preactresnet
from pipeline.models.wideresnet import wideresnet
from pipeline.params import InputError, Section

Builder = Callable[..., nn.Module]
ARCHITECTURES: dict[str, Builder] = {"preactresnet": preactresnet, "wideresnet": wideresnet}


class ModelParams(Section):
    """A registered architecture and its own arguments (see its builder)."""

    architecture: str
    arguments: dict[str, Any] = Field(default_factory=dict)


class Classifier(nn.Module):
    """A network with its input normalisation inside: images (B, C, H, W) in [0, 1] -> logits (B, num_classes).

    Mean and std (C,) are not part of the state dict, which therefore fits the bare network's published layout.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net((x - self.mean) / self.std)
        return logits


def build_network(params: ModelParams, shape: tuple[int, int, int], num_classes: int, seed: int) -> nn.Module:
    """A network with weights drawn from seed, for images of shape (H, W, C); the global random state is left alone.

    Raises:
        InputError: unknown architecture, arguments that it does not take, or an image size that it cannot process.
    """
    if params.architecture not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise InputError(f"model.architecture: wanted one of {known}; got {params.architecture!r}")
    builder = ARCHITECTURES[params.architecture]
    try:
        inspect.signature(builder).bind(shape, num_classes, **params.arguments)
    except TypeError as error:
        raise InputError(f"model.arguments of {params.architecture}: {error}; it takes {inspect.signature(builder)}") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return builder(shape, num_classes, **params.arguments)
