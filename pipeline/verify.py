"""Verification of image stores on demand: every byte against the digests of store.json, every count against the files."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.artifacts import digest_file
from pipeline.images import StoreHeader, load_map, shard_name
from pipeline.params import InputError
from pipeline.threads import on_all_cores

Problem = str  # "file: what was wanted, what came"


def stores_below(path: Path) -> list[Path]:
    """The stores at or below path, sorted.

    Raises:
        InputError: there is none.
    """
    found = sorted(header.parent for header in path.rglob("store.json"))
    if not found:
        raise InputError(f"{path}: wanted an image store (a folder with store.json), or folders of them, found none")
    return found


def verify(store: Path) -> list[Problem]:
    """Read a whole store and say what is wrong with it, file by file; nothing if it is as it was written."""
    try:
        header = StoreHeader.read(store)
    except InputError as error:
        return [str(error)]
    files: list[tuple[Path, tuple[int, ...], type[np.generic], str]] = [
        (store / shard_name(index), (entry.count, *header.shape), np.uint8, entry.sha256)
        for index, entry in enumerate(header.shards)
    ]
    columns = {"labels.npy": header.labels_sha256, "source_rows.npy": header.source_rows_sha256}
    files += [(store / name, (header.count,), np.int64, digest) for name, digest in columns.items() if digest]
    problems = [problem for found in on_all_cores(lambda file: check_file(*file), files) for problem in found]
    return problems + list(check_counts(store, header)) + list(check_names(store, header))


def check_file(path: Path, shape: tuple[int, ...], dtype: type[np.generic], digest: str) -> list[Problem]:
    """What is wrong with one file; its header is parsed only where its bytes are those that were written."""
    try:
        found = digest_file(path)
        if found != digest:
            return [f"{path}: its bytes have changed: wanted SHA-256 {digest}, got {found}"]
        load_map(path, shape, dtype)
    except OSError as error:
        return [f"{path}: not readable ({error.strerror}); rebuild the store"]
    except InputError as error:
        return [str(error)]
    return []


def check_counts(store: Path, header: StoreHeader) -> Iterator[Problem]:
    """The counts of store.json among themselves and against the labels."""
    where = store / "store.json"
    if (total := sum(entry.count for entry in header.shards)) != header.count:
        yield f"{where}: wanted shards of {header.count} images in all (count), got {total}"
    try:
        labels = load_map(store / "labels.npy", (header.count,), np.int64)
    except InputError:
        return  # said already
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(header.classes):
        yield f"{store / 'labels.npy'}: wanted labels in [0, {len(header.classes)}), got [{labels.min()}, {labels.max()}]"
    elif (counts := np.bincount(labels, minlength=len(header.classes)).tolist()) != list(header.class_counts):
        yield f"{where}: wanted class_counts {counts} as in labels.npy, got {list(header.class_counts)}"


def check_names(store: Path, header: StoreHeader) -> Iterator[Problem]:
    """The names of the shards; only those that their numbers give are ever opened."""
    for index, entry in enumerate(header.shards):
        if entry.file != shard_name(index):
            yield f"{store / 'store.json'}: wanted the shard {index} to be {shard_name(index)}, got {entry.file!r}"
    expected = {shard_name(index) for index in range(len(header.shards))}
    for path in sorted(store.glob("images-*.npy")):
        if path.name not in expected:
            yield f"{path}: a shard that store.json does not have"
