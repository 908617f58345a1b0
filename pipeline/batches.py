"""Training batches: which rows come next, their images on the device, their augmentation."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import NonNegativeInt
from torch import Tensor

from pipeline.artifacts import SOURCES
from pipeline.images import Images, ImageStore
from pipeline.params import InputError, Section
from pipeline.randomness import numpy_stream, torch_stream


class AugmentationParams(Section):
    """Random crop after zero padding by `crop_padding` pixels on each side, and a horizontal flip of half the images."""

    crop_padding: NonNegativeInt
    flip: bool


@dataclass(frozen=True)
class Pool:
    """The kept rows of one store, 8 bytes each: row numbers (n,) and attack radii (n,) in pixel range."""

    store: ImageStore
    rows: NDArray[np.uint32]
    eps: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Batch:
    """Images x (B, C, H, W) in [0, 1], labels y (B,), radii eps (B,) in pixel range, all on the device."""

    x: Tensor
    y: Tensor
    eps: Tensor


def to_tensor(images: Images, device: torch.device) -> Tensor:
    """uint8 (B, H, W, C) -> float32 (B, C, H, W) in [0, 1], channels last in memory."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float().div_(255)


def full_pool(store: ImageStore, eps: float) -> Pool:
    """All rows of a store with the same radius."""
    return Pool(store, np.arange(len(store), dtype=np.uint32), np.full(len(store), eps, np.float32))


def pools_of_manifest(manifest: pa.Table, stores: dict[str, ImageStore]) -> dict[str, Pool]:
    """The kept rows of each source.

    Raises:
        InputError: the manifest names rows that a store does not have.
    """
    pools = {}
    for source in SOURCES:
        part = manifest.filter(pc.and_(pc.equal(manifest["source"], source), manifest["kept"]))
        rows, eps = part["row"].to_numpy(), part["eps"].to_numpy()
        if len(rows) and rows.max() >= len(stores[source]):
            raise InputError(
                f"manifest: wanted rows of {source} below {len(stores[source])}, got {rows.max()}; "
                "it was made for other images: run `dvc repro`"
            )
        pools[source] = Pool(stores[source], rows.astype(np.uint32), eps.astype(np.float32))
    return pools


def kept_fraction(manifest: pa.Table) -> float:
    """Share of all rows that are kept."""
    return float(pc.mean(manifest["kept"]).as_py())


def split_holdout(pool: Pool, count: int, seed: int) -> tuple[Pool, NDArray[np.int64]]:
    """Take count rows of the store out of the pool: (pool without them, held-out rows (count,)). They depend on the
    store and the seed alone, so every strategy holds out the same images.

    Raises:
        InputError: the store is too small.
    """
    if count >= len(pool.store):
        raise InputError(f"training.holdout: wanted fewer than the {len(pool.store)} real training images, got {count}")
    held_out = np.sort(numpy_stream(seed, 0, "holdout").permutation(len(pool.store))[:count])
    stay = ~np.isin(pool.rows, held_out)
    return Pool(pool.store, pool.rows[stay], pool.eps[stay]), held_out


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    return numpy_stream(seed, epoch, "real_order").permutation(count)


def draw(
    pools: dict[str, Pool], step: int, *, batch_size: int, synthetic_fraction: float, seed: int
) -> dict[str, NDArray[np.int64]]:
    """Positions in each pool of the batch of a step, a function of its arguments alone, so any step can be resumed.
    Real rows come in a new random order every epoch, each once; synthetic rows are drawn with replacement."""
    real, synthetic = pools["real"], pools["synthetic"]
    if not len(real) and not len(synthetic):
        raise InputError("training: no image is left to train on; keep more, or hold out fewer")
    fraction = synthetic_fraction if len(real) and len(synthetic) else float(len(synthetic) > 0)
    num_synthetic = round(fraction * batch_size)
    places = np.arange(step * (batch_size - num_synthetic), (step + 1) * (batch_size - num_synthetic))
    epochs = places // max(1, len(real))
    real_positions = np.empty(len(places), np.int64)
    for epoch in np.unique(epochs):
        now = epochs == epoch
        real_positions[now] = epoch_order(seed, int(epoch), len(real))[places[now] % len(real)]
    synthetic_positions = numpy_stream(seed, step, "synthetic_draw").integers(0, max(1, len(synthetic)), num_synthetic)
    return {"real": real_positions, "synthetic": synthetic_positions}


def load_batch(pools: dict[str, Pool], positions: dict[str, NDArray[np.int64]], device: torch.device) -> Batch:
    """Read the drawn images and put them on the device, real ones first."""
    images, labels, eps = [], [], []
    for source in SOURCES:
        pool, where = pools[source], positions[source]
        rows = pool.rows[where].astype(np.int64)
        images.append(pool.store.batch(rows))
        labels.append(pool.store.labels[rows])
        eps.append(pool.eps[where])
    return Batch(
        to_tensor(np.concatenate(images), device),
        torch.from_numpy(np.concatenate(labels)).to(device),
        torch.from_numpy(np.concatenate(eps)).to(device),
    )


def augment(x: Tensor, params: AugmentationParams, *, seed: int, step: int) -> Tensor:
    """Randomly crop and flip x (B, C, H, W) on its device, every image on its own."""
    generator = torch_stream(seed, step, "augmentation", x.device)
    batch, _, height, width = x.shape
    if params.crop_padding:
        pad = params.crop_padding
        offsets = torch.randint(0, 2 * pad + 1, (2, batch, 1), generator=generator, device=x.device)
        rows = offsets[0] + torch.arange(height, device=x.device)
        columns = offsets[1] + torch.arange(width, device=x.device)
        padded = F.pad(x, (pad, pad, pad, pad)).permute(0, 2, 3, 1)
        which = torch.arange(batch, device=x.device)[:, None, None]
        x = padded[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if params.flip:
        flipped = torch.rand(batch, generator=generator, device=x.device) < 0.5
        x = torch.where(flipped[:, None, None, None], x.flip(3), x)
    return x
