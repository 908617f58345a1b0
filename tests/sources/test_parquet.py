"""Parquet files give the images and labels in them, or are refused by file and row."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.images import Images
from pipeline.params import InputError
from pipeline.sources import decode, parquet
from tests.conftest import ROOT
from tests.sources.samples import encode, joined, open_params, pixels

SHARED = Path(__file__).parents[3] / "shared" / "data"
CIFAR10 = SHARED / "cifar10"
needs_cifar10 = pytest.mark.skipif(not CIFAR10.is_dir(), reason=f"CIFAR-10 is not in {CIFAR10}")


def write_parquet(path: Path, images: list[Any], labels: Any, image_type: pa.DataType | None = None, **options: Any) -> str:
    table = pa.table({"img": pa.array(images, image_type), "label": labels})
    pq.write_table(table, path, **options)
    return str(path)


def as_structs(images: Images) -> list[dict[str, Any]]:
    return [{"bytes": encode(image), "path": f"{index}.png"} for index, image in enumerate(images)]


@needs_cifar10
def test_cifar10_decodes_to_the_pixels_that_pil_gives() -> None:
    source = open_params(kind="parquet", train=(f"{CIFAR10}/train-*.parquet",), test=(f"{CIFAR10}/test-*.parquet",))
    assert source.classes == ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    assert source.shape == (32, 32, 3)
    assert np.bincount(source.splits["train"].labels).tolist() == [5000] * 10
    table = pq.read_table(CIFAR10 / "test-00000-of-00001.parquet")
    assert source.splits["test"].labels.tolist() == table["label"].to_pylist()
    rows = np.array([0, 1, 255, 256, 4999, 5000, 9999])
    images, labels = joined(source.splits["test"](rows))
    for image, row in zip(images, rows, strict=True):
        data = table["img"][int(row)]["bytes"].as_py()
        np.testing.assert_array_equal(image, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert labels.tolist() == table["label"].to_numpy()[rows].tolist()


@needs_cifar10
def test_a_stream_of_cifar10_and_its_chosen_rows_agree() -> None:
    source = open_params(kind="parquet", train=(f"{CIFAR10}/train-*.parquet",), test=(f"{CIFAR10}/test-*.parquet",))
    rows = np.array([3, 4, 255, 256, 599])
    np.testing.assert_array_equal(
        joined(source.splits["test"](rows))[0], joined(source.splits["test"](np.arange(600)))[0][rows]
    )


def test_rows_are_counted_over_files_and_row_groups(tmp_path: Path) -> None:
    images = pixels(50)
    files = [
        write_parquet(tmp_path / "a-0.parquet", as_structs(images[:20]), np.arange(20) % 7, row_group_size=6),
        write_parquet(tmp_path / "a-1.parquet", as_structs(images[20:]), np.arange(20, 50) % 7, row_group_size=11),
    ]
    test = write_parquet(tmp_path / "test.parquet", as_structs(images[:3]), [0, 1, 2])
    source = open_params(kind="parquet", train=(f"{tmp_path}/a-*.parquet",), test=(test,))
    np.testing.assert_array_equal(joined(source.splits["train"]())[0], images)
    rows = np.array([0, 5, 6, 19, 20, 33, 49])
    got = joined(source.splits["train"](rows))
    np.testing.assert_array_equal(got[0], images[rows])
    np.testing.assert_array_equal(got[1], rows % 7)
    assert [entry["file"] for entry in source.origin["files"]["train"]] == files


@pytest.mark.parametrize(
    ("column", "image_type"),
    [("img.bytes", None), ("img", None), ("img", pa.binary()), ("img", pa.large_binary())],
    ids=["path", "struct", "binary", "large binary"],
)
def test_the_image_column_may_be_a_struct_a_path_or_plain_bytes(
    tmp_path: Path, column: str, image_type: pa.DataType | None
) -> None:
    images = pixels(4)
    values = as_structs(images) if image_type is None else [encode(image) for image in images]
    files = [write_parquet(tmp_path / name, values, [0, 1, 0, 1], image_type) for name in ("train.parquet", "test.parquet")]
    source = open_params(kind="parquet", train=(files[0],), test=(files[1],), image_column=column)
    np.testing.assert_array_equal(joined(source.splits["train"]())[0], images)
    assert source.classes == ("0", "1")


def test_several_processes_give_the_same_images_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pixels(90)
    file = write_parquet(tmp_path / "train.parquet", as_structs(images), np.zeros(90, np.int64), row_group_size=7)
    test = write_parquet(tmp_path / "test.parquet", as_structs(images[:1]), [0])
    monkeypatch.setattr(decode, "ROWS_PER_PROCESS", 10)
    monkeypatch.setattr(decode, "num_cores", lambda: 2)
    source = open_params(kind="parquet", train=(file,), test=(test,))
    np.testing.assert_array_equal(joined(source.splits["train"]())[0], images)


def test_an_error_in_another_process_arrives_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = as_structs(pixels(90))
    values[77]["bytes"] = b"no image"
    file = write_parquet(tmp_path / "train.parquet", values, np.zeros(90, np.int64), row_group_size=7)
    test = write_parquet(tmp_path / "test.parquet", values[:1], [0])
    monkeypatch.setattr(decode, "ROWS_PER_PROCESS", 10)
    monkeypatch.setattr(decode, "num_cores", lambda: 2)
    source = open_params(kind="parquet", train=(file,), test=(test,))
    with pytest.raises(InputError, match=r"train\.parquet: row 77: not a readable image"):
        list(source.splits["train"]())


GOOD = as_structs(pixels(3))
OTHER_SIZE = as_structs(pixels(3, height=4))
BAD_PARQUET: dict[str, tuple[list[Any], Any, dict[str, Any], str]] = {
    "no image column": (GOOD, [0, 1, 0], {"image_column": "image"}, "wanted the column 'image', but there is no"),
    "no field": (GOOD, [0, 1, 0], {"image_column": "img.data"}, "there is no 'data' among: bytes, path"),
    "no label column": (GOOD, [0, 1, 0], {"label_column": "fine"}, "wanted the column 'fine'"),
    "images as text": (["a", "b", "c"], [0, 1, 0], {"image_column": "img"}, "wanted encoded images (binary) in the column"),
    "labels as text": (GOOD, ["a", "b", "a"], {}, "wanted integers in the label column 'label', got string"),
    "null label": (GOOD, [0, None, 0], {}, "row 1: wanted a label in 'label', got null"),
    "null image": ([GOOD[0], None, GOOD[2]], [0, 1, 0], {}, "row 1: wanted an encoded image, got null"),
    "negative label": (GOOD, [0, -1, 0], {}, "row 1: wanted a label in [0, 1), got -1"),
    "label out of range": (GOOD, [0, 1, 2], {"classes": ("ant", "bee")}, "row 2: wanted a label in [0, 2), got 2"),
    "too many classes": (GOOD, [0, 1, 40_000], {}, "wanted at most 32767 classes, got the label 40000"),
    "damaged": ([*GOOD[:2], {"bytes": GOOD[2]["bytes"][:-40], "path": ""}], [0, 1, 0], {}, "row 2: not a readable image"),
    "not an image": ([*GOOD[:2], {"bytes": b"abc", "path": ""}], [0, 1, 0], {}, "row 2: not a readable image (of no known"),
    "mixed sizes": ([*GOOD[:2], OTHER_SIZE[2]], [0, 1, 0], {}, "row 2: wanted 6 x 5 pixels as the first image, got 4 x 5"),
    "16 bits": (
        [*GOOD[:2], {"bytes": encode(np.zeros((6, 5), np.uint16)), "path": ""}], [0, 1, 0], {},
        "row 2: wanted 8 bits per channel, got an image of mode I;16",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("images", "labels", "params", "message"), BAD_PARQUET.values(), ids=BAD_PARQUET.keys())
def test_bad_parquet_is_refused_by_file_and_row(
    tmp_path: Path, images: list[Any], labels: Any, params: dict[str, Any], message: str
) -> None:
    train = write_parquet(tmp_path / "train.parquet", images, labels)
    test = write_parquet(tmp_path / "test.parquet", GOOD, [0, 0, 0])
    with pytest.raises(InputError) as error:
        list(open_params(kind="parquet", train=(train,), test=(test,), **params).splits["train"]())
    assert message in str(error.value)
    assert "classes" in message or str(error.value).startswith(train)


def test_a_split_without_rows_is_refused(tmp_path: Path) -> None:
    train = write_parquet(tmp_path / "train.parquet", GOOD, [0, 1, 0])
    test = write_parquet(tmp_path / "test.parquet", [], pa.array([], pa.int64()), pa.struct({"bytes": pa.binary()}))
    with pytest.raises(InputError, match="parquet: wanted at least one test image, got none"):
        open_params(kind="parquet", train=(train,), test=(test,))
    with pytest.raises(InputError, match="wanted at least one train image, got none"):
        open_params(kind="parquet", train=(test,), test=(train,))


@pytest.mark.parametrize("kind", ["parquet", "npz"])
def test_a_pattern_that_matches_nothing_is_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(InputError, match=r"x-\*: wanted a file, or a glob that matches one, found none"):
        open_params(kind=kind, train=(f"{tmp_path}/x-*",), test=(f"{tmp_path}/y-*",))


def test_a_file_cannot_be_in_train_and_in_test(tmp_path: Path) -> None:
    train = write_parquet(tmp_path / "train.parquet", GOOD, [0, 1, 0])
    with pytest.raises(InputError, match=r"train\.parquet: is in train and in test"):
        open_params(kind="parquet", train=(train,), test=(f"{tmp_path}/*.parquet",))


def test_a_file_that_is_not_parquet_is_refused(tmp_path: Path) -> None:
    for name in ("train.parquet", "test.parquet"):
        (tmp_path / name).write_bytes(b"PAR1 or not")
    with pytest.raises(InputError, match=r"train\.parquet: not a readable Parquet file"):
        open_params(kind="parquet", train=(f"{tmp_path}/train.parquet",), test=(f"{tmp_path}/test.parquet",))


def test_a_decompression_bomb_is_refused_before_it_is_read(tmp_path: Path) -> None:
    bomb = write_parquet(tmp_path / "a.parquet", [bytes(2**26 + 1)], [0], pa.binary(), compression="zstd", use_dictionary=False)
    test = write_parquet(tmp_path / "b.parquet", GOOD, [0, 0, 0])
    with pytest.raises(InputError, match=r"a\.parquet: 'img': \d+ bytes would become \d+: a decompression bomb, refused"):
        open_params(kind="parquet", image_column="img", train=(bomb,), test=(test,))


@pytest.mark.parametrize(
    "options",
    [{}, {"use_dictionary": False}]
    + [{"use_dictionary": False, "column_encoding": {"img": f"DELTA_{kind}BYTE_ARRAY"}} for kind in ("LENGTH_", "")],
    ids=["dictionary", "plain", "delta length", "delta"],
)
def test_images_are_read_in_every_encoding_and_few_at_a_time_where_they_are_large(
    tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One value of 200 KB in every row: as many rows at a time as BATCH_BYTES holds, whatever the file makes of it."""
    monkeypatch.setattr(parquet, "BATCH_BYTES", 2**20)
    values = [bytes([row]) + bytes(200_000) for row in (1, 2)] * 40
    file = write_parquet(tmp_path / "a.parquet", values, [0] * 80, pa.binary(), compression="zstd", **options)
    rows = np.setdiff1d(np.arange(80), [7, 8, 79])
    batches = list(parquet.encoded([Path(file)], "img", rows))
    assert max(map(len, batches)) == (1 if "column_encoding" in options and "LENGTH" not in str(options) else 5)
    found = [image for batch in batches for image in batch]
    assert found == [(f"{file}: row {row}", values[row]) for row in rows]


def test_an_image_that_many_rows_share_takes_little_memory(tmp_path: Path) -> None:
    value = np.random.default_rng(0).integers(0, 256, 3_000_000, np.uint8).tobytes()
    shared = pa.DictionaryArray.from_arrays(pa.array([0] * 256, pa.int32()), pa.array([value], pa.binary()))
    file = write_parquet(tmp_path / "a.parquet", shared, [0] * 256, store_schema=False)
    program = (
        "import resource, sys; from pathlib import Path; import numpy as np; from pipeline.sources.parquet import encoded\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "before = peak(); rows = sum(len(batch) for batch in encoded([Path(sys.argv[1])], 'img', np.arange(256)))\n"
        "print(rows, peak() - before)"
    )
    run = subprocess.run([sys.executable, "-c", program, file], cwd=ROOT, check=True, capture_output=True, text=True)
    rows, megabytes = map(int, run.stdout.split())
    assert rows == 256
    assert megabytes < 200  # 768 MB in all


def test_more_rows_than_the_file_can_hold_images_are_refused(tmp_path: Path) -> None:
    shared = pa.DictionaryArray.from_arrays(pa.array(np.zeros(2_000_000, np.int8)), pa.array([b"x"], pa.binary()))
    file = write_parquet(tmp_path / "a.parquet", shared, np.zeros(2_000_000, np.int64), store_schema=False)
    with pytest.raises(InputError, match=r"a\.parquet: 2000000 images: \d+ bytes would become 128000000: a decompression bomb"):
        parquet.read_labels(Path(file), "label")


def test_labels_are_read_in_pieces_over_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "LABEL_ROWS", 7)
    labels = list(range(5)) * 10
    file = write_parquet(tmp_path / "a.parquet", [b"x"] * 50, labels, row_group_size=20)
    assert parquet.read_labels(Path(file), "label").tolist() == labels
    late = write_parquet(tmp_path / "b.parquet", [b"x"] * 50, [*labels[:40], None, *labels[:9]], row_group_size=20)
    with pytest.raises(InputError, match="row 40: wanted a label in 'label', got null"):
        parquet.read_labels(Path(late), "label")


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    files = [Path(write_parquet(tmp_path / f"{name}.parquet", GOOD, [0, 1, 0])) for name in "ab"]
    stream = open_params(kind="parquet", train=(str(files[0]),), test=(str(files[1]),)).splits["train"]()
    next(stream)
    write_parquet(files[0], GOOD[::-1], [0, 1, 0])
    with pytest.raises(InputError, match=r"a\.parquet: has changed while it was read"):
        list(stream)
