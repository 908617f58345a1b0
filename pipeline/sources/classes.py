"""Which folders are classes: all of them, a list, a file that maps them, or a tree above them such as that of WordNet."""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.artifacts import digest_file
from pipeline.params import InputError, Section


class ClassList(Section):
    """Only these folders, in this order; `file` holds one name per line instead."""

    by: Literal["list"]
    names: tuple[str, ...] = ()
    file: Path | None = None


class ClassFile(Section):
    """A file of lines "folder, class" (separated by tab, comma or spaces, in this order of preference): folders with the
    same class are joined, folders that are not in it left out."""

    by: Literal["file"]
    file: Path


class ClassTree(Section):
    """A file of lines "parent child" (as wordnet.is_a.txt): a folder belongs to the nearest of `superclasses` (name in the
    tree -> class) at or above it; folders below none are left out."""

    by: Literal["tree"]
    file: Path
    superclasses: dict[str, str] = Field(min_length=1)


ClassParams = Annotated[ClassList | ClassFile | ClassTree, Field(discriminator="by")]


def classes_of(folders: Iterable[str], params: ClassParams | None) -> tuple[tuple[str, ...], dict[str, int]]:
    """The classes, and the label of each folder that has one.

    Raises:
        InputError: a file is missing or of another layout, a listed folder does not exist, or no folder has a class.
    """
    folders = list(folders)
    if params is None:
        names = {folder: folder for folder in folders}
        order = sorted(folders)
    elif isinstance(params, ClassList):
        order = list(dict.fromkeys([*params.names, *(line[0] for line in read_lines(params.file, 1))]))
        names = {folder: folder for folder in order}
        there = set(folders)
        if missing := [name for name in order if name not in there]:
            raise InputError(f"classes: wanted folders for {len(order)} classes, found none for {', '.join(missing[:5])}")
    elif isinstance(params, ClassFile):
        names = dict(read_lines(params.file, 2))
        order = sorted({names[folder] for folder in folders if folder in names})
    else:
        names = nearest(folders, params)
        order = sorted(set(names.values()), key=list(params.superclasses.values()).index)
    if not order:
        raise InputError(f"classes: none of {len(folders)} folders has a class, such as {', '.join(folders[:3])}")
    label = {name: index for index, name in enumerate(order)}
    return tuple(order), {folder: label[names[folder]] for folder in folders if folder in names}


def read_lines(file: Path | None, columns: int) -> list[Any]:
    """The lines of a file as tuples of columns; empty lines and those that begin with # are left out."""
    if file is None:
        return []
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: wanted a text file of classes, not readable ({error})") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line or line.startswith("#"):
            continue
        separator = next((s for s in ("\t", ",") if s in line), None)
        parts = next(csv.reader([line], delimiter=separator)) if separator else line.split(maxsplit=columns - 1)
        if len(parts) < columns or not all(part.strip() for part in parts[:columns]):
            raise InputError(f"{file}: line {number}: wanted {columns} names, got {line!r}")
        found.append(tuple(part.strip() for part in parts[:columns]))
    return found


def nearest(folders: list[str], params: ClassTree) -> dict[str, str]:
    """The class of each folder by the superclass that is the fewest steps above it; in a tie the first named."""
    parents: dict[str, list[str]] = {}
    for parent, child in read_lines(params.file, 2):
        parents.setdefault(child, []).append(parent)
    found = {}
    for folder in folders:
        level, seen = [folder], {folder}
        while level:
            if hits := [name for name in params.superclasses if name in level]:
                found[folder] = params.superclasses[hits[0]]
                break
            level = list(dict.fromkeys(p for name in level for p in parents.get(name, []) if p not in seen))
            seen.update(level)
    return found


def describe(params: ClassParams | None) -> dict[str, Any] | None:
    """For the origin: the choice and the digest of its file."""
    if params is None:
        return None
    described: dict[str, Any] = params.model_dump(mode="json")
    if params.file is not None:
        described["sha256"] = digest_file(params.file)
    return described
