"""A tar is read in place, member by member; what could harm or was damaged is refused by name."""

import tarfile
import tracemalloc
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from pipeline.params import InputError
from pipeline.sources.tar import members
from tests.sources.samples import write_tar


def entry(name: str, kind: bytes, linkname: str = "") -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.type, found.linkname = kind, linkname
    return found


def test_members_are_where_their_bytes_are_whatever_the_length_of_their_names(tmp_path: Path) -> None:
    content = {f"./{'long/' * 40}{i}.png": bytes([i]) * (i + 1) for i in range(3)} | {"d": entry("d", tarfile.DIRTYPE)}
    file = write_tar(tmp_path / "a.tar", content | {"d/.hidden": b"x", "d/empty.txt": b""})
    found = {name: file.read_bytes()[span.offset : span.offset + span.size] for name, span in members(file)}
    assert found == {f"{'long/' * 40}{i}.png": bytes([i]) * (i + 1) for i in range(3)} | {"d/empty.txt": b""}


BAD: dict[str, tuple[dict[str, bytes | tarfile.TarInfo], str]] = {
    "an absolute path": ({"/etc/passwd": b"x"}, "the name '/etc/passwd' leads outside the tar: refused"),
    "a path upwards": ({"a/../../b.png": b"x"}, "the name 'a/../../b.png' leads outside the tar: refused"),
    "a path of Windows": ({"..\\b.png": b"x"}, "leads outside the tar: refused"),
    "a symbolic link": ({"a": entry("a", tarfile.SYMTYPE, "/etc/passwd")}, "'a' is a link: refused"),
    "a hard link": ({"a": entry("a", tarfile.LNKTYPE, "b")}, "'a' is a link: refused"),
    "a device": ({"a": entry("a", tarfile.CHRTYPE)}, "'a' is a sparse or special file: refused"),
    "a pipe": ({"a": entry("a", tarfile.FIFOTYPE)}, "'a' is a sparse or special file: refused"),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD.keys())
def test_members_that_lead_elsewhere_are_refused(
    tmp_path: Path, content: dict[str, bytes | tarfile.TarInfo], message: str
) -> None:
    file = write_tar(tmp_path / "a.tar", {"fine.png": b"x"} | content)
    with pytest.raises(InputError) as error:
        list(members(file))
    assert str(error.value).startswith(str(file))
    assert message in str(error.value)


def cut_in_data(content: bytes) -> bytes:
    return content[: 512 + 100]


def cut_in_header(content: bytes) -> bytes:
    return content[: 512 + 1024 + 100]


def damage_header(content: bytes) -> bytes:
    return content[: 512 + 1024 + 10] + b"\xff" * 20 + content[512 + 1024 + 30 :]


def claim_more(content: bytes) -> bytes:
    header = tarfile.TarInfo("big.png")
    header.size = 2**40
    return content[: 512 + 1024] + header.tobuf() + bytes(1024)


@pytest.mark.parametrize("damage", [cut_in_data, cut_in_header, damage_header, claim_more, lambda _: b"no tar" * 1000])
def test_a_damaged_tar_is_refused_and_never_taken_for_a_shorter_one(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    file = write_tar(tmp_path / "a.tar", {"a.png": bytes(1000), "b.png": bytes(1000), "c.png": bytes(1000)})
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InputError, match=r"a\.tar: "):
        list(members(file))


def raw(name: str, kind: bytes, content: bytes, size: int | None = None) -> bytes:
    """A header with any size, negative ones in base 256, and its content in whole blocks."""
    header = bytearray(entry(name, kind).tobuf())
    size = len(content) if size is None else size
    header[124:136] = b"%011o\0" % size if 0 <= size < 8**11 else size.to_bytes(12, "big", signed=True)
    if size >= 8**11:
        header[124] |= 0x80
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + content + bytes(-len(content) % 512)


def pax(**records: object) -> bytes:
    lines = b""
    for key, value in records.items():
        text = f" {key.replace('__', '.')}={value}\n".encode()
        length = len(text) + len(str(len(text)))
        lines += str(length + (len(str(length)) > len(str(len(text))))).encode() + text
    return lines


FILE = raw("b.png", tarfile.REGTYPE, b"x")
OVERLAP = b"2 " * 20_000 + b"=\n"
HOSTILE = {
    "a PAX size that leads back to the header": (raw("x", tarfile.XHDTYPE, pax(size=-1536)) + FILE, "the size -1536"),
    "a PAX size that leads back a little": (raw("x", tarfile.XHDTYPE, pax(size=-100)) + FILE, "the size -100"),
    "a negative size of a directory": (
        raw("x", tarfile.XHDTYPE, pax(size=-1)) + raw("d", tarfile.DIRTYPE, b""), "the size -1",
    ),
    "a negative size": (raw("b.png", tarfile.REGTYPE, b"", -1536), "'b.png' has the size -1536"),
    "a global negative size": (raw("g", tarfile.XGLTYPE, pax(size=-1536)) + raw("b.png", tarfile.REGTYPE, b"", -1), "size -"),
    "a sparse size": (raw("x", tarfile.XHDTYPE, pax(GNU__sparse__size=-5)) + FILE, "a sparse file"),
    "a long name of a terabyte": (raw("n", tarfile.GNUTYPE_LONGNAME, b"n", 2**40) + FILE, "PAX header of 1099511627776 bytes"),
    "a long link of a terabyte": (raw("n", tarfile.GNUTYPE_LONGLINK, b"n", 2**40) + FILE, "PAX header of 1099511627776 bytes"),
    "a PAX header of a terabyte": (raw("x", tarfile.XHDTYPE, b"", 2**40) + FILE, "PAX header of 1099511627776 bytes"),
    "a global header of a terabyte": (raw("g", tarfile.XGLTYPE, b"", 2**40) + FILE, "PAX header of 1099511627776 bytes"),
    "a negative long name": (raw("n", tarfile.GNUTYPE_LONGNAME, b"n", -1) + FILE, "has the size -1"),
    "PAX records in each other": (raw("x", tarfile.XHDTYPE, OVERLAP) + FILE, "a damaged PAX header"),
    "headers of headers": (raw("x", tarfile.XHDTYPE, pax(a=1)) * 2000 + FILE, "maximum recursion depth"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_a_size_that_leads_back_or_fills_the_memory_is_refused_in_one_line(
    tmp_path: Path, content: bytes, message: str, first: bool
) -> None:
    before = b"" if first else raw("a.png", tarfile.REGTYPE, bytes(700))
    (tmp_path / "a.tar").write_bytes(before + content + bytes(1024))
    tracemalloc.start()
    with pytest.raises(InputError) as error:
        list(islice(members(tmp_path / "a.tar"), 3))  # an endless stream raises nothing
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(error.value).startswith(f"{tmp_path / 'a.tar'}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert peak < 2**24


def test_a_long_name_in_either_kind_of_header_and_a_global_comment_are_read(tmp_path: Path) -> None:
    name = "n" * 300 + ".png"
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=kind, pax_headers={"comment": "é" * 200}) as archive:
            archive.addfile(tarfile.TarInfo(name))
        assert [found for found, _ in members(tmp_path / "a.tar")] == [name]


def test_a_compressed_tar_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(InputError, match=r"a\.tar\.gz: not a readable tar file .*; decompress a \.tar\.gz"):
        list(members(tmp_path / "a.tar.gz"))


def test_memory_does_not_grow_with_the_number_of_members(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "a.tar", {f"{i}.png": b"x" for i in range(3000)})
    tracemalloc.start()
    held = 0
    for count, _ in enumerate(members(file), 1):  # at the last member, what tarfile and the reader still hold
        if count == 3000:
            ours = [tracemalloc.Filter(True, pattern) for pattern in (tarfile.__file__, "*/sources/tar.py")]
            held = sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces(ours).traces)
    tracemalloc.stop()
    assert 0 < held < 3000 * 10
