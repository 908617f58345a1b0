"""One array in an .npz archive, read by rows straight from the archive and never loaded."""

import errno
import io
import lzma
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import digest_file
from pipeline.images import one_line
from pipeline.params import InputError
from pipeline.sources.rows import Rows
from pipeline.sources.source import check_expansion

MAX_HEADER_BYTES = 2**16
# What zipfile and the decompressors raise on damaged bytes; RuntimeError: encrypted, or an unknown compression.
UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    RuntimeError,
    MemoryError,
    OverflowError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
)


@dataclass(frozen=True)
class Member:
    """One array in an .npz: its shape and type, and where its rows begin.

    `body` is the offset of the first row in the member, `stored_at` that of the member in the file, or None if compressed.
    `digest` is what tells its content apart: the CRC-32 that the archive keeps, or a SHA-256.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    body: int
    stored_at: int | None
    digest: dict[str, str]

    @contextmanager
    def opened(self, *, any_order: bool) -> Iterator[tuple[IO[bytes], int]]:
        """A file and the offset of the first row in it.

        An uncompressed member is read in place. A compressed one can only be read forward; for `any_order` it is
        decompressed to a temporary file first.
        """
        if self.stored_at is not None:
            with self.file.open("rb", buffering=512) as file:  # single rows are far apart: reading ahead is waste
                yield file, self.stored_at + self.body
            return
        with zipfile.ZipFile(self.file) as archive, archive.open(f"{self.key}.npy") as member:
            if not any_order:
                yield member, self.body
                return
            with TemporaryFile() as spool:
                with reading(self.file):
                    shutil.copyfileobj(member, spool, 2**20)
                yield spool, self.body

    def rows(self, file: IO[bytes], start: int, rows: Rows) -> NDArray[Any]:
        """Rows (B,) in their order: (B, ...). They are read in ascending order, one read for each run of neighbours."""
        order = np.argsort(rows, kind="stable")
        ascending = rows[order]
        firsts = np.flatnonzero(np.diff(ascending, prepend=-2) != 1)  # of runs
        found = np.empty((len(rows), *self.shape[1:]), self.dtype)
        space = found.reshape(-1).view(np.uint8).data
        row_bytes = self.dtype.itemsize * prod(self.shape[1:])
        offsets = start + ascending[firsts] * row_bytes
        runs = zip(offsets.tolist(), firsts.tolist(), [*firsts[1:].tolist(), len(rows)], strict=True) if len(rows) else ()
        for offset, first, stop in runs:
            file.seek(offset)
            filled, wanted = first * row_bytes, stop * row_bytes
            while filled < wanted:
                count = file.readinto(space[filled:wanted])  # type: ignore[attr-defined]
                if not count:
                    raise EOFError(f"{self.key!r} ends before its last row")
                filled += count
        if np.array_equal(order, np.arange(len(order))):
            return found
        in_order = np.empty_like(found)
        in_order[order] = found
        return in_order


@contextmanager
def reading(file: Path, kind: str = ".npz") -> Iterator[None]:
    """Whatever cannot be read in an archive becomes an InputError."""
    try:
        yield
    except InputError:
        raise
    except UNREADABLE as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise  # a compressed member fills the disk when it is unpacked
        raise InputError(f"{file}: not a readable {kind} file ({one_line(error)}); fetch or write it again") from error


def open_member(file: Path, key: str) -> Member:
    """Find one array by its key; only its header is read.

    Raises:
        InputError: not an archive, no such key, not an array, an array of Python objects, or one cut short.
    """
    with reading(file), zipfile.ZipFile(file) as archive:
        keys = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        if key not in keys:
            raise InputError(f"{file}: wanted an array {key!r}, got: {', '.join(keys) or 'none'}")
        entry = archive.getinfo(f"{key}.npy")
        at, stored = data_offset(file, entry), entry.compress_type == zipfile.ZIP_STORED
        packed = max(entry.compress_size, entry.file_size) if stored else entry.compress_size
        if (end := at + packed) > (num_bytes := file.stat().st_size):
            raise InputError(f"{file}: {key!r}: wanted {end} bytes, as its directory says, got {num_bytes}; fetch it again")
        check_expansion(f"{file}: {key!r}", packed, entry.file_size)
        with archive.open(entry) as member:
            shape, dtype, body = read_header(member, f"{file}: {key!r}")
    wanted = body + dtype.itemsize * prod(shape)
    if entry.file_size != wanted:
        raise InputError(f"{file}: {key!r}: wanted {wanted} bytes for {dtype} {shape}, got {entry.file_size}; fetch it again")
    return Member(file, key, shape, dtype, body, at if stored else None, {"crc32": f"{entry.CRC:08x}"})


def open_array(file: Path, key: str) -> Member:
    """The array in an .npy file, which gets the name key; its header is read, and its bytes for the digest.

    Raises:
        InputError: not an array, an array of Python objects, or one cut short.
    """
    with reading(file, ".npy"), file.open("rb") as content:
        shape, dtype, body = read_header(content, str(file))
    wanted, got = body + dtype.itemsize * prod(shape), file.stat().st_size
    if got != wanted:
        raise InputError(f"{file}: wanted {wanted} bytes for {dtype} {shape}, got {got}; fetch it again")
    return Member(file, key, shape, dtype, body, 0, {"file": file.as_posix(), "sha256": digest_file(file)})


def read_header(member: IO[bytes], where: str) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape and type of the .npy that begins here, and the offset of its first row."""
    content = io.BytesIO(member.read(MAX_HEADER_BYTES))  # a header may claim 4 GiB
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        version = np.lib.format.read_magic(content)
        if version not in readers:
            raise InputError(f"{where}: wanted .npy version 1.0 or 2.0, got {version}; write it with numpy.save")
        shape, fortran_order, dtype = readers[version](content)
    except InputError:
        raise
    except Exception as error:  # numpy reads the header as Python: SyntaxError, TokenError, MemoryError, RecursionError, ...
        raise InputError(f"{where}: not an .npy array ({one_line(error)})") from error
    if min(shape, default=0) < 0:
        raise InputError(f"{where}: wanted no axis below 0, got {shape}; fetch it again")
    if dtype.hasobject:
        raise InputError(f"{where}: wanted numbers, got an array of Python objects, which would have to be unpickled: refused")
    if fortran_order and len(shape) > 1:
        raise InputError(
            f"{where}: wanted rows one after the other (C order), got Fortran order; save np.ascontiguousarray of it"
        )
    return shape, dtype, content.tell()


def data_offset(file: Path, entry: zipfile.ZipInfo) -> int:
    """Where the bytes of a member begin: after its local header, whose name and extra field vary in length."""
    with file.open("rb") as raw:
        raw.seek(entry.header_offset + 26)
        name_bytes, extra_bytes = struct.unpack("<HH", raw.read(4))
    return entry.header_offset + 30 + int(name_bytes) + int(extra_bytes)
