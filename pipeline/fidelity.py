"""How near a set of images is to the real ones: Frechet distance, density and coverage of features, copies in pixels."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.images import Images, ImageStore

CHUNK = 2048  # rows of one side of a distance matrix; the other side has as many
COPY_RATIO = 1 / 3


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
    """For each image (m,): the row of its nearest training image, the L2 distance to it in the pixel range, and the share
    of that in the distance to the second nearest (1 where both are 0: the training set has the image twice)."""

    row: NDArray[np.int64]
    distance: NDArray[np.float64]
    ratio: NDArray[np.float64]

    @property
    def copied(self) -> NDArray[np.bool_]:
        """Nearer to one training image than a third of the way to the next (Gu et al., arXiv:2310.02664, section 2, after
        Yoon et al. 2023), or equal to one."""
        return (self.ratio < COPY_RATIO) | (self.distance == 0)


def nearest_images(images: Images, train: ImageStore, device: torch.device) -> Nearest:
    """Search all of the store for images (m, H, W, C), in memory for m of them and a chunk of the store. Float32 finds
    the two nearest rows; their distances are then exact."""
    best = torch.full((len(images), 2), torch.inf, device=device)
    found = torch.zeros((len(images), 2), dtype=torch.int64, device=device)
    for rows, chunk, _ in train.chunks(CHUNK):
        numbers = torch.from_numpy(rows).to(device)
        reference = flat(chunk, device)
        for first in range(0, len(images), CHUNK):
            part = slice(first, first + CHUNK)
            distance = torch.cdist(flat(images[part], device), reference)
            joined = torch.cat([best[part], distance], dim=1)
            names = torch.cat([found[part], numbers.expand(len(distance), -1)], dim=1)
            best[part], order = joined.topk(2, dim=1, largest=False)
            found[part] = names.gather(1, order)
    pairs = found.cpu().numpy()
    exact = np.stack([distances(images, train.batch(pairs[:, column])) for column in range(2)], axis=1)
    nearer = exact.argsort(axis=1, kind="stable")
    near, far = np.take_along_axis(exact, nearer, axis=1).T
    ratio = np.divide(near, far, out=np.ones_like(near), where=far > 0)
    return Nearest(np.take_along_axis(pairs, nearer, axis=1)[:, 0], near, ratio)


def flat(images: Images, device: torch.device) -> Tensor:
    return torch.from_numpy(images).to(device).flatten(1).float() / 255


def distances(one: Images, other: Images) -> NDArray[np.float64]:
    """L2 distance of each image (m, H, W, C) to that of the same place in other, in the pixel range: (m,)."""
    found = [
        np.sqrt((np.square(one[part].astype(np.int64) - other[part].astype(np.int64))).sum(axis=(1, 2, 3))) / 255
        for part in (slice(first, first + CHUNK) for first in range(0, len(one), CHUNK))
    ]
    return np.concatenate(found)
