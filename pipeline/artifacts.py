"""Artifacts on disk: schemas, digests, and writes that are either complete or absent."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.params import InputError

BATCH_ROWS = 2**20
SOURCES = ("real", "synthetic")
_SOURCE = pa.dictionary(pa.int8(), pa.string())

MARGINS_SCHEMA = pa.schema(
    [
        pa.field("source", _SOURCE, nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("label", pa.int16(), nullable=False),
        pa.field("predicted", pa.int16(), nullable=False),
        pa.field("margin", pa.float32()),
        pa.field("nearest", pa.int16()),
        pa.field("iterations", pa.int16(), nullable=False),
        pa.field("converged", pa.bool_(), nullable=False),
        pa.field("confidence", pa.float32(), nullable=False),
        pa.field("entropy", pa.float32(), nullable=False),
        pa.field("logit_margin", pa.float32(), nullable=False),
        pa.field("el2n", pa.float32(), nullable=False),
        pa.field("grand", pa.float32()),
    ]
)
MANIFEST_SCHEMA = pa.schema(
    [
        pa.field("source", _SOURCE, nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("label", pa.int16(), nullable=False),
        pa.field("kept", pa.bool_(), nullable=False),
        pa.field("eps", pa.float32()),
        pa.field("reason", pa.dictionary(pa.int8(), pa.string()), nullable=False),
    ]
)


@contextmanager
def publish(target: Path) -> Iterator[Path]:
    """Yield a fresh directory beside target; on success it becomes target in one rename, on failure it is removed. What
    target was before is moved aside whole, and removed only when the new one is in its place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        yield work
        sync(work)
        replace(target, work)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def replace(target: Path, work: Path) -> None:
    """Put the directory work in the place of target; if that fails, target is as it was."""
    old = target.with_name(f".{target.name}.{os.getpid()}.old.tmp")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    try:
        work.rename(target)
    except BaseException:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)  # what cannot be removed is not the artifact


def place(source: Path, target: Path) -> None:
    """Put a file of the run store into an artifact without copying it, where the file system can."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


def place_all(source: Path, target: Path) -> None:
    """`place` every file below source at the same path below target, but for the mark that source is finished."""
    for path in sorted(source.rglob("*")):
        if path.is_file() and path != source / "done.json":
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            place(path, target / path.relative_to(source))


def sync(directory: Path) -> None:
    """Flush every file below directory to the disk."""
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def write_json(path: Path, content: Any) -> None:
    """Write JSON with sorted keys, so that equal content is equal bytes; NaN is an error."""
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"
    work = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    work.write_text(text)
    work.rename(path)


def read_json(path: Path) -> Any:
    """Parse a JSON artifact.

    Raises:
        InputError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: wanted an artifact of an earlier stage, found none; run `dvc repro`") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); delete the artifact and run `dvc repro`") from None


def write_table(path: Path, table: pa.Table, metadata: dict[str, str] | None = None) -> None:
    """Write Parquet with file metadata."""
    pq.write_table(table.replace_schema_metadata(metadata or {}), path, compression="zstd", write_statistics=True)


def read_table(path: Path, schema: pa.Schema, columns: list[str] | None = None) -> pa.Table:
    """Read one Parquet file, or all parts of a directory in the order of their names.

    Raises:
        InputError: nothing there, not readable, or the columns are not those of the schema.
    """
    tables = []
    for part in table_parts(path, schema):
        with readable(part):
            tables.append(pq.read_table(part, columns=columns))
    return pa.concat_tables(tables)


def scan_table(path: Path, schema: pa.Schema, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """As `read_table`, in batches of at most `BATCH_ROWS` rows."""
    for part in table_parts(path, schema):
        with readable(part), pq.ParquetFile(part) as file:
            yield from file.iter_batches(BATCH_ROWS, columns=list(columns))


def source_codes(batch: pa.RecordBatch) -> NDArray[np.int8]:
    """Index in `SOURCES` of each row (n,); files may number their sources differently."""
    names, indices = tuple(batch["source"].dictionary.to_pylist()), batch["source"].indices.to_numpy()
    if names == SOURCES:
        return indices.astype(np.int8, copy=False)
    return np.array([SOURCES.index(name) for name in names], np.int8)[indices]


def table_parts(path: Path, schema: pa.Schema) -> list[Path]:
    """The Parquet files of a table, all of the schema.

    Raises:
        InputError: as `read_table`.
    """
    parts = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not parts or not parts[0].is_file():
        raise InputError(f"{path}: wanted Parquet files of an earlier stage, found none; run `dvc repro`")
    for part in parts:
        with readable(part):
            found = pq.read_schema(part)
        if not found.remove_metadata().equals(schema):
            raise InputError(f"{part}: wanted the columns {schema.names} with their types, got {found.names}")
    return parts


@contextmanager
def readable(part: Path) -> Iterator[None]:
    """Whatever Arrow cannot read in a file becomes an InputError."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{part}: not a readable Parquet file ({error}); delete the artifact and run `dvc repro`") from error


def digest_file(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
