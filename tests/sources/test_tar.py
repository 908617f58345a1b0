"""A tar is read in place, member by member; what could harm or was damaged is refused by name."""

import tarfile
import tracemalloc
from collections.abc import Callable
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
