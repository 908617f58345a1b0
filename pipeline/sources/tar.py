"""Tar files read in place: an index of their members, never an extraction."""

import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.params import InputError
from pipeline.sources.decode import Span

MAX_HEADER_BYTES = 2**20  # of a header that holds a long name or PAX records
EXTENDED = {tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}
RECORD = re.compile(rb"(\d{1,7}) ([^=\n]+)=")

Member = tuple[str, Span]  # the name in the tar without a leading ./, and where its bytes are


class Header(tarfile.TarInfo):
    """A header of a tar that is refused before the library reads what it claims: a negative size goes back to what was read
    before, a large one of a long name is read into memory."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> "Header":
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0:
            raise tarfile.ReadError(f"{header.name!r} has the size {header.size}")
        if header.type in EXTENDED and header.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a long name or PAX header of {header.size} bytes, wanted at most {MAX_HEADER_BYTES}")
        return header

    def _proc_pax(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        """The library (before CVE-2024-6232 was repaired) lets records overlap: memory that grows with their square."""
        assert archive.fileobj is not None
        start = archive.fileobj.tell()
        check_records(archive.fileobj.read(self.size))
        archive.fileobj.seek(start)
        found: tarfile.TarInfo = super()._proc_pax(archive)  # type: ignore[misc]
        return found


def check_records(content: bytes) -> None:
    """Raise a ReadError unless content is PAX records "length key=value\\n", one after the other, of no sparse file."""
    done = 0
    while done < len(content):
        found = RECORD.match(content, done)
        stop = done + int(found[1]) if found else 0
        if found is None or stop < found.end() or content[stop - 1 : stop] != b"\n":
            raise tarfile.ReadError("a damaged PAX header")
        if found[2].startswith(b"GNU.sparse."):
            raise tarfile.ReadError("a sparse file")
        done = stop


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Whatever cannot be read in a tar becomes an InputError."""
    try:
        yield
    except (tarfile.TarError, OSError, EOFError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: not a readable tar file ({error}); decompress a .tar.gz, or fetch it again") from error


def members(file: Path) -> Iterator[Member]:
    """The files in an uncompressed tar, in its order, hidden ones left out. Memory does not grow with the tar.

    Raises:
        InputError: not a tar, damaged or cut short, a name that leads outside, or a link, a device or a sparse file.
    """
    num_bytes, last = file.stat().st_size, 0
    with reading(file), tarfile.open(file, "r:", tarinfo=Header) as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # else the library keeps them all
            name = safe_name(file, member.name)
            if member.size < 0 or archive.offset <= last:  # of a PAX record
                raise InputError(f"{file}: damaged: {name!r} has the size {member.size}; fetch it again")
            last = archive.offset
            if member.isdir() or (member.isreg() and PurePosixPath(name).name.startswith(".")):
                continue
            if not member.isreg() or member.issparse():
                kind = "a link" if member.islnk() or member.issym() else "a sparse or special file"
                raise InputError(f"{file}: {name!r} is {kind}: refused; pack the files themselves (tar --dereference)")
            if member.offset_data + member.size > num_bytes:
                raise InputError(f"{file}: cut short within {name!r}; fetch it again")
            yield name, Span(file, member.offset_data, member.size)
        check_end(file, archive.offset)


def safe_name(file: Path, name: str) -> str:
    """Nothing is extracted, but a name that leads outside is a sign of harm, and names become classes."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise InputError(f"{file}: the name {name!r} leads outside the tar: refused")
    return path.as_posix()


def check_end(file: Path, offset: int) -> None:
    """The library takes a damaged header for the end: the end is where nothing or zeros follow."""
    with file.open("rb") as content:
        content.seek(offset)
        if content.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise InputError(f"{file}: damaged at byte {offset}; fetch it again")
