"""Classifiers by name, with their input normalisation inside. To add one: `@register` on a function, here or in a module of
one's own (see registry.py)."""

import inspect
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.models import preactresnet, torchvision_nets, wideresnet
from pipeline.models.registry import find_builder, register
from pipeline.params import Section

__all__ = ["Classifier", "ModelParams", "build_network", "preactresnet", "register", "torchvision_nets", "wideresnet"]


class ModelParams(Section):
    """A registered architecture and its own arguments (see its builder)."""

    architecture: str
    arguments: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def is_registered(self) -> Self:
        signature = inspect.signature(find_builder(self.architecture))
        try:
            signature.bind((8, 8, 3), 10, **self.arguments)
        except TypeError as error:
            raise ValueError(f"arguments of {self.architecture}: {error}; it takes {signature}") from None
        return self


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
        InputError: an image size or an argument that the architecture cannot process.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return find_builder(params.architecture)(shape, num_classes, **params.arguments)
