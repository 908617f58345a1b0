"""WebDataset shards give each sample's image and label, in the order of the shards."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.params import InputError
from tests.sources.samples import encode, joined, open_params, pixels, write_tar

IMAGES = pixels(12)


def shard(path: Path, first: int, stop: int) -> str:
    members: dict[str, bytes] = {}
    for row in range(first, stop):
        members[f"x/{row:04d}.cls"] = str(row % 3).encode()
        members[f"x/{row:04d}.png"] = encode(IMAGES[row])
        members[f"x/{row:04d}.json"] = json.dumps({"label": row % 2, "name": "bee" if row % 2 else "ant"}).encode()
    return str(write_tar(path, members))


@pytest.fixture
def shards(tmp_path: Path) -> tuple[str, ...]:
    shard(tmp_path / "train-0.tar", 0, 5)
    shard(tmp_path / "train-1.tar", 5, 12)
    return (f"{tmp_path}/train-*.tar",)


def test_samples_of_all_shards_come_in_their_order(tmp_path: Path, shards: tuple[str, ...]) -> None:
    source = open_params(kind="webdataset", train=shards, test=(shard(tmp_path / "test.tar", 2, 4),))
    images, labels = joined(source.splits["train"]())
    np.testing.assert_array_equal(images, IMAGES)
    assert labels.tolist() == [row % 3 for row in range(12)]
    rows = np.array([1, 4, 5, 11])
    np.testing.assert_array_equal(joined(source.splits["train"](rows))[0], IMAGES[rows])
    np.testing.assert_array_equal(joined(source.splits["test"]())[0], IMAGES[2:4])
    assert list(source.origin["files"]["train"]) == [f"{tmp_path}/train-{i}.tar" for i in (0, 1)]


@pytest.mark.parametrize(
    ("params", "classes"),
    [({"label_field": "label"}, ("0", "1")), ({"label_field": "name", "classes": ("ant", "bee")}, ("ant", "bee"))],
)
def test_labels_may_be_numbers_or_names_in_json(
    shards: tuple[str, ...], params: dict[str, Any], classes: tuple[str, ...]
) -> None:
    source = open_params(kind="webdataset", train=shards, test=None, test_fraction=0.5, label_key="json", **params)
    assert source.classes == classes
    for split in source.splits.values():
        assert split.order is not None
        assert split.labels.tolist() == (split.order % 2).tolist()
        np.testing.assert_array_equal(joined(split())[0], IMAGES[split.order])


PNG = encode(IMAGES[0])
BAD: dict[str, tuple[dict[str, bytes], dict[str, Any], str]] = {
    "no label": ({"a.png": PNG}, {}, "sample 'a': wanted a label in .cls, got png; set label_key"),
    "no image": ({"a.cls": b"0"}, {}, "sample 'a': wanted one image, got files that end in cls; set image_key"),
    "two images": ({"a.png": PNG, "a.jpg": PNG, "a.cls": b"0"}, {}, "wanted one image, got files that end in png, jpg, cls"),
    "a sample that is torn apart": ({"a.png": PNG, "b.png": PNG, "a.cls": b"0"}, {}, "sample 'a': wanted a label"),
    "one ending twice": ({"a.cls": b"0", "./a.cls": b"1", "a.png": PNG}, {}, "sample 'a': two files end in .cls"),
    "text as label": ({"a.png": PNG, "a.cls": b"ant"}, {}, ".cls: wanted an integer or one of the classes, got 'ant'"),
    "bytes as label": ({"a.png": PNG, "a.cls": b"\xff\xfe"}, {}, ".cls: wanted an integer or one of the classes, got 'None'"),
    "a label below 0": ({"a.png": PNG, "a.cls": b"-1"}, {"classes": ("x",)}, "row 0: wanted a label in [0, 1), got -1"),
    "no JSON": ({"a.png": PNG, "a.json": b"["}, {"label_key": "json", "label_field": "y"}, "wanted a JSON object with 'y'"),
    "deep JSON": (
        {"a.png": PNG, "a.json": b"[" * 100_000}, {"label_key": "json", "label_field": "y"}, "wanted a JSON object with 'y'",
    ),
    "an endless label": ({"a.png": PNG, "a.cls": b"0" * 2_000_000}, {}, "wanted a label of at most 1048576 bytes"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "params", "message"), BAD.values(), ids=BAD.keys())
def test_a_shard_of_another_layout_is_refused_by_sample(
    tmp_path: Path, content: dict[str, bytes], params: dict[str, Any], message: str
) -> None:
    file = write_tar(tmp_path / "a.tar", content)
    with pytest.raises(InputError) as error:
        open_params(kind="webdataset", train=(str(file),), test=None, **params)
    assert str(error.value).startswith(str(file))
    assert message in str(error.value)


def test_a_shard_that_changes_while_it_is_read_is_an_error(tmp_path: Path, shards: tuple[str, ...]) -> None:
    source = open_params(kind="webdataset", train=shards, test=(shard(tmp_path / "test.tar", 0, 3),))
    for split in source.splits.values():
        assert len(joined(split())[0])
    stream = source.splits["train"]()
    next(stream)
    os.utime(tmp_path / "train-1.tar", ns=(0, 0))
    with pytest.raises(InputError, match=r"train-1\.tar: has changed while it was read"):
        list(stream)


def test_the_origin_of_shards_is_their_digests_whenever(tmp_path: Path, shards: tuple[str, ...]) -> None:
    before = open_params(kind="webdataset", train=shards, test=None).origin
    os.utime(tmp_path / "train-1.tar", ns=(0, 0))
    assert open_params(kind="webdataset", train=shards, test=None).origin == before
    content = (tmp_path / "train-1.tar").read_bytes()
    assert before["files"]["train"][f"{tmp_path}/train-1.tar"] == hashlib.sha256(content).hexdigest()
