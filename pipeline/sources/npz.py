"""NumPy .npz archives, such as the synthetic images of Wang et al. 2023 (arXiv:2302.04638), read by rows, never loaded.

Those archives are sorted by class, so any part of one must be drawn through a permutation: see `stream`.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import NonNegativeInt, PositiveInt

from pipeline.images import Chunk, Labels
from pipeline.params import InputError, Section
from pipeline.sources.corrupt import Corrupt
from pipeline.sources.npz_member import Member, open_array, open_member, reading
from pipeline.sources.rows import Rows, permutation, permuted
from pipeline.sources.source import (
    Snapshot,
    Source,
    Split,
    SplitName,
    check_labels,
    check_unchanged,
    chunk_rows,
    class_names,
    expand,
    expand_splits,
    pieces,
    snapshot,
)

LABEL_ROWS = 2**20  # read at once


class NpzParams(Section):
    """`train` and `test` are files or globs; `classes: null` numbers the classes. With a `seed` the rows of each split come
    in the order it draws (the store keeps the row each had); `filtered` as for `NpzSyntheticParams`."""

    kind: Literal["npz"]
    train: tuple[str, ...]
    test: tuple[str, ...]
    image_key: str = "image"
    label_key: str = "label"
    classes: tuple[str, ...] | None = None
    seed: NonNegativeInt | None = None
    filtered: bool | None = None

    def open(self) -> Source:
        return open_npz(**self.model_dump(exclude={"kind"}))


class NpyPair(Section):
    """Files or globs of images and, in the same order, of their labels."""

    images: tuple[str, ...]
    labels: tuple[str, ...]


class NpyParams(Section):
    """Pairs of .npy files: images uint8 (n, H, W, C) or (n, H, W) and integer labels (n,). `seed` as for npz."""

    kind: Literal["npy"]
    train: NpyPair
    test: NpyPair
    classes: tuple[str, ...] | None = None
    seed: NonNegativeInt | None = None

    def open(self) -> Source:
        pairs: dict[SplitName, NpyPair] = {"train": self.train, "test": self.test}
        archives = {name: Archives.open_pairs(expand(pair.images), expand(pair.labels)) for name, pair in pairs.items()}
        return array_source("npy", archives, classes=self.classes, seed=self.seed, origin={})


class NpzSyntheticParams(Section):
    """Synthetic images that exist already: `num_images` of them (null: all), in an order drawn from `seed`.

    `filtered` records whether a filter chose them (Wang et al.'s 1M are the most confident fifth; their larger sets are
    unfiltered), null where unknown; results of the two must not be mixed.
    """

    kind: Literal["npz"]
    files: tuple[str, ...]
    image_key: str = "image"
    label_key: str = "label"
    num_images: PositiveInt | None = None
    seed: NonNegativeInt = 0
    filtered: bool | None = None


@dataclass(frozen=True)
class Archives:
    """Images and labels of several .npz files as one sequence of rows; each file has its pair of members."""

    images: tuple[Member, ...]
    labels: tuple[Member, ...]
    files: Snapshot

    @classmethod
    def open(cls, files: Sequence[Path], image_key: str = "image", label_key: str = "label") -> "Archives":
        """Check every header; no image is read.

        Raises:
            InputError: images are not uint8 (n, H, W, C), or (n, H, W) for grey, of one shape with one integer label each.
        """
        before = snapshot(files)
        return cls.of([(open_member(file, image_key), open_member(file, label_key)) for file in files], before)

    @classmethod
    def open_pairs(cls, images: Sequence[Path], labels: Sequence[Path]) -> "Archives":
        """As `open`, from .npy files, images and labels in the same order."""
        if len(images) != len(labels):
            raise InputError(f"{images[0]}: wanted as many files of labels as of images, got {len(labels)} and {len(images)}")
        before = snapshot([*images, *labels])
        pairs = zip(images, labels, strict=True)
        return cls.of([(open_array(image, "image"), open_array(label, "label")) for image, label in pairs], before)

    @classmethod
    def of(cls, pairs: list[tuple[Member, Member]], files: Snapshot) -> "Archives":
        """Check that pairs of images and labels belong together."""
        for images, labels in pairs:
            check_pair(images, labels)
            if images.shape[1:] != pairs[0][0].shape[1:]:
                raise InputError(
                    f"{images.file}: wanted images {pairs[0][0].shape[1:]} as in {pairs[0][0].file}, got {images.shape[1:]}"
                )
        return cls(tuple(images for images, _ in pairs), tuple(labels for _, labels in pairs), files)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of every image."""
        height, width, *channels = self.images[0].shape[1:]
        return height, width, channels[0] if channels else 1

    @property
    def starts(self) -> Rows:
        """First row of each file, and the end: (files + 1,)."""
        return np.cumsum([0, *(member.shape[0] for member in self.images)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def origin(self) -> list[dict[str, Any]]:
        """Name as given of each file, its number of rows, and what tells its arrays apart: for an archive the CRC-32 that it
        keeps, so that nothing has to be read."""
        return [
            {"file": images.file.as_posix(), "rows": images.shape[0], "arrays": {m.key: m.digest for m in (images, labels)}}
            for images, labels in zip(self.images, self.labels, strict=True)
        ]

    def chunks(self, parts: Iterable[Rows], *, any_order: bool) -> Iterator[Chunk]:
        """One chunk for each part (B,) of the rows. Without `any_order` the parts must ascend, each in itself and in turn."""
        with ExitStack() as stack:
            opened = [
                [(member, *stack.enter_context(member.opened(any_order=any_order))) for member in members]
                for members in (self.images, self.labels)
            ]
            for rows in parts:
                images, labels = (self.gather(members, rows) for members in opened)
                yield images.reshape(-1, *self.shape), labels.astype(np.int64)
        check_unchanged(self.files)

    def gather(self, members: list[tuple[Member, IO[bytes], int]], rows: Rows) -> NDArray[Any]:
        """Rows (B,) of one array over all files: (B, ...)."""
        files = np.searchsorted(self.starts, rows, side="right") - 1
        if len(rows) and (files == files[0]).all():
            member, file, start = members[files[0]]
            with reading(member.file):
                return member.rows(file, start, rows - self.starts[files[0]])
        first = members[0][0]
        found = np.empty((len(rows), *first.shape[1:]), first.dtype)
        for index in np.unique(files):
            member, file, start = members[index]
            with reading(member.file):
                found[files == index] = member.rows(file, start, rows[files == index] - self.starts[index])
        return found


def check_pair(images: Member, labels: Member) -> None:
    if images.dtype != np.uint8 or len(images.shape) not in (3, 4):
        raise InputError(f"{images.file}: {images.key!r}: wanted uint8 (n, H, W, C), got {images.dtype} {images.shape}")
    if 0 in images.shape[1:]:
        raise InputError(f"{images.file}: {images.key!r}: wanted sides and channels of 1 or more, got {images.shape}")
    if len(images.shape) == 4 and images.shape[3] not in (1, 3):
        raise InputError(
            f"{images.file}: {images.key!r}: wanted 1 or 3 channels, last, got {images.shape}; transpose (n, C, H, W) to "
            "(n, H, W, C), and leave out alpha"
        )
    if labels.dtype.kind not in "iu" or len(labels.shape) != 1:
        raise InputError(f"{labels.file}: {labels.key!r}: wanted integers (n,), got {labels.dtype} {labels.shape}")
    if images.shape[0] != labels.shape[0]:
        raise InputError(
            f"{images.file}: wanted one label per image, got {images.shape[0]} images and {labels.shape[0]} labels"
        )


def open_npz(
    *,
    train: tuple[str, ...],
    test: tuple[str, ...],
    image_key: str,
    label_key: str,
    classes: tuple[str, ...] | None,
    seed: int | None = None,
    filtered: bool | None = None,
) -> Source:
    """Reads the labels; the images are read as they are streamed.

    Raises:
        InputError: as `Archives.open`, no file, or a label outside the classes.
    """
    files = expand_splits(train, test)
    archives = {name: Archives.open(paths, image_key, label_key) for name, paths in files.items()}
    return array_source("npz", archives, classes=classes, seed=seed, origin={"filtered": filtered})


def array_source(
    kind: str, archives: dict[SplitName, Archives], *, classes: tuple[str, ...] | None, seed: int | None, origin: dict[str, Any]
) -> Source:
    """The source of two splits of arrays."""
    if archives["train"].shape != archives["test"].shape:
        raise InputError(
            f"{kind}: wanted train and test images of one shape, got {archives['train'].shape} and {archives['test'].shape}"
        )
    labels = {name: read_labels(archive) for name, archive in archives.items()}
    names = class_names(classes, labels["train"])
    for name, archive in archives.items():
        for member, part in zip(archive.labels, np.split(labels[name], archive.starts[1:-1]), strict=True):
            check_labels(part, len(names), member.file)
    origin = origin | {"kind": kind, "files": {name: archive.origin() for name, archive in archives.items()}, "seed": seed}
    splits = {name: archive_split(archive, labels[name], seed) for name, archive in archives.items()}
    return Source(names, archives["train"].shape, origin, splits)


def read_labels(archives: Archives) -> Labels:
    """All labels (n,)."""
    labels = np.empty(len(archives), np.int64)
    for member, row in zip(archives.labels, archives.starts.tolist(), strict=False):
        with reading(member.file), member.opened(any_order=False) as (file, start):
            for first in range(0, member.shape[0], LABEL_ROWS):
                rows = np.arange(first, min(first + LABEL_ROWS, member.shape[0]))
                labels[row + first : row + first + len(rows)] = member.rows(file, start, rows)
    return labels


def archive_split(archives: Archives, labels: Labels, seed: int | None) -> Split:
    """All rows, in their order or in that which the seed draws."""
    order = None if seed is None else permutation(len(labels), len(labels), seed)

    def read(rows: Rows, _: Corrupt) -> Iterator[Chunk]:
        parts = (part if order is None else order[part] for part in pieces(rows, archives.shape))
        return archives.chunks(parts, any_order=order is not None)

    return Split(labels if order is None else labels[order], read, order, archives.files)


def stream(
    files: Sequence[str],
    *,
    seed: int,
    num_images: int | None = None,
    image_key: str = "image",
    label_key: str = "label",
    start: int = 0,
    stop: int | None = None,
) -> tuple[int, Iterator[Chunk]]:
    """A random subset in random order, both drawn from seed: its size, and its positions [start, stop) as chunks.

    Positions count in the random order, so that parts of it are made independently of each other and agree with the
    whole. Memory does not grow with the files; compressed ones are first decompressed to temporary files.

    Raises:
        InputError: as `Archives.open`, no file, or fewer than num_images images.
    """
    archives = Archives.open(expand(files), image_key, label_key)
    count = len(archives) if num_images is None else num_images
    if count > len(archives):
        raise InputError(f"{', '.join(files)}: wanted {count} images (num_images), found {len(archives)}")
    size = chunk_rows(archives.shape)
    stop = count if stop is None else stop
    parts = (permuted(np.arange(first, min(first + size, stop)), len(archives), seed) for first in range(start, stop, size))
    return count, archives.chunks(parts, any_order=True)


def source_rows(origin: dict[str, Any], num_images: int) -> Rows:
    """The row in the files, counted over all of them, of each image of a synthetic store (n,) that `stream` filled."""
    return permutation(num_images, sum(file["rows"] for file in origin["files"]), origin["seed"])
