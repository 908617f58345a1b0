"""Images in one folder per class."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

from pipeline.images import Labels
from pipeline.params import InputError, Section
from pipeline.sources.decode import TASK_ROWS, Encoded, decode, decode_all
from pipeline.sources.rows import Rows, hold_out
from pipeline.sources.source import Source, Split, SplitName

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class ImageFolderParams(Section):
    """`root`/`train`/<class>/**/<image>, and the same below `test`; `test: null` holds out `test_fraction` of every class.

    `size: null` wants images of one size; otherwise the shorter side is resized to it and the centre cut out.
    """

    kind: Literal["imagefolder"]
    root: Path
    train: str = "train"
    test: str | None = "test"
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    seed: NonNegativeInt = 0
    size: PositiveInt | None = None
    channels: Literal[1, 3] = 3

    def open(self) -> Source:
        return open_imagefolder(**self.model_dump(exclude={"kind"}))


def open_imagefolder(
    *, root: Path, train: str, test: str | None, test_fraction: float, seed: int, size: int | None, channels: int
) -> Source:
    """The folders of `train` are the classes, in the order of their names; so is the order of the images.

    Raises:
        InputError: a folder is missing or empty, or the test has a class that train has not.
    """
    classes = class_folders(root / train)
    files, labels = list_images(root / train, classes)
    empty = sorted(set(classes) - {classes[label] for label in np.unique(labels)})
    if empty:
        raise InputError(f"{root / train}: wanted images in the folder of every class, found none in {', '.join(empty)}")
    shape = (size, size, channels) if size else decode(str(files[0]), files[0], size=None, channels=channels).shape
    origin: dict[str, Any] = {"kind": "imagefolder", "root": root.as_posix(), "train": train, "test": test, "size": size}
    if test is None:
        train_rows, test_rows = hold_out(labels, test_fraction, seed)
        origin |= {"test_fraction": test_fraction, "seed": seed}
        train_files, test_files = [files[row] for row in train_rows], [files[row] for row in test_rows]
        train_labels, test_labels = labels[train_rows], labels[test_rows]
    else:
        check_test_classes(root / test, classes)
        (train_files, train_labels), (test_files, test_labels) = (files, labels), list_images(root / test, classes)
    splits: dict[SplitName, Split] = {
        "train": file_split(train_files, train_labels, shape, size),
        "test": file_split(test_files, test_labels, shape, size),
    }
    return Source(classes, shape, origin, splits)


def class_folders(folder: Path) -> tuple[str, ...]:
    """Names of the folders in folder, sorted, hidden ones left out."""
    if not folder.is_dir():
        raise InputError(
            f"{folder}: wanted a folder with one folder of images per class, found none; `test: null` holds out images of train"
        )
    names = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))
    if not names:
        raise InputError(f"{folder}: wanted one folder of images per class, got a folder without folders")
    return names


def check_test_classes(folder: Path, classes: tuple[str, ...]) -> None:
    unknown = sorted(set(class_folders(folder)) - set(classes))
    if unknown:
        raise InputError(f"{folder}: wanted the classes of train, got also {', '.join(unknown)}")


def list_images(folder: Path, classes: tuple[str, ...]) -> tuple[list[Path], Labels]:
    """Image files below the folder of each class, sorted within it, and their labels (n,)."""
    by_class = [
        sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))
        for name in classes
    ]
    files = [path for paths in by_class for path in paths]
    if not files:
        raise InputError(f"{folder}: wanted images ({' '.join(sorted(SUFFIXES))}) in the folders of the classes, found none")
    return files, np.repeat(np.arange(len(classes)), [len(paths) for paths in by_class])


def file_split(files: list[Path], labels: Labels, shape: tuple[int, int, int], size: int | None) -> Split:
    """A split of image files, one label each, decoded when they are read."""

    def batches(rows: Rows) -> Iterator[list[Encoded]]:
        for first in range(0, len(rows), TASK_ROWS):
            yield [(str(files[row]), files[row]) for row in rows[first : first + TASK_ROWS]]

    return Split(labels, lambda rows: decode_all(batches(rows), labels, rows, shape=shape, size=size))
