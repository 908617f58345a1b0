"""One batch: rows as they are stored in, augmented images with labels and radii out."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.batches import to_float
from pipeline.training.augmentation import AugmentationParams, augment
from pipeline.training.cutmix import mixed_labels, partners, paste, windows


@dataclass(frozen=True)
class Rows:
    """Images (B, H, W, C) uint8, labels (B,), radii (B,) in pixel range."""

    images: Tensor
    labels: Tensor
    eps: Tensor

    def to(self, device: torch.device) -> "Rows":
        return Rows(*(part.to(device, non_blocking=True) for part in (self.images, self.labels, self.eps)))


@dataclass(frozen=True)
class Batch:
    """Images x (B, C, H, W) in [0, 1], labels y (B,) or their probabilities (B, K), radii eps (B,) in pixel range."""

    x: Tensor
    y: Tensor
    eps: Tensor


@dataclass(frozen=True)
class Plan:
    """How the places of the batches of a training are turned into images; every random number is that of a place in the
    global batch of a step, so ranks, micro-batches and a resumed run agree."""

    augmentation: AugmentationParams
    batch_size: int
    num_classes: int
    seed: int

    def wanted(self, step: int, part: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """The places of the batch that the images at the places part are made of: themselves, and with CutMix their
        partners."""
        return [part, partners(self.batch_size, seed=self.seed, step=step)[part]] if self.augmentation.cutmix else [part]

    def finish(self, step: int, part: NDArray[np.int64], rows: list[Rows]) -> Batch:
        """The images at the places part, from the rows at `wanted`, on their device."""
        images = [
            augment(found.images, self.augmentation, seed=self.seed, step=step, part=places, batch_size=self.batch_size)
            for found, places in zip(rows, self.wanted(step, part), strict=True)
        ]
        own = rows[0]
        if len(rows) == 1:
            return Batch(to_float(images[0]), own.labels, own.eps)
        _, height, width, _ = own.images.shape
        cut = windows(self.batch_size, height, width, seed=self.seed, step=step)[part]
        mixed, share = paste(images[0], images[1], torch.from_numpy(cut).to(own.images.device))
        labels = mixed_labels(own.labels, rows[1].labels, share, self.num_classes)
        return Batch(to_float(mixed), labels, own.eps.lerp(rows[1].eps, share))
