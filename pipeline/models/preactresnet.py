"""Pre-activation ResNet (He et al., arXiv:1603.05027) with basic blocks: ResNet-18 and smaller."""

from torch import Tensor, nn

from pipeline.models.registry import register
from pipeline.params import InputError


class PreActBlock(nn.Module):
    """BatchNorm, activation, convolution, twice; the projection of the shortcut sees the activated input."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.act = nn.SiLU()
        project = stride != 1 or in_planes != planes
        self.shortcut = nn.Conv2d(in_planes, planes, 1, stride, bias=False) if project else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.norm1(x))
        skip = x if self.shortcut is None else self.shortcut(out)
        out = self.conv2(self.act(self.norm2(self.conv1(out))))
        return skip + out


class PreActResNet(nn.Module):
    """A stem, stages of blocks that halve the resolution from the second on, global average pooling."""

    def __init__(self, in_channels: int, num_classes: int, blocks: list[int], width: int, stem_stride: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, width, 3, stem_stride, padding=1, bias=False)
        layers: list[nn.Module] = []
        in_planes = width
        for stage, count in enumerate(blocks):
            planes = width * 2**stage
            for index in range(count):
                layers.append(PreActBlock(in_planes, planes, 2 if stage > 0 and index == 0 else 1))
                in_planes = planes
        self.blocks = nn.Sequential(*layers)
        self.norm = nn.BatchNorm2d(in_planes)
        self.act = nn.SiLU()
        self.head = nn.Linear(in_planes, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        features = self.act(self.norm(self.blocks(self.stem(x))))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


@register
def preactresnet(
    shape: tuple[int, int, int],
    num_classes: int,
    *,
    blocks: list[int] | None = None,
    width: int = 64,
    stem_stride: int = 1,
) -> nn.Module:
    """blocks [2, 2, 2, 2] (the default) and width 64 are PreActResNet-18; each stage doubles the width.

    `stem_stride: 2` halves the resolution at once, for large images or a small machine."""
    blocks = [2, 2, 2, 2] if blocks is None else blocks
    counts = [*blocks, width, stem_stride] if isinstance(blocks, list) else [blocks]
    if not blocks or not all(isinstance(count, int) and count >= 1 for count in counts) or not isinstance(blocks, list):
        raise InputError(
            "preactresnet: wanted at least one block per stage in a list, width and stem_stride integers >= 1, "
            f"got blocks {blocks}, width {width}, stem_stride {stem_stride}"
        )
    return PreActResNet(shape[2], num_classes, blocks, width, stem_stride)
