"""Images that exist already, as synthetic ones: what ingest left out, and archives; each row says where it came from."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.artifacts import read_json
from pipeline.images import ImageStore
from pipeline.ingest import ingest_split
from pipeline.params import InputError
from pipeline.sources.left_out import LeftOutParams, left_out
from pipeline.sources.npz import NpzSyntheticParams
from pipeline.verify import verify
from stages.synthesize import read, write_given
from tests.sources.samples import encode, open_params, pixels

IMAGES = pixels(40)


def write_folder(root: Path, corrupt: set[int]) -> dict[str, Any]:
    """Forty images of two classes, some cut short; row and name agree."""
    for row, image in enumerate(IMAGES):
        file = root / "train" / ("ant", "bee")[row // 20] / f"{row:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(image)[: 30 if row in corrupt else None])
    return {"kind": "imagefolder", "root": root, "test": None, "test_fraction": 0.1, "seed": 1}


def ingested(folder: Path, source: dict[str, Any]) -> ImageStore:
    opened = open_params(**source)
    return ingest_split(folder / "train", opened, "train", max_rows=16, seed=0, shard_rows=50, max_corrupt=40)


def stand_in(source: dict[str, Any], **fields: Any) -> LeftOutParams:
    return LeftOutParams.model_validate({"kind": "left_out", "source": source, **fields})


def images_of(store: ImageStore) -> np.ndarray[Any, Any]:
    return store.batch(np.arange(len(store)))


def test_what_was_corrupt_in_ingest_is_left_alone_and_what_is_corrupt_here_is_limited_and_listed(tmp_path: Path) -> None:
    sound = ingested(tmp_path / "sound", write_folder(tmp_path / "images", set()))
    used = np.load(sound.path / "source_rows.npy")
    rows = open_params(**write_folder(tmp_path / "images", set())).splits["train"].order
    assert rows is not None
    there, here = int(used[3]), int(np.setdiff1d(rows, used)[5])  # one that ingest takes, and one that it leaves
    source = write_folder(tmp_path / "images", {there, here})
    train = ingested(tmp_path / "data", source)
    assert [entry["source_row"] for entry in read_json(train.path / "corrupt.json")] == [there]
    with pytest.raises(InputError, match=rf"{here:02d}\.png: not a readable image .* raise max_corrupt \(now 0\)"):
        list(left_out(stand_in(source), train).chunks)
    write_given(tmp_path / "synthetic", read(stand_in(source, max_corrupt=1), train), train, 50)
    store = ImageStore.open(tmp_path / "synthetic")
    assert [entry["source_row"] for entry in read_json(store.path / "corrupt.json")] == [here]
    found = np.load(store.path / "source_rows.npy")
    np.testing.assert_array_equal(images_of(store), IMAGES[found])
    kept = np.load(train.path / "source_rows.npy")
    assert sorted([*found, *kept, there, here]) == sorted(rows)
    assert verify(store.path) == []


def test_a_store_of_an_archive_says_which_row_of_it_each_image_was(tmp_path: Path) -> None:
    train = ingested(tmp_path, write_folder(tmp_path / "images", set()))
    np.savez(tmp_path / "a.npz", image=IMAGES, label=np.arange(40) // 20)
    params = NpzSyntheticParams(kind="npz", files=(str(tmp_path / "a.npz"),), num_images=25, seed=3)
    write_given(tmp_path / "synthetic", read(params, train), train, 10)
    rows = np.load(tmp_path / "synthetic" / "source_rows.npy")
    assert rows.dtype == np.int64
    assert rows.tolist() != sorted(rows)
    np.testing.assert_array_equal(images_of(ImageStore.open(tmp_path / "synthetic")), IMAGES[rows])
    assert verify(tmp_path / "synthetic") == []


def test_damaged_source_rows_of_the_store_are_named(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "images", set())
    train = ingested(tmp_path, source)
    (train.path / "source_rows.npy").write_bytes(b"\x93NUMPY\x02\x00((((")
    with pytest.raises(InputError, match=r"source_rows\.npy: not readable"):
        left_out(stand_in(source), train)
