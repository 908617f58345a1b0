"""Tar files read in place: an index of their members, never an extraction."""

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from pipeline.params import InputError
from pipeline.sources.decode import Span

Member = tuple[str, Span]  # the name in the tar without a leading ./, and where its bytes are


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Whatever cannot be read in a tar becomes an InputError."""
    try:
        yield
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: not a readable tar file ({error}); decompress a .tar.gz, or fetch it again") from error


def members(file: Path) -> Iterator[Member]:
    """The files in an uncompressed tar, in its order, hidden ones left out. Memory does not grow with the tar.

    Raises:
        InputError: not a tar, damaged or cut short, a name that leads outside, or a link, a device or a sparse file.
    """
    num_bytes = file.stat().st_size
    with reading(file), tarfile.open(file, "r:") as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # else the library keeps them all
            name = safe_name(file, member.name)
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
