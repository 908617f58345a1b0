"""What every reader gives: the classes, the shape, where the data comes from, and the splits as streams."""

import glob
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.artifacts import digest_file
from pipeline.images import Chunk, Images, Labels
from pipeline.params import InputError
from pipeline.sources.rows import Rows

CHUNK_ROWS = 4096
CHUNK_BYTES = 2**28
MAX_CLASSES = 2**15 - 1  # margins and manifests hold labels as int16

SplitName = Literal["train", "test"]


@dataclass(frozen=True)
class Split:
    """Labels (n,) in memory, images as a stream: `read` takes ascending rows and yields them as chunks, in that order."""

    labels: Labels
    read: Callable[[Rows], Iterator[Chunk]]

    def __call__(self, rows: Rows | None = None) -> Iterator[Chunk]:
        """Stream the given ascending rows, or all. Nothing else of the images is decoded or kept."""
        return self.read(np.arange(len(self.labels)) if rows is None else rows)


@dataclass(frozen=True)
class Source:
    """An opened source. `shape` is (H, W, C); `origin` is kept in store.json and names neither time nor host.

    Raises:
        InputError: a split has no image.
    """

    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    origin: dict[str, Any]
    splits: dict[SplitName, Split]

    def __post_init__(self) -> None:
        for name, split in self.splits.items():
            if not len(split.labels):
                raise InputError(f"{self.origin['kind']}: wanted at least one {name} image, got none")


def array_split(images: Images, labels: Labels) -> Split:
    """A split of images (n, H, W, C) and labels (n,) that are in memory already."""
    return Split(labels, lambda rows: ((images[part], labels[part]) for part in pieces(rows, images.shape[1:])))


def chunk_rows(shape: tuple[int, ...]) -> int:
    """Images of shape (H, W, C) in a chunk: CHUNK_ROWS, or fewer where these would take over CHUNK_BYTES."""
    return max(1, min(CHUNK_ROWS, CHUNK_BYTES // prod(shape)))


def pieces(rows: Rows, shape: tuple[int, ...]) -> Iterator[Rows]:
    """Cut rows into parts for one chunk each."""
    return (rows[first : first + chunk_rows(shape)] for first in range(0, len(rows), chunk_rows(shape)))


def expand(patterns: Sequence[str]) -> list[Path]:
    """Files for paths and globs (** is recursive), each glob sorted; a file named twice counts once.

    Raises:
        InputError: a pattern matches no file.
    """
    files: list[Path] = []
    for pattern in patterns:
        found = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 Path.glob refuses absolute patterns
        matches = [Path(name) for name in found if Path(name).is_file()]
        if not matches:
            raise InputError(f"{pattern}: wanted a file, or a glob that matches one, found none below {Path.cwd()}")
        files += matches
    return list(dict.fromkeys(files))


def expand_splits(train: Sequence[str], test: Sequence[str]) -> dict[SplitName, list[Path]]:
    """The files of both splits.

    Raises:
        InputError: a pattern matches no file, or a file is in both splits.
    """
    files: dict[SplitName, list[Path]] = {"train": expand(train), "test": expand(test)}
    shared = sorted(set(files["train"]) & set(files["test"]))
    if shared:
        raise InputError(f"{shared[0]}: is in train and in test; wanted test files that are kept out of training")
    return files


def digests(files: dict[SplitName, list[Path]]) -> dict[str, list[dict[str, str]]]:
    """Name as given and SHA-256 of every file, for the origin."""
    with ThreadPoolExecutor() as pool:
        return {
            split: [
                {"file": path.as_posix(), "sha256": sha256}
                for path, sha256 in zip(paths, pool.map(digest_file, paths), strict=True)
            ]
            for split, paths in files.items()
        }


def class_names(given: tuple[str, ...] | None, labels: Labels) -> tuple[str, ...]:
    """The given names, or the numbers from 0 to the largest of labels (n,)."""
    if given is not None:
        return given
    if not len(labels):
        raise InputError("wanted at least one train image, got none")
    largest = int(labels.max())
    if largest >= MAX_CLASSES:
        raise InputError(f"labels: wanted at most {MAX_CLASSES} classes, got the label {largest}; check the label column")
    return tuple(map(str, range(largest + 1)))


def check_labels(labels: Labels, num_classes: int, where: Path) -> None:
    """Raise an InputError that names the first row of labels (n,) outside [0, num_classes)."""
    bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(bad):
        raise InputError(
            f"{where}: row {bad[0]}: wanted a label in [0, {num_classes}), got {labels[bad[0]]}; "
            "check the label column and the list of classes"
        )
