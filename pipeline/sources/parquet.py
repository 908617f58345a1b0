"""Parquet files with encoded images, as on the Hugging Face hub."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import PositiveInt

from pipeline.images import Labels
from pipeline.params import InputError, Section
from pipeline.sources.decode import TASK_ROWS, Encoded, decode_all, first_shape
from pipeline.sources.rows import Rows
from pipeline.sources.source import (
    Source,
    Split,
    SplitName,
    check_expansion,
    check_labels,
    class_names,
    digests,
    expand_splits,
    snapshot,
)

BATCH_BYTES = 2**25  # of encoded images that travel to a process at once
LABEL_ROWS = 2**20  # read at once
BUFFER_BYTES = 2**20  # of a column, read ahead
PLAIN = {"PLAIN", "RLE", "BIT_PACKED", "DELTA_LENGTH_BYTE_ARRAY"}
IN_DICTIONARY = {"PLAIN", "RLE", "BIT_PACKED", "RLE_DICTIONARY", "PLAIN_DICTIONARY"}  # what Arrow reads as a dictionary
MIN_IMAGE_BYTES = 64  # no PNG, JPEG or WebP is smaller


class ParquetParams(Section):
    """`train` and `test` are files or globs; `image_column` may be a path into structs, such as img.bytes.

    `classes: null` takes the names of the Hugging Face metadata where the file has them, else numbers.
    `size: null` wants images of one size; otherwise the shorter side is resized to it and the centre cut out.
    """

    kind: Literal["parquet"]
    train: tuple[str, ...]
    test: tuple[str, ...]
    image_column: str = "img.bytes"
    label_column: str = "label"
    classes: tuple[str, ...] | None = None
    size: PositiveInt | None = None
    channels: Literal[1, 3] = 3

    def open(self) -> Source:
        return open_parquet(**self.model_dump(exclude={"kind"}))


def open_parquet(
    *,
    train: tuple[str, ...],
    test: tuple[str, ...],
    image_column: str,
    label_column: str,
    classes: tuple[str, ...] | None,
    size: int | None,
    channels: int,
) -> Source:
    """Reads the labels and one image; the other images are decoded as they are streamed.

    Raises:
        InputError: no file, not Parquet, a column is missing or of another type, a label outside the classes.
    """
    files = expand_splits(train, test)
    before = {name: snapshot(paths) for name, paths in files.items()}
    labels = {name: [read_labels(file, label_column) for file in paths] for name, paths in files.items()}
    names = class_names(classes or huggingface_names(files["train"][0], label_column), np.concatenate(labels["train"]))
    for name, paths in files.items():
        for file, file_labels in zip(paths, labels[name], strict=True):
            check_labels(file_labels, len(names), file)
            check_image_column(file, image_column)
    shape = (size, size, channels) if size else first_shape(all_images(files["train"], image_column), channels)

    def split(name: SplitName) -> Split:
        chosen, split_labels = files[name], np.concatenate(labels[name])
        return Split(
            split_labels,
            lambda rows, corrupt: decode_all(
                encoded(chosen, image_column, rows), split_labels, rows, corrupt, shape=shape, size=size
            ),
            files=before[name],
        )

    origin = {
        "kind": "parquet",
        "files": digests(files),
        "image_column": image_column,
        "label_column": label_column,
        "size": size,
    }
    return Source(names, shape, origin, {"train": split("train"), "test": split("test")})


@contextmanager
def reading(file: Path, as_dictionary: str | None = None) -> Iterator[pq.ParquetFile]:
    """An opened Parquet file, read page by page, a column of bytes as a dictionary if wanted; whatever Arrow cannot read in
    it becomes an InputError."""
    columns = [as_dictionary] if as_dictionary else None
    try:
        with pq.ParquetFile(file, read_dictionary=columns, buffer_size=BUFFER_BYTES, pre_buffer=False) as parquet:
            yield parquet
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file}: not a readable Parquet file ({error})") from error


def read_labels(file: Path, column: str) -> Labels:
    """The label column (n,).

    Raises:
        InputError: it is missing, holds nulls, is not of an integer type, or is of more rows than the file can hold images.
    """
    with reading(file) as parquet:
        field = find_column(file, parquet.schema_arrow, column)
        if not pa.types.is_integer(field.type):
            raise InputError(f"{file}: wanted integers in the label column {column!r}, got {field.type}")
        num_rows, done = parquet.metadata.num_rows, 0
        check_expansion(f"{file}: {num_rows} images", file.stat().st_size, num_rows * MIN_IMAGE_BYTES)
        labels = np.empty(max(num_rows, 0), np.int64)
        for batch in parquet.iter_batches(LABEL_ROWS, columns=[column]):
            values = leaf(batch, column)
            if values.null_count:
                row = done + pc.index(pc.is_null(values), True).as_py()
                raise InputError(f"{file}: row {row}: wanted a label in {column!r}, got null")
            labels[done : done + len(values)] = values.to_numpy()[: num_rows - done]
            done += len(values)
    if done != num_rows:
        raise InputError(f"{file}: wanted {num_rows} rows, as it says, got {done}; fetch or write it again")
    return labels


def huggingface_names(file: Path, column: str) -> tuple[str, ...] | None:
    """Class names that the `datasets` library wrote into the schema, or None."""
    with reading(file) as parquet:
        metadata = parquet.schema_arrow.metadata or {}
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, ValueError, TypeError):
        return None
    return tuple(map(str, names)) if isinstance(names, list) and names else None


def find_column(file: Path, schema: pa.Schema, column: str) -> pa.Field:
    """The field at a dotted path."""
    fields: Any = schema
    for part in column.split("."):
        names = [field.name for field in fields] if isinstance(fields, pa.Schema) or pa.types.is_struct(fields) else []
        if part not in names:
            raise InputError(f"{file}: wanted the column {column!r}, but there is no {part!r} among: {', '.join(names)}")
        field = fields.field(part)
        fields = field.type
    return field


def image_leaf(file: Path, schema: pa.Schema, column: str) -> str:
    """Path to the encoded bytes: the column itself, or the field `bytes` of a struct."""
    field = find_column(file, schema, column)
    if pa.types.is_struct(field.type):
        return image_leaf(file, schema, f"{column}.bytes")
    if not (pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)):
        raise InputError(f"{file}: wanted encoded images (binary) in the column {column!r}, got {field.type}")
    return column


def check_image_column(file: Path, column: str) -> None:
    """Raise an InputError unless the column holds encoded images, of about the size that the file takes."""
    with reading(file) as parquet:
        path = image_leaf(file, parquet.schema_arrow, column)
        for group in range(parquet.num_row_groups):
            chunk = chunk_of(parquet, group, path)
            check_expansion(f"{file}: {column!r}", chunk.total_compressed_size, chunk.total_uncompressed_size)


def chunk_of(parquet: pq.ParquetFile, group: int, path: str) -> Any:
    """What a file says of one column in one row group."""
    described = parquet.metadata.row_group(group)
    columns = (described.column(index) for index in range(described.num_columns))
    return next(chunk for chunk in columns if chunk.path_in_schema == path)


def rows_at_once(chunk: Any) -> tuple[int, bool]:
    """How many rows of a column to read at once, whatever it holds, and whether as a dictionary: an image that many rows
    share is then in memory once. Values that are written as what differs from the one before can be of any size."""
    encodings = set(chunk.encodings)
    if encodings & {"RLE_DICTIONARY", "PLAIN_DICTIONARY"} and encodings <= IN_DICTIONARY:
        return TASK_ROWS, True
    if encodings <= PLAIN:
        return min(TASK_ROWS, max(1, BATCH_BYTES * chunk.num_values // max(1, chunk.total_uncompressed_size))), False
    return 1, False


def leaf(table: pa.Table | pa.RecordBatch, column: str) -> Any:
    """The array at a dotted path; null where any struct on the way is."""
    first, *rest = column.split(".")
    array = table.column(first)
    return pc.struct_field(array, rest) if rest else array


def all_images(files: list[Path], column: str) -> Iterator[Encoded]:
    """Every encoded image, one by one."""
    num_rows = sum(pq.read_metadata(file).num_rows for file in files)
    for batch in encoded(files, column, np.arange(num_rows)):
        yield from batch


def encoded(files: list[Path], column: str, rows: Rows) -> Iterator[list[Encoded]]:
    """The encoded images of ascending rows, counted over all files, in small batches; row groups without any are skipped."""
    start = 0
    for file in files:
        with reading(file) as parquet:
            path, first = image_leaf(file, parquet.schema_arrow, column), 0
        with reading(file) as plain, reading(file, as_dictionary=path) as shared:
            for group in range(plain.num_row_groups):
                stop = first + plain.metadata.row_group(group).num_rows
                if len(between(rows, start + first, start + stop)):
                    count, dictionary = rows_at_once(chunk_of(plain, group, path))
                    for batch in (shared if dictionary else plain).iter_batches(count, row_groups=[group], columns=[path]):
                        chosen = between(rows, start + first, start + first + len(batch)) - start
                        for part, images in in_memory(leaf(batch, path), chosen - first):
                            yield [(f"{file}: row {first + k}", image) for k, image in zip(part, images, strict=True)]
                        first += len(batch)
                first = stop
            start += first


def in_memory(values: Any, chosen: Rows) -> Iterator[tuple[Rows, list[bytes | None]]]:
    """The chosen rows of a batch with their values, as many at a time as fit into BATCH_BYTES were each the largest."""
    distinct = values.dictionary if pa.types.is_dictionary(values.type) else values
    count = max(1, BATCH_BYTES // (pc.max(pc.binary_length(distinct)).as_py() or 1))
    for first in range(0, len(chosen), count):
        part = chosen[first : first + count]
        found = values.take(pa.array(part))
        yield part, (found if distinct is values else found.dictionary_decode()).to_pylist()


def between(rows: Rows, start: int, stop: int) -> Rows:
    """The part of ascending rows in [start, stop)."""
    return rows[np.searchsorted(rows, start) : np.searchsorted(rows, stop)]
