"""ResNets and vision transformers as torchvision defines them, fitted to small images. torchvision, which takes a second to
import, is imported only when one is built."""

import math
from typing import Literal

from torch import nn

from pipeline.models.registry import register
from pipeline.params import InputError

BLOCKS = {18: [2, 2, 2, 2], 34: [3, 4, 6, 3], 50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3]}


@register
def resnet(
    shape: tuple[int, int, int], num_classes: int, *, depth: int = 18, stem: Literal["cifar", "imagenet"] = "cifar"
) -> nn.Module:
    """ResNet-18, 34, 50, 101 or 152 (He et al., arXiv:1512.03385) in torchvision's layout. `stem: cifar` is for small images:
    a 3 x 3 convolution with stride 1 and no max-pooling; `stem: imagenet` is torchvision's own, which quarters the side."""
    if depth not in BLOCKS or stem not in ("cifar", "imagenet"):
        raise InputError(
            f"resnet: wanted depth out of {', '.join(map(str, BLOCKS))} and stem cifar or imagenet, got {depth!r} and {stem!r}"
        )
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    net = ResNet(Bottleneck if depth >= 50 else BasicBlock, BLOCKS[depth], num_classes=num_classes)
    if stem == "cifar":
        net.conv1 = nn.Conv2d(shape[2], 64, 3, padding=1, bias=False)
        net.maxpool = nn.Identity()
    else:
        net.conv1 = nn.Conv2d(shape[2], 64, 7, 2, padding=3, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    return net


@register
def vit(
    shape: tuple[int, int, int],
    num_classes: int,
    *,
    patch_size: int = 4,
    num_layers: int = 12,
    num_heads: int = 3,
    hidden_dim: int = 192,
    mlp_dim: int = 768,
    dropout: float = 0.0,
) -> nn.Module:
    """Vision transformer (Dosovitskiy et al., arXiv:2010.11929) in torchvision's layout, for square images of whole patches.
    The defaults are ViT-Tiny with patches of 4 x 4. Its head starts at zero, as torchvision's does."""
    side, whole = shape[0], [patch_size, num_layers, num_heads, hidden_dim, mlp_dim]
    if not all(isinstance(value, int) and value >= 1 for value in whole) or hidden_dim % num_heads:
        raise InputError(
            f"vit: wanted integers >= 1, hidden_dim a multiple of num_heads, got patch_size {patch_size}, num_layers "
            f"{num_layers}, num_heads {num_heads}, hidden_dim {hidden_dim}, mlp_dim {mlp_dim}"
        )
    if shape[1] != side or side % patch_size:
        raise InputError(
            f"vit: wanted square images whose side is a multiple of patch_size, got {side} x {shape[1]} and {patch_size}"
        )
    if not 0 <= dropout < 1:
        raise InputError(f"vit: wanted 0 <= dropout < 1, got {dropout}")
    from torchvision.models.vision_transformer import VisionTransformer

    net = VisionTransformer(side, patch_size, num_layers, num_heads, hidden_dim, mlp_dim, dropout, num_classes=num_classes)
    if shape[2] != 3:
        net.conv_proj = nn.Conv2d(shape[2], hidden_dim, patch_size, patch_size)
        nn.init.trunc_normal_(net.conv_proj.weight, std=math.sqrt(1 / (shape[2] * patch_size**2)))
        nn.init.zeros_(net.conv_proj.bias)
    return net
