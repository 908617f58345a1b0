"""Random crops and flips of a batch on its device, each image on its own."""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import NonNegativeInt
from torch import Tensor

from pipeline.params import Section
from pipeline.randomness import torch_stream


class AugmentationParams(Section):
    """Random crop after zero padding by `crop_padding` pixels on each side, and a horizontal flip of half the images; with
    `cutmix` then every image has a window of another one (see `pipeline.training.cutmix`)."""

    crop_padding: NonNegativeInt
    flip: bool
    cutmix: bool = False


def augment(
    images: Tensor,
    params: AugmentationParams,
    *,
    seed: int,
    step: int,
    part: NDArray[np.int64] | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """Randomly crop and flip images (B, H, W, C) on their device, every one on its own. They may be the places part of a
    batch of batch_size: an image is treated alike however the batch is shared out."""
    device = images.device
    generator = torch_stream(seed, step, "augmentation", device)
    batch, height, width, channels = images.shape
    batch_size = batch_size or batch
    places = torch.from_numpy(np.arange(batch) if part is None else part).to(device, non_blocking=True)
    if pad := params.crop_padding:
        top, left = torch.randint(0, 2 * pad + 1, (2, batch_size, 1), generator=generator, device=device)[:, places]
        padded = F.pad(images, (0, 0, pad, pad, pad, pad))
        tall, wide = height + 2 * pad, width + 2 * pad
        # A row of a crop is width pixels in one piece of memory: it is found by where it begins.
        pieces = padded.as_strided((batch * tall * wide - width + 1, width * channels), (channels, 1))
        rows = torch.arange(batch, device=device)[:, None] * tall + top + torch.arange(height, device=device)
        images = pieces.index_select(0, (rows * wide + left).flatten()).view(batch, height, width, channels)
    if params.flip:
        flipped = (torch.rand(batch_size, generator=generator, device=device) < 0.5)[places]
        # Copies of whole images, four times as fast on a CPU as torch.where.
        images = torch.cat([images, images.flip(2)]).index_select(0, torch.arange(batch, device=device) + batch * flipped)
    return images
