"""WebDataset shards: tar files in which the files of a sample share their name up to the first dot."""

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

from pipeline.params import InputError, Section
from pipeline.sources.decode import Span, decode_all, first_shape
from pipeline.sources.source import (
    Source,
    Split,
    SplitName,
    check_labels,
    class_names,
    expand,
    expand_splits,
    file_digests,
    held_out,
    snapshot,
)
from pipeline.sources.tar import Member, members
from pipeline.sources.trees import Images, Listing, is_image

MAX_LABEL_BYTES = 2**20


class WebDatasetParams(Section):
    """`train` and `test` are uncompressed tar files or globs; `test: null` holds out `test_fraction` of every class, drawn
    from `seed`.

    `image_key: null` takes the one file of each sample that is an image, else that with this ending (jpg, left.png).
    `label_key` is the ending of its label: an integer, a name out of `classes`, or with `label_field` a JSON object.
    """

    kind: Literal["webdataset"]
    train: tuple[str, ...]
    test: tuple[str, ...] | None
    image_key: str | None = None
    label_key: str = "cls"
    label_field: str | None = None
    classes: tuple[str, ...] | None = None
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    seed: NonNegativeInt = 0
    size: PositiveInt | None = None
    channels: Literal[1, 3] = 3

    def open(self) -> Source:
        return open_webdataset(self)


def open_webdataset(params: WebDatasetParams) -> Source:
    """Reads the names and the labels; the images are decoded as they are streamed, in the order of the shards.

    Raises:
        InputError: no file, not a tar, a sample without an image or a label, a label outside the classes.
    """
    files: dict[SplitName, list[Path]]
    files = {"train": expand(params.train)} if params.test is None else expand_splits(params.train, params.test)
    before = {name: snapshot(paths) for name, paths in files.items()}
    listings = {name: list_samples(paths, params) for name, paths in files.items()}
    if not len(listings["train"].labels):
        raise InputError(f"{files['train'][0]}: wanted samples, found none")
    names = class_names(params.classes, listings["train"].labels)
    for name, listing in listings.items():
        check_labels(listing.labels, len(names), files[name][0])
    size, channels = params.size, params.channels
    every = (encoded for batch in listings["train"].encoded(np.arange(len(listings["train"].labels))) for encoded in batch)
    shape = (size, size, channels) if size else first_shape(every, channels)

    def split(name: SplitName) -> Split:
        listing = listings[name]
        return Split(
            listing.labels,
            lambda rows, corrupt: decode_all(listing.encoded(rows), listing.labels, rows, corrupt, shape=shape, size=size),
            files=before[name],
        )

    origin: dict[str, Any] = {"files": {name: file_digests(paths) for name, paths in files.items()}}
    origin |= params.model_dump(mode="json", exclude={"train", "test", "classes", "channels"})
    if params.test is None:
        return Source(names, shape, origin, held_out(split("train"), params.test_fraction, params.seed))
    return Source(names, shape, origin, {"train": split("train"), "test": split("test")})


def list_samples(files: list[Path], params: WebDatasetParams) -> Listing:
    """The image and the label of every sample."""
    groups, labels = [], []
    numbers = {name: number for number, name in enumerate(params.classes or ())}
    for file in files:
        images: list[Member] = []
        for sample, parts in samples(file):
            image, label = choose(f"{file}: sample {sample!r}", parts, params)
            images.append(image)
            labels.append(read_label(f"{file}: sample {sample!r}", label, params, numbers))
        groups.append(Images.in_tar(file, images))
    return Listing(tuple(groups), np.array(labels, np.int64))


def samples(file: Path) -> Iterator[tuple[str, dict[str, Member]]]:
    """Name of each sample and its files by their ending; those of a sample follow each other."""
    current, parts = "", dict[str, Member]()
    for name, span in members(file):
        path = PurePosixPath(name)
        base, _, ending = path.name.partition(".")
        sample = (path.parent / base).as_posix()
        if sample != current and parts:
            yield current, parts
            parts = {}
        if ending in parts:
            raise InputError(f"{file}: sample {sample!r}: two files end in .{ending}")
        current = sample
        parts[ending] = (name, span)
    if parts:
        yield current, parts


def choose(where: str, parts: dict[str, Member], params: WebDatasetParams) -> tuple[Member, Span]:
    """The image and the label of a sample."""
    endings = [params.image_key] if params.image_key else [ending for ending in parts if is_image(f"x.{ending}")]
    if len(endings) != 1 or endings[0] not in parts:
        raise InputError(f"{where}: wanted one image, got files that end in {', '.join(parts)}; set image_key")
    if params.label_key not in parts:
        raise InputError(f"{where}: wanted a label in .{params.label_key}, got {', '.join(parts)}; set label_key")
    return parts[endings[0]], parts[params.label_key][1]


def read_label(where: str, span: Span, params: WebDatasetParams, numbers: dict[str, int]) -> int:
    """The label of a sample as a number, or by its name in numbers."""
    if span.size > MAX_LABEL_BYTES:
        raise InputError(f"{where}: wanted a label of at most {MAX_LABEL_BYTES} bytes, got {span.size}")
    with span.file.open("rb") as file:
        file.seek(span.offset)
        content = file.read(span.size)
    value: Any = None
    try:
        value = content.decode().strip()
        if params.label_field is not None:
            value = json.loads(value)[params.label_field]
        return numbers[str(value)] if str(value) in numbers else int(value)
    except (ValueError, KeyError, TypeError, RecursionError):
        wanted = f"a JSON object with {params.label_field!r}" if params.label_field else "an integer or one of the classes"
        raise InputError(f"{where}: .{params.label_key}: wanted {wanted}, got {str(value)[:80]!r}") from None
