"""Images from a denoiser: the deterministic Heun solver of EDM (Karras et al. 2022, arXiv:2206.00364, algorithm 1)."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Annotated, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from pipeline.edm.network import UNet
from pipeline.edm.preconditioning import denoise
from pipeline.images import Chunk, Images
from pipeline.params import Section

Denoiser = Callable[[Tensor, Tensor], Tensor]  # (x (B, C, H, W) float64, sigma ()) -> expected clean x, float64


class SamplerParams(Section):
    """Noise levels of the solver; 18 steps are 35 evaluations of the network."""

    num_steps: Annotated[int, Field(ge=2)] = 18
    sigma_min: PositiveFloat = 0.002
    sigma_max: PositiveFloat = 80.0
    rho: PositiveFloat = 7.0

    @model_validator(mode="after")
    def ordered(self) -> Self:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"wanted sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}")
        return self


class EdmSourceParams(Section):
    """How many images to draw from the generator of the `generator` stage, and how.

    How sums are rounded depends on how many images the network sees at once and on the number of CPU threads (measured: up
    to 1e-5, which can move a rare pixel by one of its 256 values). So `batch_size` is part of the result: an image is given
    by (seed, row, batch_size), whatever the number of images or the shards they are made in.
    """

    kind: Literal["edm"]
    num_images: PositiveInt
    batch_size: PositiveInt
    seed: NonNegativeInt
    sampler: SamplerParams = SamplerParams()


def sigma_schedule(num_steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """Eq. 5: num_steps levels from sigma_max to sigma_min, evenly spaced in sigma^(1/rho), then 0: (num_steps + 1,) float64."""
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    sigmas = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def heun(denoiser: Denoiser, noise: Tensor, sigmas: Tensor) -> Tensor:
    """Algorithm 1 without churn: unit noise (B, ...) float64 carried along dx/dsigma = (x - D(x; sigma)) / sigma to sigma 0."""
    x = noise * sigmas[0]
    for now, then in pairwise(sigmas):
        slope = (x - denoiser(x, now)) / now
        euler = x + (then - now) * slope
        if then > 0:
            slope = (slope + (euler - denoiser(euler, then)) / then) / 2
        x = x + (then - now) * slope
    return x


def image_noise(seed: int, row: int, shape: tuple[int, int, int]) -> NDArray[np.float64]:
    """Unit noise (C, H, W) of one image of shape (H, W, C).

    Philox keyed by (seed, row), because a CPU `torch.Generator` keeps 32 bits of its seed: by chance, some hundred thousand
    of 50M hashed seeds would be equal.
    """
    height, width, channels = shape
    return np.random.Generator(np.random.Philox(key=np.array([seed, row], np.uint64))).standard_normal(
        (channels, height, width)
    )


def to_uint8(x: Tensor) -> Images:
    """Images (B, C, H, W) in [-1, 1] -> the nearest of the 256 values, (B, H, W, C) uint8; values outside are clipped."""
    return (x.permute(0, 2, 3, 1) * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).contiguous().cpu().numpy()


def sample_images(
    net: UNet,
    start: int,
    stop: int,
    *,
    batch_size: int,
    seed: int,
    sigma_data: float,
    num_steps: int,
    sigma_min: float,
    sigma_max: float,
    rho: float,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Chunk]:
    """The synthetic images of rows [start, stop) and their labels, row % number of classes, at most batch_size at a time.

    The network always sees the rows [k batch_size, (k + 1) batch_size) together, and what was not asked for is cut off.
    """
    sigmas = sigma_schedule(num_steps, sigma_min, sigma_max, rho)
    for first in range(start - start % batch_size, stop, batch_size):
        rows = np.arange(first, first + batch_size)
        wanted = slice(max(start - first, 0), min(stop - first, batch_size))
        images = sample_rows(net, rows, seed, sigma_data, sigmas)
        yield images[wanted], (rows % net.num_classes)[wanted]
        if progress is not None:
            progress(min(first + batch_size, stop) - start, stop - start)


@torch.inference_mode()
def sample_rows(net: UNet, rows: NDArray[np.int64], seed: int, sigma_data: float, sigmas: Tensor) -> Images:
    """The synthetic images of rows (B,) in one batch: (B, H, W, C) uint8."""
    device = next(net.parameters()).device
    noise = torch.from_numpy(np.stack([image_noise(seed, row, net.shape) for row in rows])).to(device)
    labels = torch.from_numpy(rows % net.num_classes).to(device)

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        levels = sigma.to(device, torch.float32).expand(len(x))
        return denoise(net, x.float().contiguous(memory_format=torch.channels_last), levels, labels, sigma_data).double()

    return to_uint8(heun(denoiser, noise, sigmas))
