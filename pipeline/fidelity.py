"""How near a set of images is to the real ones: Frechet distance, density and coverage of features, copies in pixels."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.images import Images, ImageStore

CHUNK = 2048  # rows of one side of a distance matrix; the other side has as many
COPY_RATIO = 1 / 3
SAME_LEVELS = 4  # root of the mean squared difference, of 255, up to which two training images count as one


class Given(nn.Module):
    """The features are what is given."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        return x


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Of the normal distributions with the means and covariances of the features (n, d) and (m, d), squared as usual:
    |mu - mu'|^2 + tr(S + S' - 2 (S S')^(1/2)) (Heusel et al., arXiv:1706.08500, eq. 6). Biased upwards for few rows."""
    from torchmetrics.image.fid import FrechetInceptionDistance  # seconds to import, and needed here alone

    metric = FrechetInceptionDistance(feature=Given(real.shape[1]))
    for features, is_real in ((real, True), (fake, False)):
        metric.update(features.cpu().double(), real=is_real)
    return float(metric.compute())


def density_and_coverage(real: Tensor, fake: Tensor, neighbours: int) -> tuple[float, float]:
    """Naeem et al., arXiv:2002.09797, eq. 3 and 4, with balls around the real features (n, d) up to their k-th nearest
    real neighbour: density is the mean number of balls that a fake (m, d) lies in, over k; coverage the share of balls
    with a fake in them. Both are about 1 for equal distributions."""
    radii = torch.cat([torch.cdist(part, real).kthvalue(neighbours + 1, dim=1).values for part in real.split(CHUNK)])
    hits, covered = 0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for part in fake.split(CHUNK):
        for first in range(0, len(real), CHUNK):
            balls = slice(first, first + CHUNK)
            inside = torch.cdist(part, real[balls]) <= radii[balls]
            hits += int(inside.sum())
            covered[balls] |= inside.any(dim=0)
    return hits / (neighbours * len(fake)), covered.double().mean().item()


@dataclass(frozen=True)
class Nearest:
    """For each image (m,): the row of its nearest training image and whether that is mirrored, the L2 distance to it in the
    pixel range, and the share of that in the distance to the nearest other training image (1 where there is no other)."""

    row: NDArray[np.int64]
    mirrored: NDArray[np.bool_]
    distance: NDArray[np.float64]
    ratio: NDArray[np.float64]

    @property
    def copied(self) -> NDArray[np.bool_]:
        """Nearer to one training image than a third of the way to the next (Gu et al., arXiv:2310.02664, section 2, after
        Yoon et al. 2023), or equal to one."""
        return (self.ratio < COPY_RATIO) | (self.distance == 0)


def nearest_images(images: Images, train: ImageStore, device: torch.device, *, mirrored: bool = False) -> Nearest:
    """Search all of the store for images (m, H, W, C), and the images of the store mirrored too where that is said.

    The other training image is the nearest that is not the same as the first, up to `SAME_LEVELS` of 255 and mirroring, so
    that what is in the store several times is found out as well. Memory is that for m images and a chunk of the store.
    """
    first, _ = search(images, train, device, mirrored, None)
    nearest = views(train.batch(first // 2), first % 2 == 1)
    second, known = search(images, train, device, mirrored, nearest)
    near, far = distances(images, nearest), distances(images, views(train.batch(second // 2), second % 2 == 1))
    ratio = np.divide(near, far, out=np.ones_like(near), where=known & (far > 0))
    return Nearest(first // 2, first % 2 == 1, near, ratio)


def search(
    images: Images, train: ImageStore, device: torch.device, mirrored: bool, unlike: Images | None
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """2 row + (is mirrored) of the nearest training image of each (m,), in float32, and whether there is one. Training images
    that are the same as that of `unlike` (m, H, W, C) do not count."""
    best = torch.full((len(images),), torch.inf, device=device)
    found = torch.zeros(len(images), dtype=torch.int64, device=device)
    same_distance = SAME_LEVELS / 255 * math.prod(train.shape) ** 0.5
    for rows, chunk, _ in train.chunks(CHUNK):
        both = [flat(chunk, device), flat(mirror(chunk), device)]
        for first in range(0, len(images), CHUNK):
            part = slice(first, first + CHUNK)
            x = flat(images[part], device)
            distance = torch.stack([torch.cdist(x, view) for view in both[: 1 + mirrored]], dim=2)
            if unlike is not None:
                other = flat(unlike[part], device)
                same = torch.stack([torch.cdist(other, view) for view in both]).amin(dim=0) <= same_distance
                distance = distance.masked_fill(same[:, :, None], torch.inf)
            values, places = distance.flatten(1).min(dim=1)
            if not mirrored:
                places = 2 * places
            found[part] = torch.where(values < best[part], 2 * int(rows[0]) + places, found[part])
            best[part] = torch.minimum(values, best[part])
    return found.cpu().numpy(), best.isfinite().cpu().numpy()


def mirror(images: Images) -> Images:
    """Left and right of (m, H, W, C) exchanged."""
    return np.ascontiguousarray(images[:, :, ::-1])


def views(images: Images, mirrored: NDArray[np.bool_]) -> Images:
    """The images (m, H, W, C), mirrored where (m,) says so."""
    return np.where(mirrored[:, None, None, None], mirror(images), images)


def flat(images: Images, device: torch.device) -> Tensor:
    return torch.from_numpy(images).to(device).flatten(1).float() / 255


def distances(one: Images, other: Images) -> NDArray[np.float64]:
    """L2 distance of each image (m, H, W, C) to that of the same place in other, in the pixel range: (m,)."""
    found = [
        np.sqrt((np.square(one[part].astype(np.int64) - other[part].astype(np.int64))).sum(axis=(1, 2, 3))) / 255
        for part in (slice(first, first + CHUNK) for first in range(0, len(one), CHUNK))
    ]
    return np.concatenate(found)
