"""The class-conditional U-Net that EDM trains (DDPM++ of Song et al. 2021, as in arXiv:2206.00364, appendix F and table 7).

Parameters carry the names of the published networks (map_layer0, enc.32x32_block0.conv0, ...), so that their tensors fit.
"""

import copy
import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from pipeline.params import InputError, Section

SKIP_SCALE = math.sqrt(0.5)
MAX_PERIOD = 10_000


class NetworkParams(Section):
    """Width and depth of the U-Net. CIFAR-10 in the paper: 128 channels, multipliers 2, 2, 2, 4 blocks, attention at 16.

    The resolution halves from one multiplier to the next. `adaptive_scale` lets the noise level scale the activations of
    a block besides shifting them; the published DDPM++ weights only shift (false).
    """

    channels: Annotated[int, Field(ge=4, multiple_of=4)]
    multipliers: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    blocks: PositiveInt
    attention_resolutions: tuple[PositiveInt, ...]
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    label_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    adaptive_scale: bool = True


def build_unet(params: NetworkParams, shape: tuple[int, int, int], num_classes: int, seed: int) -> "UNet":
    """A U-Net for images of shape (H, W, C), weights drawn from seed; the global random state is left alone.

    Raises:
        InputError: an image size or an attention resolution that the network cannot have.
    """
    height, width, image_channels = shape
    if height != width or height not in (8, 16, 32, 64):
        raise InputError(f"generator: the EDM network makes square images of 8, 16, 32 or 64 pixels, got {height} x {width}")
    levels = [height >> level for level in range(len(params.multipliers))]
    if levels[-1] < 2:
        raise InputError(
            f"generator.network.multipliers: {height} pixels can be halved {height.bit_length() - 2} times at most, "
            f"got {len(levels)} multipliers; remove {len(levels) - height.bit_length() + 1}"
        )
    if unknown := set(params.attention_resolutions) - set(levels):
        raise InputError(
            f"generator.network.attention_resolutions: wanted some of {levels} (the resolutions of the levels), "
            f"got {sorted(unknown)}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet(params, height, image_channels, num_classes)


class UNet(nn.Module):
    """Scaled noisy images (B, C, H, W), noise levels c_noise (B,), labels (B,) int64 -> F of eq. 7 (B, C, H, W). Labels None:
    no image has one.

    Dropout, of activations and of labels, happens only with `dropping`, whatever train() or eval() says.
    """

    def __init__(self, params: NetworkParams, resolution: int, image_channels: int, num_classes: int) -> None:
        super().__init__()
        width, embedding = params.channels, 4 * params.channels
        self.num_classes, self.label_dropout = num_classes, params.label_dropout
        self.shape = (resolution, resolution, image_channels)
        self.position_channels = width
        self.map_label = linear(num_classes, width)
        self.map_layer0 = linear(width, embedding)
        self.map_layer1 = linear(embedding, embedding)

        def block(inputs: int, outputs: int, attention: bool = False, resample: str = "keep", joins: bool = False) -> Block:
            return Block(inputs, outputs, embedding, attention, resample, joins, params.dropout, params.adaptive_scale)

        widths = [width * multiplier for multiplier in params.multipliers]
        sizes = [resolution >> level for level in range(len(widths))]
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        self.enc[f"{resolution}x{resolution}_conv"] = conv(image_channels, width, 3)
        current, skips = width, [width]
        for size, outputs in zip(sizes, widths, strict=True):
            if size != resolution:
                self.enc[f"{size}x{size}_down"] = block(current, current, resample="down")
                skips.append(current)
            for index in range(params.blocks):
                self.enc[f"{size}x{size}_block{index}"] = block(current, outputs, size in params.attention_resolutions)
                current = outputs
                skips.append(current)
        for size, outputs in reversed(list(zip(sizes, widths, strict=True))):
            if size == sizes[-1]:
                self.dec[f"{size}x{size}_in0"] = block(current, current, attention=True)
                self.dec[f"{size}x{size}_in1"] = block(current, current)
            else:
                self.dec[f"{size}x{size}_up"] = block(current, current, resample="up")
            for index in range(params.blocks + 1):
                attention = index == params.blocks and size in params.attention_resolutions
                self.dec[f"{size}x{size}_block{index}"] = block(current + skips.pop(), outputs, attention, joins=True)
                current = outputs
        self.dec[f"{resolution}x{resolution}_aux_norm"] = group_norm(current)
        self.dec[f"{resolution}x{resolution}_aux_conv"] = conv(current, image_channels, 3, gain=0)

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor | None, dropping: bool = False) -> Tensor:
        embedding = self.embed(noise, labels, dropping)
        first, *encoder = self.enc.values()
        *decoder, last_norm, last_conv = self.dec.values()
        assert isinstance(first, nn.Conv2d)
        x = first(x.to(first.weight.dtype))
        skips = [x]
        for block in encoder:
            x = block(x, embedding, dropping)
            skips.append(x)
        for block in decoder:
            x = block(torch.cat([x, skips.pop()], dim=1) if block.joins else x, embedding, dropping)
        output: Tensor = last_conv(silu(last_norm(x)))
        return output

    def embed(self, noise: Tensor, labels: Tensor | None, dropping: bool) -> Tensor:
        """Noise levels (B,) and labels (B,) -> what conditions every block (B, 4 channels)."""
        if labels is None:
            one_hot = noise.new_zeros(len(noise), self.num_classes)
        else:
            one_hot = F.one_hot(labels, self.num_classes).to(noise.dtype)
        if dropping and self.label_dropout:
            kept = torch.rand(len(noise), 1, device=noise.device) >= self.label_dropout
            one_hot = one_hot * kept
        # sqrt(K): a one-hot vector of K classes then has the mean square 1 that the initialisation expects
        labelled = self.map_label(one_hot * math.sqrt(self.num_classes))
        embedding = positions(noise, self.position_channels) + labelled
        return silu(self.map_layer1(silu(self.map_layer0(embedding))))


class Block(nn.Module):
    """Residual block, optionally with a change of resolution and with self-attention: (B, inputs, H, W) -> (B, outputs, ...).

    `resample` is "keep", "down" (mean of 2 x 2: the box filter [1, 1]) or "up" (its transpose: each pixel becomes 2 x 2);
    `joins`: the input includes a skip connection of the encoder.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding: int,
        attention: bool,
        resample: str,
        joins: bool,
        dropout: float,
        adaptive_scale: bool,
    ) -> None:
        super().__init__()
        self.resample_mode, self.joins, self.dropout, self.adaptive_scale = resample, joins, dropout, adaptive_scale
        self.norm0, self.conv0 = group_norm(inputs), conv(inputs, outputs, 3)
        self.affine = linear(embedding, outputs * (2 if adaptive_scale else 1))
        self.norm1, self.conv1 = group_norm(outputs), conv(outputs, outputs, 3, gain=0)
        self.skip = conv(inputs, outputs, 1) if inputs != outputs or resample != "keep" else None
        self.norm2 = group_norm(outputs) if attention else None
        self.qkv = conv(outputs, 3 * outputs, 1, gain=math.sqrt(0.2)) if attention else None
        self.proj = conv(outputs, outputs, 1, gain=0) if attention else None

    def forward(self, x: Tensor, embedding: Tensor, dropping: bool) -> Tensor:
        h = self.conv0(self.resample(silu(self.norm0(x))))
        condition = self.affine(embedding).to(h.dtype)[:, :, None, None]
        if self.adaptive_scale:
            scale, shift = condition.chunk(2, dim=1)
            h = silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        else:
            h = silu(self.norm1(h + condition))
        h = self.conv1(F.dropout(h, self.dropout, dropping))
        x = self.resample(x)
        x = (h + (x if self.skip is None else self.skip(x))) * SKIP_SCALE
        return x if self.qkv is None else self.attend(x)

    def resample(self, x: Tensor) -> Tensor:
        if self.resample_mode == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.resample_mode == "up" else x

    def attend(self, x: Tensor) -> Tensor:
        """Add self-attention of one head over all pixels of x (B, C, H, W)."""
        assert self.norm2 is not None
        assert self.qkv is not None
        assert self.proj is not None
        # published layout of the 3 C channels: query, key and value of channel 0, then those of channel 1, ...
        q, k, v = (
            self.qkv(self.norm2(x)).flatten(2).unflatten(1, (-1, 3)).permute(2, 0, 3, 1)[:, :, None].contiguous().unbind(0)
        )
        # the fused kernels want an axis for the heads
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0].mT.reshape(x.shape)
        result: Tensor = (x + self.proj(mixed)) * SKIP_SCALE
        return result


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x), in the memory of x where no gradient is wanted."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def in_bf16(net: UNet) -> UNet:
    """A copy that computes in bfloat16, and the embeddings of noise levels and labels in float32."""
    low = copy.deepcopy(net)
    for layer in low.modules():
        if isinstance(layer, nn.Conv2d | GroupNorm):
            layer.to(torch.bfloat16)
    return low


def positions(noise: Tensor, channels: int) -> Tensor:
    """Sines, then cosines, of the levels (B,) at channels / 2 frequencies from 1 down to 1 / 10000: (B, channels)."""
    half = channels // 2
    exponents = torch.arange(half, dtype=noise.dtype, device=noise.device) / (half - 1)
    angles = noise[:, None] * torch.pow(1 / MAX_PERIOD, exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class GroupNorm(nn.GroupNorm):
    """By way of channels first where a CPU's kernel for bfloat16 in channels last takes several times as long: on maps smaller
    than 32 x 32."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.bfloat16 or x.device.type != "cpu" or x.shape[2] * x.shape[3] >= 1024:
            return super().forward(x)
        return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)


def group_norm(channels: int) -> GroupNorm:
    """At most 32 groups of at least 4 channels; the greatest common divisor keeps any width valid."""
    return GroupNorm(math.gcd(channels, min(32, channels // 4)), channels, eps=1e-6)


def conv(inputs: int, outputs: int, size: int, gain: float = 1.0) -> nn.Conv2d:
    """Convolution that keeps the resolution, weights Xavier-uniform times gain, bias zero."""
    layer = nn.Conv2d(inputs, outputs, size, padding=size // 2)
    initialise(layer, gain)
    return layer


def linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    initialise(layer, 1.0)
    return layer


def initialise(layer: nn.Conv2d | nn.Linear, gain: float) -> None:
    nn.init.xavier_uniform_(layer.weight, gain)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
