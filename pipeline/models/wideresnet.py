"""WideResNet (Zagoruyko & Komodakis, arXiv:1605.07146) with SiLU, in the layout of RobustBench's DMWideResNet."""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.registry import register
from pipeline.params import InputError


class Block(nn.Module):
    """Pre-activation residual block; the shortcut of a block that changes the width sees the activated input."""

    def __init__(self, in_planes: int, out_planes: int, stride: int) -> None:
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(in_planes, momentum=0.01)
        self.relu_0 = nn.SiLU()
        # Stride 2 pads by hand below: (0, 1) on each axis, as the published model does.
        self.conv_0 = nn.Conv2d(in_planes, out_planes, 3, stride, padding=0 if stride == 2 else 1, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(out_planes, momentum=0.01)
        self.relu_1 = nn.SiLU()
        self.conv_1 = nn.Conv2d(out_planes, out_planes, 3, padding=1, bias=False)
        self.stride = stride
        self.has_shortcut = in_planes != out_planes
        if self.has_shortcut:
            self.shortcut = nn.Conv2d(in_planes, out_planes, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu_0(self.batchnorm_0(x))
        skip = self.shortcut(out) if self.has_shortcut else x
        out = self.conv_0(F.pad(out, (0, 1, 0, 1)) if self.stride == 2 else out)
        return skip + self.conv_1(self.relu_1(self.batchnorm_1(out)))


class Group(nn.Module):
    def __init__(self, num_blocks: int, in_planes: int, out_planes: int, stride: int) -> None:
        super().__init__()
        blocks = [Block(in_planes if i == 0 else out_planes, out_planes, stride if i == 0 else 1) for i in range(num_blocks)]
        self.block = nn.Sequential(OrderedDict((str(i), block) for i, block in enumerate(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x)
        return out


class WideResNet(nn.Module):
    """Three groups of (depth - 4) / 6 blocks with 16, 32, 64 times width planes."""

    def __init__(self, in_channels: int, num_classes: int, depth: int, width: int) -> None:
        super().__init__()
        num_blocks = (depth - 4) // 6
        planes = [16, 16 * width, 32 * width, 64 * width]
        self.init_conv = nn.Conv2d(in_channels, planes[0], 3, padding=1, bias=False)
        self.layer = nn.Sequential(
            Group(num_blocks, planes[0], planes[1], 1),
            Group(num_blocks, planes[1], planes[2], 2),
            Group(num_blocks, planes[2], planes[3], 2),
        )
        self.batchnorm = nn.BatchNorm2d(planes[3], momentum=0.01)
        self.relu = nn.SiLU()
        self.logits = nn.Linear(planes[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        features = self.relu(self.batchnorm(self.layer(self.init_conv(x))))
        logits: Tensor = self.logits(features.mean(dim=(2, 3)))
        return logits


@register
def wideresnet(shape: tuple[int, int, int], num_classes: int, *, depth: int = 28, width: int = 10) -> nn.Module:
    """WRN-depth-width, for images whose sides are multiples of 4."""
    if not (isinstance(depth, int) and isinstance(width, int) and width >= 1):
        raise InputError(f"wideresnet: wanted integers depth and width >= 1, got {depth!r} and {width!r}")
    if depth < 10 or (depth - 4) % 6:
        raise InputError(f"model.arguments.depth: wanted 6 n + 4 with n >= 1 (10, 16, 22, 28, ...), got {depth}")
    if shape[0] % 4 or shape[1] % 4:
        raise InputError(f"wideresnet: wanted images whose sides are multiples of 4, got {shape[0]} x {shape[1]}")
    return WideResNet(shape[2], num_classes, depth, width)
