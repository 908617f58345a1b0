"""Folders of images by class, on the disk or in tar files, as compact lists: 16 bytes per image beside its name."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.images import Labels
from pipeline.params import InputError
from pipeline.sources.decode import TASK_ROWS, Encoded, Loose, Span
from pipeline.sources.rows import Rows
from pipeline.sources.source import Snapshot, snapshot, state
from pipeline.sources.tar import Member, members

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Images:
    """Image files by name (n,) and their sizes (n,), with where they begin in a tar, or in a folder when they were changed."""

    container: Path
    names: pa.StringArray
    sizes: NDArray[np.int64]
    offsets: NDArray[np.int64] | None = None
    mtimes_ns: NDArray[np.int64] | None = None

    @classmethod
    def in_folder(cls, folder: Path, names: Sequence[str]) -> "Images":
        states = np.empty((2, len(names)), np.int64)
        for index, name in enumerate(names):
            states[:, index] = state(folder / name)[:2]
        try:
            return cls(folder, pa.array(names, pa.string()), states[0], mtimes_ns=states[1])
        except UnicodeEncodeError:
            raise InputError(f"{folder}: wanted names of images in UTF-8, got others; rename the files (convmv)") from None

    @classmethod
    def in_tar(cls, file: Path, found: Sequence[Member]) -> "Images":
        names, spans = zip(*found, strict=True) if found else ((), ())
        offsets, sizes = (np.array([span[k] for span in spans], np.int64) for k in (1, 2))
        return cls(file, pa.array(names, pa.string()), sizes, offsets)

    def __len__(self) -> int:
        return len(self.names)

    def encoded(self, index: int) -> Encoded:
        name, size = self.names[index].as_py(), int(self.sizes[index])
        if self.offsets is not None:
            return f"{self.container}: {name}", Span(self.container, int(self.offsets[index]), size)
        assert self.mtimes_ns is not None
        return str(self.container / name), Loose(self.container / name, size, int(self.mtimes_ns[index]))


class Tree(Protocol):
    """One folder (or tar) per class, and the images of each, sorted."""

    where: str
    files: Snapshot

    def folders(self) -> tuple[str, ...]: ...
    def images(self, folder: str) -> Images: ...


class FolderTree:
    """`folder`/<class>/**/<image>, or `folder`/<class>.tar."""

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        self.folder = folder
        if not folder.is_dir():
            raise InputError(
                f"{folder}: wanted a folder with one folder of images per class, found none; "
                "`test: null` holds out images of train"
            )
        entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        tars = {path.stem: path for path in entries if path.suffix == ".tar" and path.is_file()}
        self.paths = {path.name: path for path in entries if path.is_dir()} | tars
        self.files = snapshot(tars.values())

    def folders(self) -> tuple[str, ...]:
        return tuple(sorted(self.paths))

    def images(self, folder: str) -> Images:
        path = self.paths[folder]
        if path.is_dir():
            return Images.in_folder(path, sorted(image_names(path)))
        return Images.in_tar(path, sorted(member for member in members(path) if is_image(member[0])))


class TarTree:
    """<inside>/<class>/**/<image> in one tar, some 300 bytes per image while it is indexed (less in a tar per class)."""

    def __init__(self, file: Path, inside: str) -> None:
        self.where = f"{file}: {inside}"
        self.file = file
        self.files = snapshot([file])
        self.by_class: dict[str, list[Member]] = {}
        above = PurePosixPath(inside).parts
        others = set()
        for name, span in members(file):
            parts = PurePosixPath(name).parts
            if parts[: len(above)] != above:
                others.add("/".join(parts[: len(above)]))
            elif len(parts) > len(above) + 1 and is_image(name):
                self.by_class.setdefault(parts[len(above)], []).append((name, span))
        if not self.by_class:
            known = ", ".join(sorted(others)[:8]) or "nothing else"
            raise InputError(f"{self.where}: wanted one folder of images per class there, found none; the tar has {known}")

        self.names = tuple(sorted(self.by_class))

    def folders(self) -> tuple[str, ...]:
        return self.names

    def images(self, folder: str) -> Images:
        return Images.in_tar(self.file, sorted(self.by_class.pop(folder)))  # once only: the compact form takes its place


def open_tree(root: Path, inside: str) -> Tree:
    """The classes below `inside` of a folder or of a tar file."""
    return TarTree(root, inside) if root.is_file() else FolderTree(root / inside)


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES  # noqa: PTH122 millions of names


def image_names(folder: Path) -> Iterator[str]:
    """Image files at any depth, as paths from folder; hidden ones left out."""

    def fail(error: OSError) -> None:
        raise InputError(f"{error.filename}: not readable ({error.strerror})")

    for above, _, names in os.walk(folder, onerror=fail):
        prefix = os.path.relpath(above, folder)
        for name in names:
            if is_image(name) and not name.startswith("."):
                yield name if prefix == "." else f"{prefix}/{name}"


@dataclass(frozen=True)
class Listing:
    """The images of a split: `groups` one after the other, and their labels (n,)."""

    groups: tuple[Images, ...]
    labels: Labels

    def encoded(self, rows: Rows) -> Iterator[list[Encoded]]:
        """The images of ascending rows in small batches."""
        starts = np.cumsum([0, *(len(group) for group in self.groups)])
        for first in range(0, len(rows), TASK_ROWS):
            part = rows[first : first + TASK_ROWS]
            which = np.searchsorted(starts, part, side="right") - 1
            yield [self.groups[g].encoded(int(row - starts[g])) for g, row in zip(which, part, strict=True)]

    def digest(self) -> str | None:
        """SHA-256 of the images that lie in folders, by folder, name and size; None where all are in tars, which have their
        own. It depends on neither the time nor the folder above."""
        loose = [group for group in self.groups if group.mtimes_ns is not None]
        found = hashlib.sha256()
        for group in loose:
            found.update(f"{group.container.name}/{len(group)}\n".encode())
            for name, size in zip(group.names, group.sizes.tolist(), strict=True):
                found.update(f"{size} {name.as_py()}\0".encode())
        return found.hexdigest() if loose else None


def list_images(tree: Tree, class_of: dict[str, int]) -> Listing:
    """The images of the folders that have a class, folder by folder in the order of the classes.

    Raises:
        InputError: there is none.
    """
    there = set(tree.folders())
    folders = sorted((label, folder) for folder, label in class_of.items() if folder in there)
    groups = tuple(tree.images(folder) for _, folder in folders)
    if not sum(map(len, groups)):
        raise InputError(
            f"{tree.where}: wanted images ({' '.join(sorted(SUFFIXES))}) in the folders of the classes, found none"
        )
    return Listing(groups, np.repeat([label for label, _ in folders], [len(group) for group in groups]))
