"""torchvision's data sets, without the network."""

import hashlib
import os
import pickle
from hashlib import md5
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest

from pipeline.images import Images
from pipeline.params import InputError
from pipeline.sources import torchvision_sets
from tests.sources.samples import joined, open_params, pixels


def test_missing_torchvision_files_are_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cifar10: was not found in .* \(Dataset not found.*set `download: true`"):
        open_params(kind="cifar10", root=tmp_path, download=False)


def test_a_download_that_fails_is_refused_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(
        InputError, match=r"svhn: could not be downloaded to .*no network.*put torchvision's files there by hand"
    ):
        open_params(kind="svhn", root=tmp_path, download=True)


def write_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> Images:
    """A CIFAR-10 of six images, the last two for the test, as torchvision keeps it below root."""
    from torchvision.datasets import CIFAR10 as TORCHVISION_CIFAR10

    folder = root / TORCHVISION_CIFAR10.base_folder
    folder.mkdir(parents=True)
    images = pixels(6, 32, 32)

    def save(name: str, content: dict[str, Any]) -> tuple[str, str]:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return name, md5(data).hexdigest()

    flat = images.transpose(0, 3, 1, 2).reshape(6, -1)
    train = save("data_batch_1", {"data": flat[:4], "labels": [1, 0, 1, 0]})
    test = save("test_batch", {"data": flat[4:], "labels": [1, 0]})
    name, checksum = save("batches.meta", {"label_names": ["ant", "bee"]})
    monkeypatch.setattr(TORCHVISION_CIFAR10, "train_list", [train])
    monkeypatch.setattr(TORCHVISION_CIFAR10, "test_list", [test])
    monkeypatch.setattr(TORCHVISION_CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": checksum})
    return images


def test_torchvision_cifar10_gives_the_images_in_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = write_cifar10(tmp_path, monkeypatch)
    source = open_params(kind="cifar10", root=tmp_path)
    assert (source.classes, source.shape) == (("ant", "bee"), (32, 32, 3))
    np.testing.assert_array_equal(joined(source.splits["train"]())[0], images[:4])
    got = joined(source.splits["test"](np.array([1])))
    np.testing.assert_array_equal(got[0], images[5:])
    assert got[1].tolist() == [0]


def test_the_origin_of_a_torchvision_set_is_the_digest_of_its_arrays_wherever_and_whenever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = write_cifar10(tmp_path / "a", monkeypatch)
    write_cifar10(tmp_path / "b", monkeypatch)
    for path in (tmp_path / "b").rglob("*"):
        os.utime(path, (0, 0))
    origins = [open_params(kind="cifar10", root=tmp_path / name).origin for name in "ab"]
    assert origins[0] | {"root": ""} == origins[1] | {"root": ""}
    wanted = hashlib.sha256(images[4:].tobytes() + np.array([1, 0], np.int64).tobytes()).hexdigest()
    assert origins[0]["arrays"]["test"] == wanted != origins[0]["arrays"]["train"]


def test_a_torchvision_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10(tmp_path, monkeypatch)
    load = torchvision_sets.load

    def load_and_change(*arguments: Any) -> Any:
        found = load(*arguments)
        os.utime(next(tmp_path.rglob("data_batch_1")), (0, 0))
        return found

    monkeypatch.setattr(torchvision_sets, "load", load_and_change)
    with pytest.raises(InputError, match="data_batch_1: has changed while it was read"):
        open_params(kind="cifar10", root=tmp_path)
