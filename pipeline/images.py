"""Image store: sharded uint8 memory maps with labels. Opening one costs no read; a batch costs only its own bytes."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import digest_file, publish, read_json, write_json
from pipeline.params import InputError

Images = NDArray[np.uint8]  # (n, H, W, C)
Labels = NDArray[np.int64]  # (n,)
Chunk = tuple[Images, Labels]


@dataclass(frozen=True)
class ImageStore:
    """An opened store. A sample is named by its row, its position in the store, forever.

    `classes` are the class names, `shape` is (H, W, C), `shard_counts` the images of each shard.
    """

    path: Path
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    shard_counts: tuple[int, ...]
    digest: str
    _maps: dict[int, Images] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, path: Path) -> "ImageStore":
        """Open without reading images.

        Raises:
            InputError: no store at path, or its files do not have the sizes that store.json states.
        """
        header = read_json(path / "store.json")
        counts = tuple(shard["count"] for shard in header["shards"])
        store = cls(path, tuple(header["classes"]), tuple(header["shape"]), counts, digest_file(path / "store.json"))
        _ = store.labels
        return store

    def __len__(self) -> int:
        return sum(self.shard_counts)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """First row of each shard, and the end: (shards + 1,)."""
        return np.concatenate([[0], np.cumsum(self.shard_counts, dtype=np.int64)]).astype(np.int64)

    @cached_property
    def labels(self) -> Labels:
        """All labels (n,), memory-mapped.

        Raises:
            InputError: the file is missing, truncated or of another length.
        """
        return load_map(self.path / "labels.npy", (len(self),), np.int64)

    def shard(self, index: int) -> Images:
        """One shard (count, H, W, C), memory-mapped.

        Raises:
            InputError: the file is missing, truncated or of another shape.
        """
        if index not in self._maps:
            wanted = (self.shard_counts[index], *self.shape)
            self._maps[index] = load_map(self.path / shard_name(index), wanted, np.uint8)
        return self._maps[index]

    def batch(self, rows: NDArray[np.int64]) -> Images:
        """Images of the given rows (B,), in their order: (B, H, W, C) uint8, a copy."""
        if len(rows) and not (0 <= rows.min() and rows.max() < len(self)):
            raise IndexError(f"{self.path}: rows must be in [0, {len(self)}), got [{rows.min()}, {rows.max()}]")
        out = np.empty((len(rows), *self.shape), dtype=np.uint8)
        shards = np.searchsorted(self.starts, rows, side="right") - 1
        for index in np.unique(shards):
            where = shards == index
            out[where] = self.shard(index)[rows[where] - self.starts[index]]
        return out

    def chunks(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[NDArray[np.int64], Images, Labels]]:
        """Rows, images and labels of consecutive pieces of at most size rows in [start, stop)."""
        stop = len(self) if stop is None else stop
        for first in range(start, stop, size):
            rows = np.arange(first, min(first + size, stop))
            yield rows, self.batch(rows), np.asarray(self.labels[rows])


def load_map(path: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
    """Memory-map an .npy file of the given shape and type."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable ({error}); rebuild the store") from None
    if array.shape != shape or array.dtype != dtype:
        raise InputError(f"{path}: wanted {np.dtype(dtype)} {shape}, got {array.dtype} {array.shape}; rebuild the store")
    return array


def shard_name(index: int) -> str:
    return f"images-{index:05d}.npy"


def write_store(
    target: Path,
    chunks: Iterable[Chunk],
    *,
    classes: tuple[str, ...],
    shape: tuple[int, int, int],
    shard_rows: int,
    origin: dict[str, Any],
) -> ImageStore:
    """Stream chunks into a store at target: memory holds one shard at most, the write is complete or absent.

    `origin` says where the images come from (source, licence, digests) and is kept in store.json.

    Raises:
        InputError: an image of another shape or type, a label outside the classes.
    """
    with publish(target) as work:
        labels: list[Labels] = []
        shards = []
        for index, (images, shard_labels) in enumerate(regroup(chunks, shape, len(classes), shard_rows)):
            name = shard_name(index)
            np.save(work / name, images, allow_pickle=False)
            labels.append(shard_labels)
            shards.append({"file": name, "count": len(images), "sha256": digest_file(work / name)})
        all_labels = np.concatenate(labels) if labels else np.empty(0, np.int64)
        np.save(work / "labels.npy", all_labels, allow_pickle=False)
        header = {
            "classes": list(classes),
            "shape": list(shape),
            "count": len(all_labels),
            "class_counts": np.bincount(all_labels, minlength=len(classes)).tolist(),
            "shards": shards,
            "labels_sha256": digest_file(work / "labels.npy"),
            "origin": origin,
        }
        write_json(work / "store.json", header)
    return ImageStore.open(target)


def regroup(chunks: Iterable[Chunk], shape: tuple[int, int, int], num_classes: int, shard_rows: int) -> Iterator[Chunk]:
    """Check chunks and cut them into shards of shard_rows images; the last may be smaller.

    The images of a shard are good until the next is asked for: all shards share one buffer.
    """
    images, labels = np.empty((shard_rows, *shape), np.uint8), np.empty(shard_rows, np.int64)
    filled = 0
    for new_images, new_labels in chunks:
        check_chunk(new_images, new_labels, shape, num_classes)
        done = 0
        while done < len(new_labels):
            take = min(shard_rows - filled, len(new_labels) - done)
            images[filled : filled + take] = new_images[done : done + take]
            labels[filled : filled + take] = new_labels[done : done + take]
            filled, done = filled + take, done + take
            if filled == shard_rows:
                yield images, labels.copy()
                filled = 0
    if filled:
        yield images[:filled], labels[:filled]


def check_chunk(images: Images, labels: Labels, shape: tuple[int, int, int], num_classes: int) -> None:
    if images.dtype != np.uint8 or images.shape[1:] != shape:
        raise InputError(f"images: wanted uint8 of shape {shape} (H, W, C), got {images.dtype} {images.shape[1:]}")
    if labels.dtype.kind not in "iu":
        raise InputError(f"labels: wanted integers, got {labels.dtype}")
    if len(images) != len(labels):
        raise InputError(f"wanted one label per image, got {len(images)} images and {len(labels)} labels")
    if len(labels) and not (0 <= labels.min() and labels.max() < num_classes):
        raise InputError(
            f"labels: wanted integers in [0, {num_classes}), got [{labels.min()}, {labels.max()}]; "
            "check the label column and the list of classes"
        )
