"""Images from a denoiser: the deterministic Heun solver of EDM (Karras et al. 2022, arXiv:2206.00364, algorithm 1)."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Annotated, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from pipeline.edm.network import UNet, in_bf16
from pipeline.edm.preconditioning import Network, guided_denoise
from pipeline.images import Chunk, Images
from pipeline.params import InputError, Section

BLOCK = 32  # images that the network sees at once on a CPU
Draw = Callable[[NDArray[np.int64], NDArray[np.int64]], Images]  # rows (B,), labels (B,) -> images
Denoiser = Callable[[Tensor, Tensor], Tensor]  # (x (B, C, H, W) float64, sigma ()) -> expected clean x, float64


class SamplerParams(Section):
    """Noise levels of the solver; 18 steps are 35 evaluations of the network. `guidance_scale` above 1 pulls the images
    towards their class, at twice the evaluations, and wants a network with label dropout; 1 is off. `bf16` computes the
    network in bfloat16 (the state stays float64), `compile` with torch.compile: both change the images a little."""

    num_steps: Annotated[int, Field(ge=2)] = 18
    sigma_min: PositiveFloat = 0.002
    sigma_max: PositiveFloat = 80.0
    rho: PositiveFloat = 7.0
    guidance_scale: NonNegativeFloat = 1.0
    bf16: bool = False
    compile: bool = False

    @model_validator(mode="after")
    def ordered(self) -> Self:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"wanted sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}")
        return self

    @property
    def evaluations(self) -> int:
        """Of the network, for one image."""
        return (2 * self.num_steps - 1) * (1 if self.guidance_scale == 1 else 2)


class EdmSourceParams(Section):
    """How many images to draw from the generator of the `generator` stage, and how.

    On a CPU an image is given by (seed, row), bit for bit, whatever `batch_size`, the number of images, shards or ranks. (1 and
    2 threads were measured to give the same; another number may round sums in another way.) On a GPU the network sees
    `batch_size` images at once, and another number changes how sums are rounded (about 1e-5 in [-1, 1], which moves a rare
    pixel by one of its 256 values): there an image is given by (seed, row, batch_size), whatever the number of images or of
    shards.
    """

    kind: Literal["edm"]
    num_images: PositiveInt
    batch_size: PositiveInt
    seed: Annotated[int, Field(ge=0, lt=2**64)]
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
    sampler: SamplerParams,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Chunk]:
    """The synthetic images of rows [start, stop) and their labels, row % number of classes, at most batch_size at a time.

    On a GPU the network always sees the rows [k batch_size, (k + 1) batch_size) together, and what was not asked for is cut
    off.

    Raises:
        InputError: guidance with a network that never saw images without their labels.
    """
    draw, alone = image_sampler(net, seed, sigma_data, sampler), on_cpu(net)
    for first in range(start - start % batch_size, stop, batch_size):
        wanted = slice(max(start - first, 0), min(stop - first, batch_size))
        rows = np.arange(first, first + batch_size)
        if alone:
            rows, wanted = rows[wanted], slice(None)
        labels = rows % net.num_classes
        yield draw(rows, labels)[wanted], labels[wanted]
        if progress is not None:
            progress(min(first + batch_size, stop) - start, stop - start)


def on_cpu(net: UNet) -> bool:
    """Whether an image does not depend on those that it is drawn with."""
    return next(net.parameters()).device.type == "cpu"


def blocks(rows: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Positions in rows (n,) as blocks (m, size) in which each row has the place row % size; -1 where a place is empty."""
    place = rows % size
    order = np.argsort(place, kind="stable")
    counts = np.bincount(place, minlength=size)
    table = np.full((counts.max(), size), -1)
    table[np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts), place[order]] = order
    return table


def image_sampler(net: UNet, seed: int, sigma_data: float, sampler: SamplerParams) -> Draw:
    """A function of rows (B,), which name the noise, and labels (B,): their images (B, H, W, C) uint8.

    On a GPU they are one batch. On a CPU sums are rounded in another way for another number of images, and perhaps for another
    place among them: there the network sees blocks of one size in which a row has one place; empty places hold zeros.
    """
    if sampler.guidance_scale != 1 and not net.label_dropout:
        raise InputError(
            f"synthesize.source.sampler.guidance_scale: wanted 1, got {sampler.guidance_scale:g}: the network was trained "
            "without label dropout; set generator.network.label_dropout, such as 0.1"
        )
    device = next(net.parameters()).device
    exact = in_bf16(net) if sampler.bf16 else net
    network: Network = torch.compile(exact) if sampler.compile else exact
    sigmas = sigma_schedule(sampler.num_steps, sampler.sigma_min, sampler.sigma_max, sampler.rho)

    @torch.inference_mode()
    def draw_batch(noise: NDArray[np.float64], classes: NDArray[np.int64]) -> Images:
        labels = torch.from_numpy(classes).to(device)

        def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
            levels = sigma.to(device, torch.float32).expand(len(x))
            x = x.float().contiguous(memory_format=torch.channels_last)
            return guided_denoise(network, x, levels, labels, sigma_data, sampler.guidance_scale).double()

        return to_uint8(heun(denoiser, torch.from_numpy(noise).to(device), sigmas))

    def draw(rows: NDArray[np.int64], classes: NDArray[np.int64]) -> Images:
        noise = np.stack([image_noise(seed, row, net.shape) for row in rows])
        if not on_cpu(net):
            return draw_batch(noise, classes)
        images = np.empty((len(rows), *net.shape), np.uint8)
        for block in blocks(rows, BLOCK):
            here = np.flatnonzero(block >= 0)
            padded, labels = np.zeros((BLOCK, *noise.shape[1:])), np.zeros(BLOCK, np.int64)
            padded[here], labels[here] = noise[block[here]], classes[block[here]]
            images[block[here]] = draw_batch(padded, labels)[here]
        return images

    return draw
