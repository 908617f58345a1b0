"""Image store: sharded uint8 memory maps with labels. Opening one costs no read; a batch costs only its own bytes."""

import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from pipeline.artifacts import digest_file, read_json
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
