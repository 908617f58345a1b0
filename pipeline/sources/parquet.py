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
def reading(file: Path) -> Iterator[pq.ParquetFile]:
    """An opened Parquet file; whatever Arrow cannot read in it becomes an InputError."""
    try:
        with pq.ParquetFile(file) as parquet:
            yield parquet
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file}: not a readable Parquet file ({error})") from error


def read_labels(file: Path, column: str) -> Labels:
    """The label column (n,).

    Raises:
        InputError: it is missing, holds nulls, or is not of an integer type.
    """
    with reading(file) as parquet:
        field = find_column(file, parquet.schema_arrow, column)
        if not pa.types.is_integer(field.type):
            raise InputError(f"{file}: wanted integers in the label column {column!r}, got {field.type}")
        values = leaf(parquet.read(columns=[column]), column)
    if values.null_count:
        row = pc.index(pc.is_null(values), True).as_py()
        raise InputError(f"{file}: row {row}: wanted a label in {column!r}, got null")
    return values.to_numpy().astype(np.int64)


def huggingface_names(file: Path, column: str) -> tuple[str, ...] | None:
    """Class names that the `datasets` library wrote into the schema, or None."""
    with reading(file) as parquet:
        metadata = parquet.schema_arrow.metadata or {}
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    names = features.get(column, {}).get("names")
    return tuple(names) if names else None


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
            described = parquet.metadata.row_group(group)
            for chunk in (described.column(index) for index in range(described.num_columns)):
                if chunk.path_in_schema == path:
                    check_expansion(f"{file}: {column!r}", chunk.total_compressed_size, chunk.total_uncompressed_size)


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
            for group in range(parquet.num_row_groups):
                stop = first + parquet.metadata.row_group(group).num_rows
                if len(between(rows, start + first, start + stop)):
                    for batch in parquet.iter_batches(TASK_ROWS, row_groups=[group], columns=[path]):
                        chosen = between(rows, start + first, start + first + len(batch)) - start
                        images = leaf(batch, path).take(pa.array(chosen - first)).to_pylist()
                        first += len(batch)
                        if images:
                            yield [(f"{file}: row {row}", image) for row, image in zip(chosen, images, strict=True)]
                first = stop
            start += first


def between(rows: Rows, start: int, stop: int) -> Rows:
    """The part of ascending rows in [start, stop)."""
    return rows[np.searchsorted(rows, start) : np.searchsorted(rows, stop)]
