"""Folders become classes by a list, a mapping or a tree."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from pipeline.params import InputError
from pipeline.sources.classes import ClassParams, classes_of
from pipeline.sources.source import Source, array_split

# As in WordNet: more than one parent, paths of different lengths, folders at inner nodes.
TREE = """
animal dog
animal cat
animal bird
thing toy
dog poodle
dog hound
hound beagle
toy poodle
cat siamese
"""
FOLDERS = ["animal", "beagle", "bird", "cat", "hound", "poodle", "siamese", "toy"]


def classes(folders: list[str] = FOLDERS, **params: Any) -> tuple[tuple[str, ...], dict[str, str]]:
    """The classes, and the class of each folder that has one."""
    adapter: TypeAdapter[ClassParams] = TypeAdapter(ClassParams)
    names, label = classes_of(folders, adapter.validate_python(params))
    return names, {folder: names[index] for folder, index in label.items()}


def tree(tmp_path: Path, **superclasses: str) -> dict[str, Any]:
    (tmp_path / "is_a.txt").write_text(TREE)
    return {"by": "tree", "file": tmp_path / "is_a.txt", "superclasses": superclasses}


def test_every_folder_below_a_superclass_belongs_to_it_and_the_others_are_left_out(tmp_path: Path) -> None:
    names, found = classes(**tree(tmp_path, dog="dogs", cat="cats"))
    assert names == ("dogs", "cats")  # in the order given
    assert found == {"beagle": "dogs", "hound": "dogs", "poodle": "dogs", "cat": "cats", "siamese": "cats"}


def test_the_nearest_superclass_wins_and_in_a_tie_the_first_named(tmp_path: Path) -> None:
    nested = classes(**tree(tmp_path, animal="animals", hound="hounds"))[1]
    assert (nested["beagle"], nested["hound"], nested["siamese"]) == ("hounds", "hounds", "animals")
    assert classes(**tree(tmp_path, dog="dogs", toy="toys"))[1]["poodle"] == "dogs"
    assert classes(**tree(tmp_path, toy="toys", dog="dogs"))[1]["poodle"] == "toys"


def test_two_superclasses_may_share_a_class(tmp_path: Path) -> None:
    names, found = classes(**tree(tmp_path, dog="pets", cat="pets", bird="birds"))
    assert names == ("pets", "birds")
    assert found["siamese"] == found["poodle"] == "pets"


def test_a_tree_with_a_circle_ends(tmp_path: Path) -> None:
    (tmp_path / "is_a.txt").write_text("a b\nb a\n")
    with pytest.raises(InputError, match="none of 1 folders has a class, such as a"):
        classes(["a"], by="tree", file=tmp_path / "is_a.txt", superclasses={"c": "c"})


@pytest.mark.parametrize("separator", ["\t", ",", " "])
def test_a_mapping_file_joins_folders_and_leaves_out_what_it_does_not_name(tmp_path: Path, separator: str) -> None:
    lines = [("n02", "big cat"), ("n01", "fish"), ("n03", "big cat"), ("n09", "unseen")]
    (tmp_path / "map").write_text("# wnid to class\n" + "".join(f"{a}{separator}{b}\n" for a, b in lines))
    names, found = classes(["n01", "n02", "n03", "n04"], by="file", file=tmp_path / "map")
    assert names == ("big cat", "fish")
    assert found == {"n01": "fish", "n02": "big cat", "n03": "big cat"}


def test_a_list_keeps_its_order() -> None:
    assert classes(by="list", names=["toy", "bird"])[0] == ("toy", "bird")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"by": "list", "names": ["bird", "fish"]}, "wanted folders for 2 classes, found none for fish"),
        ({"by": "list"}, "none of 8 folders has a class, such as animal, beagle, bird"),
        ({"by": "file", "file": "nowhere"}, "nowhere: wanted a text file of classes, not readable"),
        ({"by": "file", "file": "one-column"}, "one-column: line 2: wanted 2 names, got 'beagle'"),
        ({"by": "tree", "file": "binary", "superclasses": {"a": "a"}}, "binary: wanted a text file of classes, not readable"),
    ],
)
def test_a_choice_that_cannot_be_made_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, params: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("one-column").write_text("bird birds\nbeagle\n")
    Path("binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError) as error:
        classes(**params)
    assert message in str(error.value)


def test_more_named_classes_than_a_margin_table_can_tell_apart_are_refused() -> None:
    split = array_split(np.zeros((2, 8, 8, 1), np.uint8), np.array([0, 40_000]))
    with pytest.raises(InputError, match="wanted at most 32767 classes, got 40001"):
        Source(tuple(map(str, range(40_001))), (8, 8, 1), {"kind": "imagefolder"}, {"train": split, "test": split})
