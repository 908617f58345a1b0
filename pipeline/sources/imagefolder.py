"""Images in one folder per class, on the disk, in one tar file, or in a tar file per class."""

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

from pipeline.params import InputError, Section
from pipeline.sources.classes import ClassParams, classes_of, describe
from pipeline.sources.decode import decode_all, first_shape
from pipeline.sources.source import Source, Split, SplitName, file_digests, held_out
from pipeline.sources.trees import Listing, Tree, list_images, open_tree


class ImageFolderParams(Section):
    """`root`/`train`/<class>/**/<image>, and the same below `test`; `test: null` holds out `test_fraction` of every class,
    drawn from `seed`. `root` may be a tar file with these folders inside, and <class> a tar file of its images.

    `classes: null` takes every folder for a class. `size: null` wants images of one size; otherwise the shorter side is
    resized to it and the centre cut out.
    """

    kind: Literal["imagefolder"]
    root: Path
    train: str = "train"
    test: str | None = "test"
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    seed: NonNegativeInt = 0
    classes: ClassParams | None = None
    size: PositiveInt | None = None
    channels: Literal[1, 3] = 3

    def open(self) -> Source:
        return open_imagefolder(self)


def open_imagefolder(params: ImageFolderParams) -> Source:
    """Classes in the order of their names (or as `classes` says); images in that of theirs.

    Raises:
        InputError: a folder is missing or empty, a tar is damaged, or the test has a class that train has not.
    """
    if params.train == params.test:
        raise InputError(f"{params.root / params.train}: is in train and in test; wanted a test apart from it")
    tree = open_tree(params.root, params.train)
    if not tree.folders():
        raise InputError(f"{tree.where}: wanted one folder of images per class, got a folder without folders")
    classes, class_of = classes_of(tree.folders(), params.classes)
    left_out = len(tree.folders()) - len(class_of)
    listing = list_images(tree, class_of)
    empty = [
        name for name, count in zip(classes, np.bincount(listing.labels, minlength=len(classes)), strict=True) if not count
    ]
    if empty:
        raise InputError(f"{tree.where}: wanted images in the folder of every class, found none in {', '.join(empty)}")
    size, channels = params.size, params.channels
    every = (encoded for batch in listing.encoded(np.arange(len(listing.labels))) for encoded in batch)
    shape = (size, size, channels) if size else first_shape(every, channels)
    train = folder_split(listing, tree, shape, size)
    origin: dict[str, Any] = {
        "kind": "imagefolder",
        "root": params.root.as_posix(),
        "train": params.train,
        "test": params.test,
        "size": size,
        "classes": describe(params.classes),
        "folders_left_out": left_out,
        "tars": file_digests(tree.files),
        "images": {"train": listing.digest()},
    }
    if params.test is None:
        origin |= {"test_fraction": params.test_fraction, "seed": params.seed}
        return Source(classes, shape, origin, held_out(train, params.test_fraction, params.seed))
    test_tree = open_tree(params.root, params.test)
    check_test_classes(test_tree, tree, params.classes is None)
    test_listing = list_images(test_tree, class_of)
    test = folder_split(test_listing, test_tree, shape, size)
    origin["images"]["test"] = test_listing.digest()
    origin["tars"] |= file_digests({path: state for path, state in test_tree.files.items() if path not in tree.files})
    splits: dict[SplitName, Split] = {"train": train, "test": test}
    return Source(classes, shape, origin, splits)


def check_test_classes(test: Tree, train: Tree, all_folders: bool) -> None:
    if not test.folders():
        raise InputError(f"{test.where}: wanted one folder of images per class, got a folder without folders")
    unknown = sorted(set(test.folders()) - set(train.folders()))
    if unknown and all_folders:
        raise InputError(f"{test.where}: wanted the classes of train, got also {', '.join(unknown)}")


def folder_split(listing: Listing, tree: Tree, shape: tuple[int, int, int], size: int | None) -> Split:
    """A split of listed images, decoded when they are read."""
    return Split(
        listing.labels,
        lambda rows, corrupt: decode_all(listing.encoded(rows), listing.labels, rows, corrupt, shape=shape, size=size),
        files=tree.files,
    )
