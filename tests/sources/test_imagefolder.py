"""Folders become classes; a folder of another layout is named."""

import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.images import Images
from pipeline.params import InputError
from tests.sources.samples import encode, joined, open_params, pixels

SHARED = Path(__file__).parents[3] / "shared" / "data"
TINY_IMAGENET = SHARED / "tiny-imagenet" / "tiny-imagenet-20.tar"
needs_tiny_imagenet = pytest.mark.skipif(not TINY_IMAGENET.is_file(), reason=f"Tiny-ImageNet is not at {TINY_IMAGENET}")


def write_folder(root: Path, split: str, classes: dict[str, Images]) -> None:
    for name, images in classes.items():
        (root / split / name / "images").mkdir(parents=True)
        for index, image in enumerate(images):
            (root / split / name / "images" / f"{index:03d}.png").write_bytes(encode(image))


@needs_tiny_imagenet
def test_tiny_imagenet_folders_become_classes(tmp_path: Path) -> None:
    wanted = {"n01443537", "n01629819", "n01641577"}
    with tarfile.open(TINY_IMAGENET) as archive:
        members = [member for member in archive if len(parts := Path(member.name).parts) > 3 and parts[2] in wanted]
        archive.extractall(tmp_path, members, filter="data")
    root = tmp_path / "tiny-imagenet-20"
    source = open_params(kind="imagefolder", root=root, test="val")
    assert (source.classes, source.shape) == (tuple(sorted(wanted)), (64, 64, 3))
    assert np.bincount(source.splits["train"].labels).tolist() == [500] * 3
    images, labels = joined(source.splits["test"]())
    assert np.bincount(labels).tolist() == [50] * 3
    first = min((root / "val" / "n01629819").iterdir())
    np.testing.assert_array_equal(images[50], np.asarray(Image.open(first).convert("RGB")))


def test_without_a_test_folder_a_fraction_of_train_is_held_out(tmp_path: Path) -> None:
    images = pixels(30)
    write_folder(tmp_path, "train", {"ant": images[:20], "bee": images[20:]})
    source = open_params(kind="imagefolder", root=tmp_path, test=None, test_fraction=0.2, seed=3)
    train, test = joined(source.splits["train"]()), joined(source.splits["test"]())
    assert [np.bincount(labels).tolist() for _, labels in (train, test)] == [[16, 8], [4, 2]]
    both = np.concatenate([train[0], test[0]]).reshape(30, -1)
    assert sorted(both.tolist()) == sorted(images.reshape(30, -1).tolist())


def test_chosen_rows_of_a_folder_are_the_same_rows_of_all(tmp_path: Path) -> None:
    write_folder(tmp_path, "train", {"ant": pixels(20), "bee": pixels(10, seed=1)})
    split = open_params(kind="imagefolder", root=tmp_path, test=None).splits["train"]
    rows = np.array([1, 7, 22])
    (images, labels), (all_images, all_labels) = joined(split(rows)), joined(split())
    np.testing.assert_array_equal(images, all_images[rows])
    np.testing.assert_array_equal(labels, all_labels[rows])


def test_a_size_makes_one_shape_of_images_of_all_sizes(tmp_path: Path) -> None:
    write_folder(tmp_path, "train", {"ant": pixels(2, 9, 7), "bee": pixels(2, 20, 31)})
    source = open_params(kind="imagefolder", root=tmp_path, test=None, test_fraction=0.5, size=8, channels=1)
    assert source.shape == (8, 8, 1)
    assert joined(source.splits["train"]())[0].shape == (2, 8, 8, 1)


def damage_nothing(_: Path) -> None: ...


def remove_train(root: Path) -> None:
    (root / "train").rename(root / "training")


def remove_images(root: Path) -> None:
    for path in (root / "train" / "bee" / "images").iterdir():
        path.rename(path.with_suffix(".txt"))


def flatten(root: Path) -> None:
    (root / "train").rename(root / "old")
    (root / "train").mkdir()
    (root / "train" / "0.png").write_bytes(encode(pixels(1)[0]))


def add_test_class(root: Path) -> None:
    write_folder(root, "test", {"ant": pixels(1), "cow": pixels(1)})


def empty_test(root: Path) -> None:
    (root / "test" / "ant").mkdir(parents=True)


def add_size(root: Path) -> None:
    (root / "train" / "ant" / "z.png").write_bytes(encode(pixels(1, 3, 3)[0]))


@pytest.mark.parametrize(
    ("damage", "test", "message"),
    [
        (
            damage_nothing,
            "test",
            "test: wanted a folder with one folder of images per class, found none; `test: null` holds out",
        ),
        (remove_train, None, "train: wanted a folder with one folder of images per class, found none"),
        (remove_images, None, "train: wanted images in the folder of every class, found none in bee"),
        (flatten, None, "train: wanted one folder of images per class, got a folder without folders"),
        (add_test_class, "test", "test: wanted the classes of train, got also cow"),
        (empty_test, "test", "found none"),
        (add_size, None, "z.png: wanted 6 x 5 pixels as the first image, got 3 x 3; set `size`"),
    ],
)
def test_a_bad_folder_is_named(tmp_path: Path, damage: Callable[[Path], None], test: str | None, message: str) -> None:
    write_folder(tmp_path, "train", {"ant": pixels(4), "bee": pixels(4)})
    damage(tmp_path)
    with pytest.raises(InputError) as error:
        list(open_params(kind="imagefolder", root=tmp_path, test=test, test_fraction=0.1).splits["train"]())
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)
