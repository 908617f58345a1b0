"""CutMix (Yun et al., arXiv:1905.04899): a window of every image shows another image of the batch.

Label and radius of the mixture are the means of those of both images by the areas they have in it. The paper has the labels
so; the radius is our choice: in the mean over a batch it is what it was, so that a strategy is trained against the radii it
chose, where the smaller of the two would lower them. The share of the window is uniform (Beta(1, 1), as in the published code
of Wang et al., arXiv:2302.04638, which however cuts one window for a whole batch); its centre is anywhere, and what of it
leaves the image counts for nothing.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.randomness import numpy_stream


def partners(batch_size: int, *, seed: int, step: int) -> NDArray[np.int64]:
    """The place in the batch of the image in the window of each image (batch_size,)."""
    return numpy_stream(seed, step, "cutmix").permutation(batch_size)


def windows(batch_size: int, height: int, width: int, *, seed: int, step: int) -> NDArray[np.int64]:
    """Top, bottom, left, right (batch_size, 4) of the window of each image; bottom and right are outside."""
    generator = numpy_stream(seed, step, "cutmix")
    generator.permutation(batch_size)  # the draw of partners
    side = np.sqrt(generator.random(batch_size))
    edges = []
    for size in (height, width):
        length, centre = (size * side).astype(np.int64), generator.integers(0, size, batch_size)
        edges += [(centre - length // 2).clip(0), (centre - length // 2 + length).clip(max=size)]
    return np.stack(edges, axis=1)


def shares(windows: Tensor, height: int, width: int) -> Tensor:
    """The share (B,) of each image that its window (B, 4) takes."""
    top, bottom, left, right = windows.T
    return ((bottom - top) * (right - left)).float() / (height * width)


def paste(images: Tensor, others: Tensor, windows: Tensor) -> Tensor:
    """Images (B, H, W, C) with the windows (B, 4) of the others."""
    _, height, width, _ = images.shape
    top, bottom, left, right = windows.T[:, :, None]
    row, column = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    inside = ((row >= top) & (row < bottom))[:, :, None] & ((column >= left) & (column < right))[:, None, :]
    return torch.where(inside[..., None], others, images)


def mixed_labels(y: Tensor, other: Tensor, share: Tensor, num_classes: int) -> Tensor:
    """Probabilities (B, K) of labels y and other (B,), the latter with the given share (B,)."""
    own, its = F.one_hot(y, num_classes).float(), F.one_hot(other, num_classes).float()
    return own + share[:, None] * (its - own)
