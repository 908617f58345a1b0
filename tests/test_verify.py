"""Whatever happens to a store after it was written is found and the file is named."""

import hashlib
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from pipeline.image_writing import write_store
from pipeline.images import StoreHeader, load_map
from pipeline.params import InputError
from pipeline.verify import check_counts, check_file, stores_below, verify
from tests.conftest import ROOT


@pytest.fixture
def store(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    chunk = rng.integers(0, 256, (10, 2, 3, 3), np.uint8), rng.integers(0, 3, 10)
    write_store(
        tmp_path / "store", [chunk], classes=("ant", "bee", "cat"), shape=(2, 3, 3), shard_rows=4, origin={},
        source_rows=lambda: np.arange(10)[::-1],
    )  # fmt: skip
    return tmp_path / "store"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def digest_file_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def edit(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    header = json.loads((path / "store.json").read_text())
    change(header)
    (path / "store.json").write_text(json.dumps(header))


DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a flipped byte": (lambda s: flip(s / "images-00001.npy"), ["images-00001.npy: its bytes have changed"]),
    "a flipped label": (
        lambda s: np.save(s / "labels.npy", np.zeros(10, np.int64)),
        ["labels.npy: its bytes have changed", "store.json: wanted class_counts [10, 0, 0] as in labels.npy"],
    ),
    "a flipped source row": (lambda s: flip(s / "source_rows.npy"), ["source_rows.npy: its bytes have changed"]),
    "a truncated shard": (
        lambda s: (s / "images-00002.npy").write_bytes((s / "images-00002.npy").read_bytes()[:-1]),
        ["images-00002.npy: its bytes have changed"],
    ),
    "a missing shard": (lambda s: (s / "images-00000.npy").unlink(), ["images-00000.npy: not readable"]),
    "a shard too many": (
        lambda s: np.save(s / "images-00003.npy", np.zeros(3, np.uint8)),
        ["images-00003.npy: a shard that store.json does not have"],
    ),
    "a wrong count": (
        lambda s: edit(s, lambda h: h.update(count=9)),
        ["labels.npy: wanted int64 (9,), got int64 (10,)", "source_rows.npy: wanted int64 (9,)",
         "store.json: wanted shards of 9 images in all (count), got 10"],
    ),
    "wrong class counts": (
        lambda s: edit(s, lambda h: h.update(class_counts=[10, 0, 0])), ["store.json: wanted class_counts ["],
    ),
    "too few classes": (
        lambda s: edit(s, lambda h: h.update(classes=["ant"])), ["labels.npy: wanted labels in [0, 1), got [0, 2]"],
    ),
    "no header": (
        lambda s: edit(s, lambda h: h.pop("shards")), ["store.json: not the header of an image store (shards: missing"],
    ),
    "a path that leads elsewhere": (
        lambda s: edit(s, lambda h: h["shards"][0].update(file="../../secret.npy")),  # type: ignore[index]
        ["store.json: wanted the shard 0 to be images-00000.npy, got '../../secret.npy'"],
    ),
}  # fmt: skip


def test_a_store_as_it_was_written_has_no_problem(store: Path) -> None:
    assert verify(store) == []


@pytest.mark.parametrize(("damage", "wanted"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_found_and_the_file_is_named(store: Path, damage: Callable[[Path], object], wanted: list[str]) -> None:
    damage(store)
    problems = verify(store)
    assert len(problems) == len(wanted)
    for problem, part in zip(problems, wanted, strict=True):
        assert problem.startswith(str(store))
        assert part in problem


@pytest.mark.parametrize("name", ["images-00001.npy", "labels.npy", "source_rows.npy"])
def test_a_flip_in_every_byte_of_a_header_is_found_and_no_reader_fails_on_it_otherwise(store: Path, name: str) -> None:
    header, content = StoreHeader.read(store), (store / name).read_bytes()
    shape, dtype = ((4, 2, 3, 3), np.uint8) if name.startswith("images") else ((10,), np.int64)
    for place in range(256):  # two bits of every byte, others in the next
        damaged = bytearray(content)
        damaged[place // 2] ^= 1 << 5 * place % 8
        (store / name).write_bytes(damaged)
        (problem,) = check_file(store / name, shape, dtype, digest_file_of(content))
        assert problem.startswith(f"{store / name}: its bytes have changed")
        list(check_counts(store, header))  # it parses the labels itself
        with suppress(InputError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy on a header as of Python 2
            load_map(store / name, shape, dtype)


@pytest.mark.parametrize(
    "header",
    [b"(" * 5000, b"{" * 60_000, b"[" * 60, b"{[]: 1}", b"{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", b""],
    ids=["a deep one", "a long one", "one not closed", "one without a hash", "one of objects", "none"],
)
def test_a_hostile_header_whose_digest_is_right_is_named_in_one_line(store: Path, header: bytes) -> None:
    content = b"\x93NUMPY\x02\x00" + len(header).to_bytes(4, "little") + header
    (store / "labels.npy").write_bytes(content)
    edit(store, lambda h: h.update(labels_sha256=digest_file_of(content)))
    (problem,) = verify(store)
    assert problem.startswith(f"{store / 'labels.npy'}: not readable (")
    assert "\n" not in problem
    assert "()" not in problem


def test_the_stores_below_a_folder_are_found_and_a_folder_without_is_refused(store: Path, tmp_path: Path) -> None:
    assert stores_below(tmp_path) == stores_below(store) == [store]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: wanted an image store"):
        stores_below(tmp_path / "empty")


def test_the_command_ends_in_one_line_and_status_1_where_a_byte_has_changed(store: Path) -> None:
    command = [sys.executable, "-m", "pipeline", "verify", str(store)]
    assert subprocess.run(command, cwd=ROOT, check=False, capture_output=True).returncode == 0
    flip(store / "images-00000.npy")
    run = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert run.returncode == 1
    assert f"{store / 'images-00000.npy'}: its bytes have changed" in run.stdout
    assert run.stderr.startswith(f"error: {store}: 1 problems in 1 stores")
    assert run.stderr.count("\n") == 1
