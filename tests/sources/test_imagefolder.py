"""Folders become classes; a folder of another layout is named."""

import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.images import Images
from pipeline.params import InputError
from pipeline.sources.corrupt import Corrupt
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
        for member in archive:
            path = tmp_path / member.name
            if member.isfile() and len(parts := Path(member.name).parts) > 3 and parts[2] in wanted:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.extractfile(member).read())  # type: ignore[union-attr]
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


def pack(file: Path, folder: Path) -> None:
    with tarfile.open(file, "w") as archive:
        archive.add(folder, arcname=".")


def test_a_tar_of_a_folder_and_a_tar_per_class_give_what_the_folder_gives(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_folder(root, "train", {"ant": pixels(5), "bee": pixels(4, seed=1)})
    write_folder(root, "test", {"ant": pixels(2, seed=2)})
    pack(tmp_path / "all.tar", root)
    for folder in ("train/ant", "train/bee", "test/ant"):
        (tmp_path / "tars" / folder).parent.mkdir(parents=True, exist_ok=True)
        pack(tmp_path / "tars" / f"{folder}.tar", root / folder)
    wanted = open_params(kind="imagefolder", root=root)
    for other in ("all.tar", "tars"):
        source = open_params(kind="imagefolder", root=tmp_path / other)
        assert (source.classes, source.shape) == (wanted.classes, wanted.shape)
        for name, split in source.splits.items():
            for got, known in zip(joined(split()), joined(wanted.splits[name]()), strict=True):
                np.testing.assert_array_equal(got, known)
        assert len(source.origin["tars"]) == (1 if other == "all.tar" else 3)
        assert source.origin["images"] == {"train": None, "test": None}


@needs_tiny_imagenet
def test_a_mapping_file_and_a_class_list_choose_among_the_classes_of_tiny_imagenet_in_its_tar(tmp_path: Path) -> None:
    inside = {"train": "tiny-imagenet-20/train", "test": "tiny-imagenet-20/val", "size": 32}
    (tmp_path / "map.tsv").write_text("# a comment\nn01443537\tfish\nn01629819\tamphibian\nn01641577\tamphibian\nn99\tother\n")
    mapped = open_params(kind="imagefolder", root=TINY_IMAGENET, classes={"by": "file", "file": tmp_path / "map.tsv"}, **inside)
    assert (mapped.classes, mapped.shape) == (("amphibian", "fish"), (32, 32, 3))
    assert np.bincount(mapped.splits["train"].labels).tolist() == [1000, 500]
    assert np.bincount(mapped.splits["test"].labels).tolist() == [100, 50]
    assert mapped.origin["folders_left_out"] == 17
    (tmp_path / "list.txt").write_text("n01641577\n\n")
    listed = open_params(
        kind="imagefolder",
        root=TINY_IMAGENET,
        classes={"by": "list", "names": ["n01443537"], "file": tmp_path / "list.txt"},
        **inside,
    )
    assert listed.classes == ("n01443537", "n01641577")
    rows = np.array([0, 499])
    np.testing.assert_array_equal(
        joined(listed.splits["test"](np.arange(50)))[0], joined(mapped.splits["test"](np.arange(100, 150)))[0]
    )
    assert joined(listed.splits["train"](rows))[1].tolist() == [0, 0]


def test_a_tar_that_has_its_folders_elsewhere_says_what_it_has(tmp_path: Path) -> None:
    write_folder(tmp_path / "root", "train", {"ant": pixels(2)})
    pack(tmp_path / "all.tar", tmp_path / "root")
    with pytest.raises(InputError, match=r"all\.tar: training: wanted one folder of images per class there, .* has train"):
        open_params(kind="imagefolder", root=tmp_path / "all.tar", train="training")


def test_a_corrupt_image_that_decides_the_shape_is_passed_over(tmp_path: Path) -> None:
    write_folder(tmp_path, "train", {"ant": pixels(4), "bee": pixels(4)})
    (tmp_path / "train" / "ant" / "images" / "000.png").write_bytes(b"damaged")
    source = open_params(kind="imagefolder", root=tmp_path, test=None, test_fraction=0.25)
    assert source.shape == (6, 5, 3)
    corrupt = Corrupt(limit=1)
    counts = [len(joined(split(None, corrupt))[0]) for split in source.splits.values()]
    assert sum(counts) == 7
    assert corrupt.rows == [0]


def test_a_tar_that_changes_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    write_folder(tmp_path / "root", "train", {"ant": pixels(4), "bee": pixels(4)})
    pack(tmp_path / "all.tar", tmp_path / "root")
    source = open_params(kind="imagefolder", root=tmp_path / "all.tar", test=None, test_fraction=0.25)
    stream = source.splits["train"]()
    next(stream)
    with (tmp_path / "all.tar").open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(InputError, match=r"all\.tar: has changed while it was read"):
        list(stream)


def test_a_loose_image_that_changes_while_the_folder_is_read_is_an_error_however_many_may_be_corrupt(tmp_path: Path) -> None:
    write_folder(tmp_path, "train", {"ant": pixels(4), "bee": pixels(4)})
    split = open_params(kind="imagefolder", root=tmp_path, test=None, test_fraction=0.25).splits["train"]
    (tmp_path / "train" / "bee" / "images" / "003.png").write_bytes(b"half writ")
    with pytest.raises(InputError, match=r"bee/images/003\.png: has changed while it was read"):
        list(split(np.arange(len(split.labels)), Corrupt(limit=8)))


def test_the_origin_of_a_folder_is_the_digest_of_its_names_and_sizes_wherever_and_whenever(tmp_path: Path) -> None:
    roots = [tmp_path / "a", tmp_path / "elsewhere" / "b"]
    for root in roots:
        write_folder(root, "train", {"ant": pixels(3), "bee": pixels(2, seed=1)})
        write_folder(root, "test", {"ant": pixels(2, seed=2)})
    for path in roots[1].rglob("*"):
        os.utime(path, (0, 0))

    def images(root: Path) -> dict[str, str]:
        found: dict[str, str] = open_params(kind="imagefolder", root=root).origin["images"]
        return found

    whole = images(roots[0])
    assert whole == images(roots[1])
    assert whole["train"] != whole["test"]
    last = roots[1] / "train" / "bee" / "images" / "001.png"
    last.write_bytes(last.read_bytes() + b"x")
    assert images(roots[1]) == whole | {"train": images(roots[1])["train"]} != whole
    last.unlink()
    other = images(roots[1])["train"]
    last.with_name("002.png").write_bytes(encode(pixels(2, seed=1)[1]))
    renamed = images(roots[1])["train"]
    assert len({whole["train"], other, renamed}) == 3


def test_names_that_are_not_in_utf8_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, "train", {"ant": pixels(2)})
    (tmp_path / "train" / "ant" / os.fsdecode(b"\xff.png")).write_bytes(encode(pixels(1)[0]))
    with pytest.raises(InputError, match="train/ant: wanted names of images in UTF-8"):
        open_params(kind="imagefolder", root=tmp_path, test=None)


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


def test_one_folder_for_both_splits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is in train and in test"):
        open_params(kind="imagefolder", root=tmp_path, train="all", test="all")
