"""Writing image stores: shards byte for byte as numpy.save writes them, their digests, complete or absent."""

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import digest_file, place, publish, read_json, write_json
from pipeline.images import Chunk, Images, ImageStore, Labels, shard_name
from pipeline.params import InputError


def write_store(
    target: Path,
    chunks: Iterable[Chunk],
    *,
    classes: tuple[str, ...],
    shape: tuple[int, int, int],
    shard_rows: int,
    origin: dict[str, Any],
    source_rows: Callable[[], NDArray[np.int64]] | None = None,
) -> ImageStore:
    """Stream chunks into a store at target: memory holds one chunk and the labels, the write is complete or absent.

    `origin` says where the images come from (source, licence, digests) and is kept in store.json. `source_rows` is asked,
    after the last chunk, for the row (n,) that each image has in its source.

    Raises:
        InputError: an image of another shape or type, a label outside the classes.
    """
    with publish(target) as work:
        labels, shards = write_shards(work, chunks, shape, len(classes), shard_rows)
        rows = source_rows().astype(np.int64, copy=False) if source_rows is not None else None
        write_header(work, shards, labels, classes=classes, shape=shape, origin=origin, source_rows=rows)
    return ImageStore.open(target)


def write_shards(
    folder: Path, chunks: Iterable[Chunk], shape: tuple[int, int, int], num_classes: int, shard_rows: int
) -> tuple[Labels, list[dict[str, Any]]]:
    """Write chunks into shards of shard_rows images, of which the last may be smaller: all labels (n,), and what
    store.json says about the shards."""
    labels: list[NDArray[np.integer[Any]]] = []
    compact = np.min_scalar_type(num_classes)
    entries: list[dict[str, Any]] = []
    shard: Shard | None = None
    try:
        for images, chunk_labels in chunks:
            check_chunk(images, chunk_labels, shape, num_classes)
            labels.append(chunk_labels.astype(compact))
            done = 0
            while done < len(images):
                shard = shard or Shard(folder / shard_name(len(entries)), shape, shard_rows)
                part = images[done : done + shard_rows - shard.count]
                shard.write(part)
                done += len(part)
                if shard.count == shard_rows:
                    entries.append(shard.finish())
                    shard = None
        if shard:
            entries.append(shard.finish())
    finally:
        if shard:
            shard.file.close()
    return np.concatenate(labels, dtype=np.int64) if labels else np.empty(0, np.int64), entries


def write_header(
    directory: Path,
    shards: list[dict[str, Any]],
    labels: Labels,
    *,
    classes: tuple[str, ...],
    shape: tuple[int, int, int],
    origin: dict[str, Any],
    source_rows: NDArray[np.int64] | None = None,
) -> None:
    """Complete a store whose image files are there: labels.npy, source_rows.npy where there are any, and store.json."""
    np.save(directory / "labels.npy", labels, allow_pickle=False)
    header = {
        "classes": list(classes),
        "shape": list(shape),
        "count": len(labels),
        "class_counts": np.bincount(labels, minlength=len(classes)).tolist(),
        "shards": shards,
        "labels_sha256": digest_file(directory / "labels.npy"),
        "origin": origin,
    }
    if source_rows is not None:
        np.save(directory / "source_rows.npy", source_rows, allow_pickle=False)
        header["source_rows_sha256"] = digest_file(directory / "source_rows.npy")
    write_json(directory / "store.json", header)


def join_stores(directory: Path, parts: list[Path], origin: dict[str, Any]) -> None:
    """Make the shards of several stores of the same images, in that order, one store; files are linked, not copied."""
    stores = [ImageStore.open(part) for part in parts]
    shards: list[dict[str, Any]] = []
    for store in stores:
        for shard in read_json(store.path / "store.json")["shards"]:
            name = shard_name(len(shards))
            place(store.path / shard["file"], directory / name)
            shards.append({**shard, "file": name})
    labels = np.concatenate([store.labels for store in stores])
    write_header(directory, shards, labels, classes=stores[0].classes, shape=stores[0].shape, origin=origin)


class Shard:
    """One .npy file of at most `rows` images that is written piece by piece, byte for byte as numpy.save writes it."""

    def __init__(self, path: Path, shape: tuple[int, int, int], rows: int) -> None:
        self.path, self.shape, self.rows, self.count = path, shape, rows, 0
        self.file = path.open("wb", buffering=0)
        self.write_header(rows)
        self.hash = hashlib.sha256(path.read_bytes())

    def write_header(self, count: int) -> None:
        """The header is as long for any count: numpy leaves room for the first axis to grow."""
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, *self.shape)}
        np.lib.format.write_array_header_1_0(self.file, header)

    def write(self, images: Images) -> None:
        data = np.ascontiguousarray(images).data.cast("B")
        with ThreadPoolExecutor(1) as pool:  # the digest of a chunk is made while it is written
            hashed = pool.submit(self.hash.update, data)
            written = 0
            while written < len(data):  # one call may write less, at most 2 GiB
                written += self.file.write(data[written:])
            hashed.result()
        self.count += len(images)

    def finish(self) -> dict[str, Any]:
        """Complete the file: its entry in store.json."""
        if self.count < self.rows:
            self.file.seek(0)
            self.write_header(self.count)
        self.file.close()
        digest = self.hash.hexdigest() if self.count == self.rows else digest_file(self.path)
        return {"file": self.path.name, "count": self.count, "sha256": digest}


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
