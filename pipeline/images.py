"""Image store: sharded uint8 memory maps with labels. Opening one costs no read; a batch costs only its own bytes."""

import hashlib
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from pipeline.artifacts import digest_file, place, publish, read_json, write_json
from pipeline.params import InputError, explain

Images = NDArray[np.uint8]  # (n, H, W, C)
Labels = NDArray[np.int64]  # (n,)
Chunk = tuple[Images, Labels]

# Bytes of images. A map that is read at random comes to lie in the memory of the process, up to 2 MB at each read of an image
# (the kernel maps what lies about it), so a larger store is read from its files, which takes about three times as long.
LARGEST_MAPPED = 5 * 2**27
CHUNK_ROWS = 2**20


class ShardEntry(BaseModel):
    file: str
    count: PositiveInt
    sha256: str


class StoreHeader(BaseModel):
    """What store.json says. `source_rows_sha256` is there where the store keeps the row each image had in its source."""

    model_config = ConfigDict(frozen=True)
    classes: tuple[str, ...]
    shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    count: NonNegativeInt
    class_counts: tuple[NonNegativeInt, ...]
    shards: tuple[ShardEntry, ...]
    labels_sha256: str
    source_rows_sha256: str | None = None
    origin: dict[str, Any]

    @classmethod
    def read(cls, store: Path) -> "StoreHeader":
        """Raises:
        InputError: store.json is missing or is not the header of a store.
        """
        try:
            return cls.model_validate(read_json(store / "store.json"))
        except ValidationError as error:
            raise InputError(f"{store / 'store.json'}: not the header of an image store ({explain(error)})") from None


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
    _views: dict[int, memoryview] = field(default_factory=dict, repr=False, compare=False)
    _files: dict[int, tuple[int, int]] = field(default_factory=dict, repr=False, compare=False)  # descriptor, first byte

    @classmethod
    def open(cls, path: Path) -> "ImageStore":
        """Open without reading images.

        Raises:
            InputError: no store at path, or its files do not have the sizes that store.json states.
        """
        header = StoreHeader.read(path)
        counts = tuple(shard.count for shard in header.shards)
        store = cls(path, header.classes, header.shape, counts, digest_file(path / "store.json"))
        _ = store.labels
        return store

    def __len__(self) -> int:
        return sum(self.shard_counts)

    @property
    def origin(self) -> dict[str, Any]:
        """Where the images come from, as `write_store` was told."""
        origin: dict[str, Any] = read_json(self.path / "store.json")["origin"]
        return origin

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

    @cached_property
    def compact_labels(self) -> NDArray[np.integer[Any]]:
        """All labels (n,) in memory, in as few bytes as the classes need: to be read at random, as `batch` reads images."""
        found = np.empty(len(self), np.min_scalar_type(len(self.classes)))
        labels = self.labels
        assert isinstance(labels, np.memmap)
        for first in range(0, len(self), CHUNK_ROWS):
            part = found[first : first + CHUNK_ROWS]
            part[:] = np.fromfile(self.path / "labels.npy", np.int64, len(part), offset=labels.offset + 8 * first)
        return found

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
        """Images of the given rows (B,), in their order: (B, H, W, C) uint8, a copy. The process keeps none of the files in
        memory if they are larger than LARGEST_MAPPED."""
        if len(rows) and not (0 <= rows.min() and rows.max() < len(self)):
            raise IndexError(f"{self.path}: rows must be in [0, {len(self)}), got [{rows.min()}, {rows.max()}]")
        size = prod(self.shape)
        shards = np.searchsorted(self.starts, rows, side="right") - 1
        starts = (rows - self.starts[shards]) * size
        if len(self) * size > LARGEST_MAPPED:
            return self._read_batch(shards.tolist(), starts.tolist(), size)
        views = {index: self._bytes(index) for index in set(shards.tolist())}
        images = [views[index][start : start + size] for index, start in zip(shards.tolist(), starts.tolist(), strict=True)]
        # One copy of each image, which indexing with an array does not reach.
        return np.frombuffer(bytearray().join(images), np.uint8).reshape(-1, *self.shape)

    def _read_batch(self, shards: list[int], starts: list[int], size: int) -> Images:
        """Images of size bytes, each in a shard from a byte of its images on."""
        files = {index: self._file(index) for index in set(shards)}
        batch = np.empty((len(shards), *self.shape), np.uint8)
        into = batch.reshape(-1).data
        for number, (index, start) in enumerate(zip(shards, starts, strict=True)):
            file, offset = files[index]
            done = os.preadv(file, [into[number * size : (number + 1) * size]], offset + start)
            if done != size:
                raise InputError(f"{self.path / shard_name(index)}: ends within an image; rebuild the store")
        return batch

    def _file(self, index: int) -> tuple[int, int]:
        """Descriptor of the file of a shard, which is closed with the store, and where its images begin."""
        if index not in self._files:
            path = self.path / shard_name(index)
            shard = load_map(path, (self.shard_counts[index], *self.shape), np.uint8)
            assert isinstance(shard, np.memmap)
            file = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, file)
            self._files[index] = file, shard.offset
        return self._files[index]

    def _bytes(self, index: int) -> memoryview:
        if index not in self._views:
            self._views[index] = self.shard(index).reshape(-1).data
        return self._views[index]

    def chunks(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[NDArray[np.int64], Images, Labels]]:
        """Rows, images and labels of consecutive pieces of at most size rows in [start, stop). They are read, not mapped, so
        that going through a whole store does not fill the memory of the process with it."""
        stop = len(self) if stop is None else stop
        for first in range(start, stop, size):
            rows = np.arange(first, min(first + size, stop))
            yield rows, self.read(first, rows[-1] + 1), np.asarray(self.labels[rows])

    def read(self, start: int, stop: int) -> Images:
        """Images of the rows in [start, stop), read from the files: (stop - start, H, W, C) uint8, a copy."""
        pieces = []
        for index in range(len(self.shard_counts)):
            first, end = max(start, int(self.starts[index])), min(stop, int(self.starts[index + 1]))
            if first < end:
                shard, size = self.shard(index), int(np.prod(self.shape))
                assert isinstance(shard, np.memmap)
                offset = shard.offset + (first - int(self.starts[index])) * size
                pieces.append(np.fromfile(self.path / shard_name(index), np.uint8, (end - first) * size, offset=offset))
        return np.concatenate(pieces).reshape(-1, *self.shape)


def load_map(path: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
    """Memory-map an .npy file of the given shape and type.

    Raises:
        InputError: it is missing, damaged, or of another shape or type.
    """
    try:
        array: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # numpy reads the header as Python: SyntaxError, TokenError, MemoryError, RecursionError, ...
        raise InputError(f"{path}: not readable ({one_line(error)}); rebuild the store") from None
    if array.shape != shape or array.dtype != dtype:
        raise InputError(f"{path}: wanted {np.dtype(dtype)} {shape}, got {array.dtype} {array.shape}; rebuild the store")
    return array


def one_line(error: Exception) -> str:
    """What an exception of another library says, or its name where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


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
