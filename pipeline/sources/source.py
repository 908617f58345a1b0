"""What every reader gives: the classes, the shape, where the data comes from, and the splits as streams."""

import glob
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.artifacts import digest_file
from pipeline.images import Chunk, Images, Labels
from pipeline.params import InputError
from pipeline.sources.corrupt import Corrupt
from pipeline.sources.rows import Rows, hold_out
from pipeline.threads import on_all_cores

CHUNK_ROWS = 4096
CHUNK_BYTES = 2**28
MIN_BOMB_BYTES, MAX_EXPANSION = 2**26, 100
MAX_CLASSES = 2**15 - 1  # margins and manifests hold labels as int16

SplitName = Literal["train", "test"]


Snapshot = dict[Path, tuple[int, ...]]  # size, time of change and inode of files


@dataclass(frozen=True)
class Split:
    """Labels (n,) in memory, images as a stream: `read` takes ascending rows and yields them as chunks, in that order,
    without those it adds to `Corrupt`.

    `order` (n,) gives the row in the source of each row of the split where the two differ. `files` must stay as they are.
    """

    labels: Labels
    read: Callable[[Rows, Corrupt], Iterator[Chunk]]
    order: Rows | None = None
    files: Snapshot = field(default_factory=dict)

    def __call__(self, rows: Rows | None = None, corrupt: Corrupt | None = None) -> Iterator[Chunk]:
        """Stream the given ascending rows, or all. Nothing else of the images is decoded or kept.

        Raises:
            InputError: the source cannot be read, more images are corrupt than its limit (none by default), or a file has
                changed since the source was opened.
        """
        yield from self.read(self.rows(rows), corrupt or Corrupt())
        check_unchanged(self.files)

    def rows(self, rows: Rows | None) -> Rows:
        return np.arange(len(self.labels)) if rows is None else rows

    def source_rows(self, rows: Rows | None, corrupt: Corrupt) -> Rows:
        """The rows in the source of what a stream of rows gave."""
        wanted = self.rows(rows) if self.order is None else self.order[self.rows(rows)]
        return wanted[~np.isin(wanted, corrupt.rows)] if corrupt.rows else wanted

    def part(self, rows: Rows) -> "Split":
        """A split of ascending rows of this one."""
        return Split(self.labels[rows], lambda chosen, corrupt: self.read(rows[chosen], corrupt), rows, self.files)


def held_out(split: Split, fraction: float, seed: int) -> dict[SplitName, Split]:
    """A stratified fraction of a split as test, the rest as train."""
    train, test = hold_out(split.labels, fraction, seed)
    return {"train": split.part(train), "test": split.part(test)}


def snapshot(files: Iterable[Path]) -> Snapshot:
    """How files are now, before they are read.

    Raises:
        InputError: a file is missing.
    """
    return {path: state(path) for path in files}


def state(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError as error:
        raise InputError(f"{path}: not readable ({error.strerror})") from None
    return found.st_size, found.st_mtime_ns, found.st_ino


def check_unchanged(files: Snapshot) -> None:
    """Raise an InputError if a file is no longer as it was."""
    for path, before in files.items():
        if state(path) != before:
            raise changed(path)


def changed(path: Path) -> InputError:
    return InputError(f"{path}: has changed while it was read; wait until it is complete and run this again")


@dataclass(frozen=True)
class Source:
    """An opened source. `shape` is (H, W, C); `origin` is kept in store.json and names neither time nor host.

    Raises:
        InputError: a split has no image, or there are more classes than a margin table can tell apart.
    """

    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    origin: dict[str, Any]
    splits: dict[SplitName, Split]

    def __post_init__(self) -> None:
        if len(self.classes) > MAX_CLASSES:
            raise InputError(
                f"{self.origin['kind']}: wanted at most {MAX_CLASSES} classes, got {len(self.classes)}; choose some by classes"
            )
        for name, split in self.splits.items():
            if not len(split.labels):
                raise InputError(f"{self.origin['kind']}: wanted at least one {name} image, got none")


def array_split(images: Images, labels: Labels) -> Split:
    """A split of images (n, H, W, C) and labels (n,) that are in memory already."""
    return Split(labels, lambda rows, _: ((images[part], labels[part]) for part in pieces(rows, images.shape[1:])))


def chunk_rows(shape: tuple[int, ...]) -> int:
    """Images of shape (H, W, C) in a chunk: CHUNK_ROWS, or fewer where these would take over CHUNK_BYTES."""
    return max(1, min(CHUNK_ROWS, CHUNK_BYTES // prod(shape)))


def pieces(rows: Rows, shape: tuple[int, ...]) -> Iterator[Rows]:
    """Cut rows into parts for one chunk each."""
    return (rows[first : first + chunk_rows(shape)] for first in range(0, len(rows), chunk_rows(shape)))


def check_expansion(where: str, packed: int, unpacked: int) -> None:
    """Raise an InputError for a decompression bomb: much that is packed a hundred times smaller than images can be."""
    if unpacked > MIN_BOMB_BYTES and unpacked > MAX_EXPANSION * packed:
        raise InputError(
            f"{where}: {packed} bytes would become {unpacked}: a decompression bomb, refused; write it uncompressed"
        )


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


def file_digests(files: Iterable[Path]) -> dict[str, str]:
    """Name as given and SHA-256 of every file."""
    files = list(files)
    return {path.as_posix(): sha256 for path, sha256 in zip(files, on_all_cores(digest_file, files), strict=True)}


def digests(files: dict[SplitName, list[Path]]) -> dict[str, list[dict[str, str]]]:
    """Name as given and SHA-256 of the files of every split, for the origin."""
    return {
        split: [{"file": name, "sha256": sha256} for name, sha256 in file_digests(paths).items()]
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
