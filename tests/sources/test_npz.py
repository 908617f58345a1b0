"""The .npz reader gives what numpy.load gives, without loading it; any part of its seeded order can be taken alone."""

import hashlib
import io
import os
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.images import Chunk
from pipeline.params import InputError
from pipeline.sources import npz, source
from pipeline.sources.corrupt import Corrupt
from pipeline.sources.npz import Archives, NpyPair, NpyParams, NpzParams, open_npz, source_rows, stream
from pipeline.sources.rows import permuted
from tests.sources.samples import joined


def sample(count: int, seed: int = 0) -> Chunk:
    """Images sorted by class, as in the archives of Wang et al."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 4, 3, 3), np.uint8), np.sort(rng.integers(0, 10, count))


def save(path: Path, chunk: Chunk, compressed: bool = False) -> str:
    (np.savez_compressed if compressed else np.savez)(path, image=chunk[0], label=chunk[1])
    return str(path)


def same(got: Chunk, wanted: Chunk) -> None:
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "CHUNK_ROWS", 16)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_source_gives_the_arrays_that_numpy_loads(tmp_path: Path, compressed: bool) -> None:
    train = [save(tmp_path / f"train{index}.npz", sample(40 + index, index), compressed) for index in range(2)]
    test = save(tmp_path / "test.npz", sample(20, 9), compressed)
    opened = NpzParams(kind="npz", train=(f"{tmp_path}/train*.npz",), test=(test,)).open()
    loaded = [np.load(file) for file in train]
    wanted = tuple(np.concatenate([file[key] for file in loaded]) for key in ("image", "label"))
    same(joined(opened.splits["train"]()), (wanted[0], wanted[1]))
    same(joined(opened.splits["test"]()), sample(20, 9))
    assert (opened.shape, opened.classes) == ((4, 3, 3), tuple("0123456789"))
    assert max(len(images) for images, _ in opened.splits["train"]()) == 16
    rows = np.array([0, 1, 17, 39, 40, 41, 80])
    same(joined(opened.splits["train"](rows)), (wanted[0][rows], wanted[1][rows]))


def test_the_origin_names_the_files_with_the_checksums_of_their_arrays(tmp_path: Path) -> None:
    file = save(tmp_path / "a.npz", sample(10))
    with zipfile.ZipFile(file) as archive:
        checksums = {key: {"crc32": f"{archive.getinfo(f'{key}.npy').CRC:08x}"} for key in ("image", "label")}
    assert Archives.open([Path(file)]).origin() == [{"file": file, "rows": 10, "arrays": checksums}]


@pytest.mark.parametrize("compressed", [False, True])
def test_a_stream_is_a_permutation_of_all_files(tmp_path: Path, compressed: bool) -> None:
    chunks = [sample(40, 1), sample(61, 2)]
    files = [save(tmp_path / f"{index}.npz", chunk, compressed) for index, chunk in enumerate(chunks)]
    all_images, all_labels = joined(chunks)
    count, parts = stream(files, seed=5)
    order = permuted(np.arange(101), 101, 5)
    assert count == 101
    same(joined(parts), (all_images[order], all_labels[order]))


def test_parts_of_a_stream_join_to_the_whole(tmp_path: Path) -> None:
    file = save(tmp_path / "a.npz", sample(101))
    parts = [stream([file], seed=5, num_images=90, start=start, stop=stop)[1] for start, stop in ((0, 37), (37, 38), (38, 90))]
    same(joined(chunk for part in parts for chunk in part), joined(stream([file], seed=5, num_images=90)[1]))


def test_the_seed_alone_decides_the_order(tmp_path: Path) -> None:
    file = save(tmp_path / "a.npz", sample(101))
    first, again, other = (joined(stream([file], seed=seed)[1])[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_part_of_an_archive_sorted_by_class_holds_every_class(tmp_path: Path) -> None:
    labels = np.repeat(np.arange(10), 1000)
    file = save(tmp_path / "a.npz", (np.zeros((10_000, 1, 1, 3), np.uint8), labels))
    _, drawn = joined(stream([file], seed=0, num_images=1000)[1])
    assert np.abs(np.bincount(drawn, minlength=10) - 100).max() < 40  # 4 standard deviations


def test_grey_images_without_a_channel_axis_get_one(tmp_path: Path) -> None:
    file = save(tmp_path / "a.npz", (np.arange(60, dtype=np.uint8).reshape(5, 4, 3), np.arange(5)))
    images, _ = joined(stream([file], seed=0)[1])
    assert images.shape == (5, 4, 3, 1)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint8, np.dtype(">i8")])
def test_labels_of_any_integer_type_become_int64(tmp_path: Path, dtype: np.dtype[np.generic]) -> None:
    images, labels = sample(20)
    file = save(tmp_path / "a.npz", (images, labels.astype(dtype)))
    same(joined(Archives.open([Path(file)]).chunks([np.arange(20)], any_order=False)), (images, labels))


def test_memory_does_not_grow_with_the_archive(tmp_path: Path) -> None:
    images, labels = np.zeros((20_000, 32, 32, 3), np.uint8), np.zeros(20_000, np.int64)
    file = save(tmp_path / "a.npz", (images, labels))
    tracemalloc.start()
    for _ in stream([file], seed=0, stop=200)[1]:
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < images.nbytes / 50


def archive(path: Path, **members: bytes) -> str:
    with zipfile.ZipFile(path, "w") as file:
        for key, content in members.items():
            file.writestr(f"{key}.npy", content)
    return str(path)


def npy(array: NDArray[np.generic]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def header(text: bytes, claimed: int | None = None) -> bytes:
    return b"\x93NUMPY\x02\x00" + (len(text) if claimed is None else claimed).to_bytes(4, "little") + text


IMAGES, LABELS = sample(10)
BAD = {
    "no such key": ({"images": npy(IMAGES), "label": npy(LABELS)}, "wanted an array 'image', got: images, label"),
    "objects": (
        {"image": npy(np.array([{}], object)), "label": npy(LABELS)},
        "'image': wanted numbers, got an array of Python objects, which would have to be unpickled: refused",
    ),
    "floats": (
        {"image": npy(IMAGES / 255), "label": npy(LABELS)},
        "'image': wanted uint8 (n, H, W, C), got float64 (10, 4, 3, 3)",
    ),
    "flat": ({"image": npy(IMAGES.reshape(10, -1)), "label": npy(LABELS)}, "wanted uint8 (n, H, W, C), got uint8 (10, 36)"),
    "one-hot labels": ({"image": npy(IMAGES), "label": npy(np.eye(10))}, "'label': wanted integers (n,), got float64 (10, 10)"),
    "fewer labels": (
        {"image": npy(IMAGES), "label": npy(LABELS[:9])},
        "wanted one label per image, got 10 images and 9 labels",
    ),
    "cut short": (
        {"image": npy(IMAGES)[:-1], "label": npy(LABELS)},
        "'image': wanted 488 bytes for uint8 (10, 4, 3, 3), got 487",
    ),
    "Fortran order": ({"image": npy(np.asfortranarray(IMAGES)), "label": npy(LABELS)}, "got Fortran order"),
    "not an array": ({"image": b"hello world", "label": npy(LABELS)}, "'image': not an .npy array (the magic string is not"),
    "an unbalanced header": (
        {"image": header(b"{'descr': ((("), "label": npy(LABELS)},
        "'image': not an .npy array (",
    ),
    "a deep header": ({"image": header(b"(" * 5000), "label": npy(LABELS)}, "'image': not an .npy array ("),
    "an endless header": ({"image": header(b"", 2**32 - 1), "label": npy(LABELS)}, "'image': not an .npy array (EOF: reading"),
    "axes below 0": (
        {"image": header(b"{'descr': '|u1', 'fortran_order': False, 'shape': (-2, -2, 1)}") + b"1234", "label": npy(LABELS)},
        "wanted no axis below 0, got (-2, -2, 1)",
    ),
    "no height": (
        {"image": npy(IMAGES[:, :0]), "label": npy(LABELS)},
        "wanted sides and channels of 1 or more, got (10, 0, 3, 3)",
    ),
    "no channels": (
        {"image": npy(IMAGES[..., :0]), "label": npy(LABELS)},
        "wanted sides and channels of 1 or more, got (10, 4",
    ),
    "channels first": (
        {"image": npy(IMAGES.transpose(0, 3, 1, 2)[..., :2]), "label": npy(LABELS)},
        "wanted 1 or 3 channels, last, got (10, 3, 4, 2)",
    ),
    "newer version": ({"image": b"\x93NUMPY\x09\x00", "label": npy(LABELS)}, "wanted .npy version 1.0 or 2.0, got (9, 0)"),
}


@pytest.mark.parametrize(("members", "message"), BAD.values(), ids=BAD.keys())
def test_an_archive_of_another_make_is_refused_by_name(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    file = archive(tmp_path / "bad.npz", **members)
    with pytest.raises(InputError) as error:
        stream([file], seed=0)
    assert str(error.value).startswith(file)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file_size": 60_000_000 + 72}, "'label': wanted 6"),
        ({"file_size": 60_000_000 + 72, "compress_size": 60_000_000 + 72}, "'label': wanted 6"),
        ({"compress_size": 2**40, "compress_type": zipfile.ZIP_DEFLATED}, "'label': wanted 1099511"),
        ({"flag_bits": 1}, "is encrypted"),
        ({"compress_type": 99}, "not a readable .npz file (That compression method is not supported"),
    ],
    ids=["rows", "rows and bytes", "packed bytes", "encrypted", "an unknown compression"],
)
def test_a_directory_that_lies_is_refused_before_a_row_is_read(tmp_path: Path, change: dict[str, int], message: str) -> None:
    """As of 60 million rows in an archive of a few hundred bytes."""
    shape = b"{'descr': '|u1', 'fortran_order': False, 'shape': (60000000,"
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("image.npy", npy(IMAGES))
        file.writestr("label.npy", header(shape + b")}"))
        for name, value in change.items():
            setattr(file.filelist[1], name, value)
    tracemalloc.start()
    with pytest.raises(InputError) as error:
        Archives.open([tmp_path / "a.npz"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(error.value).startswith(str(tmp_path / "a.npz"))
    assert message in str(error.value)
    assert peak < 2**21


def test_labels_are_read_in_the_memory_that_they_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npz, "LABEL_ROWS", 2**14)
    labels = (np.arange(400_000) % 200).astype(np.uint8)
    np.savez(tmp_path / "a.npz", image=np.zeros((400_000, 1, 1), np.uint8), label=labels)
    archives = Archives.open([tmp_path / "a.npz"] * 2)
    tracemalloc.start()
    found = npz.read_labels(archives)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(found, np.tile(labels, 2).astype(np.int64), strict=True)
    assert peak < found.nbytes + 2**21


def test_a_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"no archive at all")
    with pytest.raises(InputError, match=r"a\.npz: not a readable \.npz file \(File is not a zip file\)"):
        stream([str(tmp_path / "a.npz")], seed=0)


def test_damaged_compressed_bytes_are_refused(tmp_path: Path) -> None:
    file = Path(save(tmp_path / "a.npz", sample(500), compressed=True))
    content = bytearray(file.read_bytes())
    content[3000:3400] = b"\xff" * 400
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.npz: not a readable \.npz file"):
        list(stream([str(file)], seed=0)[1])


def test_files_of_two_shapes_are_refused(tmp_path: Path) -> None:
    files = [save(tmp_path / "a.npz", sample(10)), save(tmp_path / "b.npz", (IMAGES[:, :2], LABELS))]
    with pytest.raises(InputError, match=r"b\.npz: wanted images \(4, 3, 3\) as in .*a\.npz, got \(2, 3, 3\)"):
        stream(files, seed=0)


def test_more_images_than_there_are_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"wanted 11 images \(num_images\), found 10"):
        stream([save(tmp_path / "a.npz", sample(10))], seed=0, num_images=11)


def test_train_and_test_of_two_shapes_are_refused(tmp_path: Path) -> None:
    train, test = save(tmp_path / "a.npz", sample(10)), save(tmp_path / "b.npz", (IMAGES[:, :2], LABELS))
    with pytest.raises(InputError, match=r"wanted train and test images of one shape, got \(4, 3, 3\) and \(2, 3, 3\)"):
        open_npz(train=(train,), test=(test,), image_key="image", label_key="label", classes=None)


def test_a_label_outside_the_classes_is_named_with_its_file_and_row(tmp_path: Path) -> None:
    train = save(tmp_path / "a.npz", (IMAGES, np.arange(10) % 3))
    test = save(tmp_path / "b.npz", (IMAGES, np.array([0, 1, 2, 3, 0, 0, 0, 0, 0, 0])))
    with pytest.raises(InputError, match=r"b\.npz: row 3: wanted a label in \[0, 3\), got 3"):
        open_npz(train=(train,), test=(test,), image_key="image", label_key="label", classes=("ant", "bee", "cat"))


def test_the_temporary_copy_of_a_compressed_archive_is_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "spool"))
    (tmp_path / "spool").mkdir()
    chunks = stream([save(tmp_path / "a.npz", sample(100), compressed=True)], seed=0)[1]
    next(chunks)
    chunks.close()  # type: ignore[attr-defined]
    assert not list((tmp_path / "spool").iterdir())


def test_a_seeded_source_is_permuted_and_keeps_the_rows_it_came_from(tmp_path: Path) -> None:
    chunk = sample(50)
    train, test = save(tmp_path / "a.npz", chunk), save(tmp_path / "b.npz", sample(9, 1))
    split = NpzParams(kind="npz", train=(train,), test=(test,), seed=4, filtered=True).open().splits["train"]
    order = permuted(np.arange(50), 50, 4)
    same(joined(split()), (chunk[0][order], chunk[1][order]))
    rows = np.array([3, 20, 49])
    same(joined(split(rows)), (chunk[0][order[rows]], chunk[1][order[rows]]))
    assert split.source_rows(rows, Corrupt()).tolist() == order[rows].tolist()


def test_the_source_row_of_a_drawn_image_follows_from_the_origin(tmp_path: Path) -> None:
    chunks = [sample(40, 1), sample(61, 2)]
    files = [Path(save(tmp_path / f"{index}.npz", chunk)) for index, chunk in enumerate(chunks)]
    images, _ = joined(stream([str(file) for file in files], seed=5)[1])
    origin = {"files": Archives.open(files).origin(), "seed": 5}
    np.testing.assert_array_equal(images, joined(chunks)[0][source_rows(origin, 101)])
    np.testing.assert_array_equal(images[:60], joined(chunks)[0][source_rows(origin, 60)])


def test_pairs_of_npy_files_give_their_arrays(tmp_path: Path) -> None:
    for name, (images, labels) in (("a", sample(30)), ("b", sample(12, 1)), ("t", sample(9, 2))):
        np.save(tmp_path / f"{name}-x.npy", images)
        np.save(tmp_path / f"{name}-y.npy", labels)
    both = NpyPair(images=(f"{tmp_path}/[ab]-x.npy",), labels=(f"{tmp_path}/[ab]-y.npy",))
    test = NpyPair(images=(f"{tmp_path}/t-x.npy",), labels=(f"{tmp_path}/t-y.npy",))
    opened = NpyParams(kind="npy", train=both, test=test).open()
    same(joined(opened.splits["train"]()), joined([sample(30), sample(12, 1)]))
    same(joined(opened.splits["test"]()), sample(9, 2))
    digest = opened.origin["files"]["test"][0]["arrays"]["image"]["sha256"]
    assert digest == hashlib.sha256((tmp_path / "t-x.npy").read_bytes()).hexdigest()
    seeded = NpyParams(kind="npy", train=both, test=test, seed=1).open().splits["train"]
    same(joined(seeded()), tuple(part[permuted(np.arange(42), 42, 1)] for part in joined([sample(30), sample(12, 1)])))  # type: ignore[arg-type]


def test_bad_npy_files_are_refused_by_name_and_no_object_is_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", IMAGES)
    np.save(tmp_path / "y.npy", LABELS)
    np.save(tmp_path / "objects.npy", np.array([{}], object))
    (tmp_path / "short.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-1])
    for images, labels, message in [
        ("objects", "y", "objects.npy: wanted numbers, got an array of Python objects"),
        ("short", "y", "short.npy: wanted 488 bytes for uint8 (10, 4, 3, 3), got 487"),
        ("[x]", "[xy]", "x.npy: wanted as many files of labels as of images, got 2 and 1"),
        ("y", "y", "y.npy: 'image': wanted uint8 (n, H, W, C), got int64 (10,)"),
    ]:
        pair = NpyPair(images=(f"{tmp_path}/{images}.npy",), labels=(f"{tmp_path}/{labels}.npy",))
        with pytest.raises(InputError) as error:
            NpyParams(kind="npy", train=pair, test=pair).open()
        assert message in str(error.value)


def test_a_decompression_bomb_is_refused_before_it_is_read(tmp_path: Path) -> None:
    zeros = np.zeros((25_000, 64, 64, 1), np.uint8)  # 102 MB in 100 KB
    file = save(tmp_path / "a.npz", (zeros, np.zeros(25_000, np.int64)), compressed=True)
    with pytest.raises(InputError, match=r"a\.npz: 'image': \d+ bytes would become 102400128: a decompression bomb, refused"):
        stream([file], seed=0)


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    file = Path(save(tmp_path / "a.npz", sample(40)))
    _, chunks = stream([str(file)], seed=0)
    next(chunks)
    os.utime(file, ns=(0, 0))
    with pytest.raises(InputError, match=r"a\.npz: has changed while it was read; wait until it is complete"):
        list(chunks)
