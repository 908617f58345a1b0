"""How much arithmetic a network is, found out without memory or time where PyTorch's meta device can."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models import ModelParams, build_network


def count_flops(architecture: str, arguments: Mapping[str, Any], shape: Sequence[int], classes: Sequence[str]) -> int:
    """Of one image (H, W, C) going forward, two for each multiplication with its addition, as in model.json."""
    params = ModelParams(architecture=architecture, arguments=dict(arguments))
    try:
        return count_on("meta", params, shape, len(classes))
    except (NotImplementedError, RuntimeError):  # a network of the user's own may do what the meta device cannot
        return count_on("cpu", params, shape, len(classes))


def count_on(device: str, params: ModelParams, shape: Sequence[int], num_classes: int) -> int:
    height, width, channels = shape
    with torch.device(device), torch.no_grad(), FlopCounterMode(display=False) as counter:
        net = build_network(params, (height, width, channels), num_classes, seed=0).eval()
        net(torch.zeros(1, channels, height, width))
    return int(counter.get_total_flops())
