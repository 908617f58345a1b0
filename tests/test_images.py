"""An image store gives back what was written, row by row, and is complete or absent."""

import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.artifacts import digest_file
from pipeline.image_writing import write_store
from pipeline.images import Chunk, Images, ImageStore, Labels
from pipeline.params import InputError

SHAPE = (2, 3, 3)
CLASSES = ("ant", "bee", "cat")


def sample(count: int, seed: int = 0) -> Chunk:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, *SHAPE), np.uint8), rng.integers(0, len(CLASSES), count)


def write(target: Path, chunks: list[Chunk] | Iterator[Chunk], shard_rows: int = 4) -> ImageStore:
    return write_store(target, chunks, classes=CLASSES, shape=SHAPE, shard_rows=shard_rows, origin={"kind": "test"})


def cut(images: Images, labels: Labels, sizes: list[int]) -> list[Chunk]:
    at = np.cumsum(sizes)
    return list(zip(np.split(images, at), np.split(labels, at), strict=True))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), count=st.integers(1, 30), shard_rows=st.integers(1, 35))
def test_a_batch_equals_indexing_into_all_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: st.DataObject, count: int, shard_rows: int
) -> None:
    images, labels = sample(count)
    sizes = data.draw(st.lists(st.integers(0, 9), max_size=5))
    store = write(tmp_path / "store", cut(images, labels, sizes), shard_rows)
    rows = np.array(data.draw(st.lists(st.integers(0, count - 1), max_size=20)), np.int64)
    for limit in (2**30, 0):  # from maps, and from the files
        monkeypatch.setattr("pipeline.images.LARGEST_MAPPED", limit)
        np.testing.assert_array_equal(store.batch(rows), images[rows])
    np.testing.assert_array_equal(store.labels, labels)
    assert store.shard_counts == tuple(min(shard_rows, count - first) for first in range(0, count, shard_rows))


def test_the_size_of_the_chunks_written_does_not_change_a_byte(tmp_path: Path) -> None:
    images, labels = sample(11)
    for name, sizes in (("a", []), ("b", [1, 6]), ("c", [0, 4, 4])):
        write(tmp_path / name, cut(images, labels, sizes))
    first, *others = ({path.name: digest_file(path) for path in sorted((tmp_path / name).iterdir())} for name in "abc")
    assert set(first) == {"images-00000.npy", "images-00001.npy", "images-00002.npy", "labels.npy", "store.json"}
    assert others == [first, first]


def test_chunks_of_a_range_give_its_rows_images_and_labels(tmp_path: Path) -> None:
    images, labels = sample(11)
    chunks = list(write(tmp_path / "store", [(images, labels)]).chunks(3, start=2, stop=10))
    assert [rows.tolist() for rows, _, _ in chunks] == [[2, 3, 4], [5, 6, 7], [8, 9]]
    np.testing.assert_array_equal(np.concatenate([part for _, part, _ in chunks]), images[2:10])
    np.testing.assert_array_equal(np.concatenate([part for _, _, part in chunks]), labels[2:10])


@pytest.mark.parametrize("num_classes", [1, 255, 256, 257, 40_000])
def test_labels_of_any_number_of_classes_are_kept(tmp_path: Path, num_classes: int) -> None:
    labels = np.array([0, num_classes // 2, num_classes - 1])
    chunks = [(np.zeros((3, *SHAPE), np.uint8), labels), (np.zeros((3, *SHAPE), np.uint8), labels[::-1])]
    classes = tuple(map(str, range(num_classes)))
    store = write_store(tmp_path / "store", chunks, classes=classes, shape=SHAPE, shard_rows=4, origin={})
    np.testing.assert_array_equal(store.labels, [*labels, *labels[::-1]])
    assert store.labels.dtype == np.int64


def test_a_batch_is_a_copy_that_can_be_written(tmp_path: Path) -> None:
    images, labels = sample(5)
    store = write(tmp_path / "store", [(images, labels)])
    batch = store.batch(np.arange(5))
    batch[:] = 0
    np.testing.assert_array_equal(store.batch(np.arange(5)), images)


def resident_mb() -> float:
    """What maps of files hold of the memory of this process."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile")]
    return int(line.split()[1]) / 2**10


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux alone says what is resident")
def test_reading_all_of_a_large_store_in_random_order_brings_none_of_it_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.images.LARGEST_MAPPED", 2**20)
    count, shape = 20_000, (32, 32, 3)
    labels = np.random.default_rng(1).integers(0, 3, count)
    images = np.broadcast_to(labels.astype(np.uint8)[:, None, None, None], (count, *shape))
    store = write_store(tmp_path / "store", [(images, labels)], classes=CLASSES, shape=shape, shard_rows=3000, origin={})
    before, most = resident_mb(), 0.0
    for rows in np.random.default_rng(0).permutation(count).reshape(-1, 100):
        np.testing.assert_array_equal(store.batch(rows)[:, 5, 5, 1], store.compact_labels[rows])
        most = max(most, resident_mb() - before)
    assert most < 5  # of 59 MB
    assert store.compact_labels.nbytes == count
    np.testing.assert_array_equal(store.compact_labels, labels)


def test_the_files_of_a_large_store_are_closed_with_it_and_a_cut_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.images.LARGEST_MAPPED", 0)
    store = write(tmp_path / "store", [sample(9)])
    store.batch(np.arange(9))

    def open_files() -> list[Path]:
        return [path for path in Path("/proc/self/fd").iterdir() if str(path.resolve()).startswith(str(tmp_path))]

    assert len(open_files()) == 4  # three shards, and the map of the labels
    path = tmp_path / "store" / "images-00001.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"images-00001\.npy: ends within an image; rebuild the store"):
        store.batch(np.array([0, 7]))
    del store
    gc.collect()
    assert not open_files()


def test_opening_a_store_reads_no_image(tmp_path: Path) -> None:
    write(tmp_path / "store", [sample(9)])
    (tmp_path / "store" / "images-00001.npy").unlink()
    store = ImageStore.open(tmp_path / "store")
    assert (len(store), store.classes, store.shape) == (9, CLASSES, SHAPE)
    store.batch(np.array([0, 8]))
    with pytest.raises(InputError, match=r"images-00001\.npy: not readable .*; rebuild the store"):
        store.batch(np.array([4]))


def test_the_digest_of_a_store_changes_with_any_pixel_or_label(tmp_path: Path) -> None:
    images, labels = sample(9)
    other_images, other_labels = images.copy(), labels.copy()
    other_images[8, 0, 0, 0] ^= 1
    other_labels[0] = (other_labels[0] + 1) % 3
    chunks = [(images, labels), (other_images, labels), (images, other_labels)]
    assert len({write(tmp_path / str(index), [chunk]).digest for index, chunk in enumerate(chunks)}) == 3


def test_a_store_without_images_can_be_opened(tmp_path: Path) -> None:
    store = write(tmp_path / "store", [])
    assert len(store) == 0
    assert store.batch(np.empty(0, np.int64)).shape == (0, *SHAPE)


@pytest.mark.parametrize("row", [-1, 9])
def test_a_row_outside_the_store_is_an_error(tmp_path: Path, row: int) -> None:
    with pytest.raises(IndexError, match=r"rows must be in \[0, 9\)"):
        write(tmp_path / "store", [sample(9)]).batch(np.array([0, row]))


IMAGES, LABELS = sample(9)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES.astype(np.float32), LABELS, "wanted uint8 of shape (2, 3, 3) (H, W, C), got float32 (2, 3, 3)"),
        (IMAGES[:, :, :2], LABELS, "wanted uint8 of shape (2, 3, 3) (H, W, C), got uint8 (2, 2, 3)"),
        (IMAGES, LABELS[:8], "wanted one label per image, got 9 images and 8 labels"),
        (IMAGES, LABELS + 1, "wanted integers in [0, 3), got [1, 3]"),
        (IMAGES, LABELS - 1, "wanted integers in [0, 3), got [-1, 1]"),
        (IMAGES, LABELS.astype(np.float64), "wanted integers, got float64"),
    ],
)
def test_a_wrong_chunk_is_refused_and_the_old_store_stays(tmp_path: Path, images: Images, labels: Labels, message: str) -> None:
    old = write(tmp_path / "store", [(IMAGES, LABELS)]).digest
    with pytest.raises(InputError) as error:
        write(tmp_path / "store", [(IMAGES, LABELS), (images, labels)])
    assert message in str(error.value)
    assert ImageStore.open(tmp_path / "store").digest == old
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_write_that_fails_half_way_leaves_nothing_behind(tmp_path: Path) -> None:
    def failing() -> Iterator[Chunk]:
        yield sample(9)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "store", failing())
    assert not list(tmp_path.iterdir())


def damage(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    elif how == "cut short":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        np.save(path, np.zeros((2, 2), np.int16))


@pytest.mark.parametrize("limit", [2**30, 0])
@pytest.mark.parametrize("how", ["missing", "cut short", "of another shape"])
@pytest.mark.parametrize("name", ["labels.npy", "images-00000.npy"])
def test_a_damaged_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, how: str, limit: int) -> None:
    monkeypatch.setattr("pipeline.images.LARGEST_MAPPED", limit)
    write(tmp_path / "store", [(IMAGES, LABELS)])
    damage(tmp_path / "store" / name, how)
    with pytest.raises(InputError, match=f"{name}: .*; rebuild the store"):
        ImageStore.open(tmp_path / "store").batch(np.array([0]))


def test_a_folder_that_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"store\.json: wanted an artifact of an earlier stage, found none"):
        ImageStore.open(tmp_path)


@pytest.mark.parametrize("count", [3, 4, 9])
def test_the_shards_are_byte_for_byte_what_numpy_saves(tmp_path: Path, count: int) -> None:
    images, labels = sample(count)
    write(tmp_path / "store", [(images[:2], labels[:2]), (images[2:], labels[2:])])
    for index, first in enumerate(range(0, count, 4)):
        np.save(tmp_path / "wanted.npy", images[first : first + 4])
        assert (tmp_path / "store" / f"images-{index:05d}.npy").read_bytes() == (tmp_path / "wanted.npy").read_bytes()


def test_a_header_of_another_make_is_refused_in_one_line(tmp_path: Path) -> None:
    write(tmp_path / "store", [sample(9)])
    (tmp_path / "store" / "store.json").write_text('{"classes": "ant", "shape": [2, 3]}')
    with pytest.raises(InputError, match=r"store\.json: not the header of an image store \(classes: .*; shape\.2: missing"):
        ImageStore.open(tmp_path / "store")
