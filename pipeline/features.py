"""Features of images, in whose space sets of images are compared."""

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.artifacts import digest_file
from pipeline.params import InputError, Section

INCEPTION_SIDE = 299


class MarginFeatures(Section):
    """The inputs of the last linear layer of the margin model."""

    kind: Literal["margin_model"]


class InceptionFeatures(Section):
    """The 2048 inputs of the last layer of torchvision's Inception-v3. `path` is a .safetensors file of its state dict
    (torchvision publishes IMAGENET1K_V1). These are not the weights that published FIDs use: compare within this project."""

    kind: Literal["inception"]
    path: str


FeatureParams = Annotated[MarginFeatures | InceptionFeatures, Field(discriminator="kind")]


class Penultimate(nn.Module):
    """A classifier up to its last linear layer: images (B, C, H, W) in [0, 1] -> inputs of that layer (B, d)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        if not layers:
            raise InputError("judge.features: the margin model has no linear layer to take features from; choose inception")
        self.model, self.layer = model, layers[-1]

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        caught: list[Tensor] = []
        hook = self.layer.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
        try:
            self.model(x)
        finally:
            hook.remove()
        return caught[-1].flatten(1)


class Inception(nn.Module):
    """Images (B, C, H, W) in [0, 1], grey or RGB -> features (B, 2048)."""

    def __init__(self, path: Path) -> None:
        from torchvision.models import inception_v3

        super().__init__()
        net = inception_v3(weights=None, init_weights=False, transform_input=False)
        try:
            net.load_state_dict(load_file(path))
        except (RuntimeError, SafetensorError, OSError) as error:
            raise InputError(
                f"judge.features.path: {path}: wanted the weights of torchvision's inception_v3, but: {error}"
            ) from None
        net.fc = nn.Identity()
        self.net = net.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x.expand(-1, 3, -1, -1), (INCEPTION_SIDE, INCEPTION_SIDE), mode="bilinear", antialias=True)
        features: Tensor = self.net(2 * x - 1)
        return features


def extractor(params: FeatureParams, margin_model: nn.Module, digest: str) -> tuple[nn.Module, dict[str, Any]]:
    """What maps images to features, and its name for the record; `digest` is that of the margin model.

    Raises:
        InputError: there are no such weights.
    """
    if isinstance(params, MarginFeatures):
        return Penultimate(margin_model), {"model": "margin_model", "digest": digest}
    path = Path(params.path)
    if not path.is_file():
        raise InputError(f"judge.features.path: wanted a .safetensors file of torchvision's inception_v3, found none at {path}")
    return Inception(path), {"model": "torchvision inception_v3", "digest": digest_file(path)}
