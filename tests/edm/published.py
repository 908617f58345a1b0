"""Pickles of the structure that NVlabs' EDM has, written from the description in pipeline/edm/pickles.py.

The classes and the modules they claim to be of are made here at run time, and are gone when the file is read.
"""

import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.edm.network import UNet

SOURCE_CODE = "raise SystemExit('the source code of the pickle was executed')"


@contextmanager
def persistence() -> Iterator[Any]:
    """A module torch_utils.persistence with the function that such pickles name."""
    package, module = ModuleType("torch_utils"), ModuleType("torch_utils.persistence")

    def _reconstruct_persistent_obj(_: Any) -> Any:
        raise SystemExit("the function that rebuilds objects from source code was called")

    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    sys.modules |= {"torch_utils": package, "torch_utils.persistence": module}
    try:
        yield _reconstruct_persistent_obj
    finally:
        del sys.modules["torch_utils"], sys.modules["torch_utils.persistence"]


class Persistent(nn.Module):
    """A module that is pickled as its source code and its state."""

    def __init__(self, class_name: str, **attributes: Any) -> None:
        super().__init__()
        self.class_name = class_name
        for name, value in attributes.items():
            setattr(self, name, value)

    def __reduce__(self) -> Any:
        state = {name: value for name, value in self.__dict__.items() if name != "class_name"}
        meta = {"type": "class", "version": 6, "module_src": SOURCE_CODE, "class_name": self.class_name, "state": state}
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,)


def layer(class_name: str, given: nn.Module, **attributes: Any) -> Persistent:
    """A layer with the weights of ours."""
    made = Persistent(class_name, **attributes)
    for name, value in given.named_parameters():
        made.register_parameter(name, nn.Parameter(value.detach().clone()))
    return made


def convolution(given: nn.Module, filtered: bool = False) -> Persistent:
    made = layer("Conv2d", given, in_channels=0, init_weight=np.sqrt(0.2))
    made.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25) if filtered else None)
    return made


def block(given: Any) -> Persistent:
    made = Persistent("UNetBlock", num_heads=1 if given.qkv is not None else 0, dropout=given.dropout, skip_scale=np.sqrt(0.5))
    resamples = given.resample_mode != "keep"
    for name, child in given.named_children():
        if isinstance(child, nn.GroupNorm):
            setattr(made, name, layer("GroupNorm", child, num_groups=child.num_groups, eps=child.eps))
        elif isinstance(child, nn.Linear):
            setattr(made, name, layer("Linear", child))
        else:
            setattr(made, name, convolution(child, filtered=resamples and name in ("conv0", "skip")))
    return made


def published(net: UNet, augment_dim: int = 9, **attributes: Any) -> dict[str, Any]:
    """The content of a pickle that has the weights of net."""
    unet = Persistent("SongUNet", label_dropout=net.label_dropout, _init_kwargs={"model_channels": net.position_channels})
    unet.map_noise = Persistent("PositionalEmbedding", num_channels=net.position_channels, max_positions=10_000, endpoint=True)
    for name in ("map_label", "map_layer0", "map_layer1"):
        setattr(unet, name, layer("Linear", net.get_submodule(name)))
    if augment_dim:
        unet.map_augment = layer("Linear", nn.Linear(augment_dim, net.position_channels, bias=False))
    for part in ("enc", "dec"):
        blocks = nn.ModuleDict()
        for name, child in net.get_submodule(part).items():  # type: ignore[operator]
            if isinstance(child, nn.Conv2d):
                blocks[name] = convolution(child)
            elif isinstance(child, nn.GroupNorm):
                blocks[name] = layer("GroupNorm", child, num_groups=child.num_groups, eps=child.eps)
            else:
                blocks[name] = block(child)
        setattr(unet, part, blocks)
    side, _, channels = net.shape
    given = {
        "img_resolution": side,
        "img_channels": channels,
        "label_dim": net.num_classes,
        "sigma_data": 0.5,
        "use_fp16": True,
    }
    precondition = Persistent("EDMPrecond", **(given | attributes), model=unet)
    loss = Persistent("EDMLoss", P_mean=-1.2)
    return {"ema": precondition, "loss_fn": loss, "augment_pipe": None, "dataset_kwargs": {"path": "cifar10.zip"}}


def write_pickle(path: Path, content: Any, protocol: int = 4) -> Path:
    with persistence():
        path.write_bytes(pickle.dumps(content, protocol))
    return path


def perturbed(net: UNet) -> UNet:
    """The network away from its start, where the last convolutions are zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return net


def inputs(net: UNet, count: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    side, _, channels = net.shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, channels, side, side, generator=generator)
    return x, torch.randn(count, generator=generator), torch.arange(count) % net.num_classes
