"""One batch: rows as they are stored in, augmented images with labels and radii out."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.batches import to_float
from pipeline.training.augmentation import AugmentationParams, augment
from pipeline.training.cutmix import mixed_labels, partners, paste, shares, windows


@dataclass(frozen=True)
class Rows:
    """Images (B, H, W, C) uint8, labels (B,), radii (B,) in pixel range, which are on the CPU."""

    images: Tensor
    labels: Tensor
    eps: Tensor

    def to(self, device: torch.device) -> "Rows":
        return Rows(self.images.to(device, non_blocking=True), self.labels.to(device, non_blocking=True), self.eps)


@dataclass(frozen=True)
class Batch:
    """Images x (B, C, H, W) in [0, 1], labels y (B,) or their probabilities (B, K), radii eps (B,) in pixel range. These are on
    the CPU, whatever device the images are on: which rows are attacked is then known without waiting for a GPU."""

    x: Tensor
    y: Tensor
    eps: Tensor

    @cached_property
    def attacked(self) -> Tensor:
        """The rows (n,) that are attacked."""
        return (self.eps > 0).nonzero().squeeze(1)

    @cached_property
    def rest(self) -> Tensor:
        """The other rows."""
        return (self.eps <= 0).nonzero().squeeze(1)


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
        cut = torch.from_numpy(windows(self.batch_size, height, width, seed=self.seed, step=step)[part])
        share, device = shares(cut, height, width), own.images.device
        mixed = paste(images[0], images[1], cut.to(device, non_blocking=True))
        labels = mixed_labels(own.labels, rows[1].labels, share.to(device, non_blocking=True), self.num_classes)
        return Batch(to_float(mixed), labels, own.eps.lerp(rows[1].eps, share))
