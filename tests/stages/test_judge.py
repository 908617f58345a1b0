"""The judge stage: stores and a margin model in, quality.json out."""

import json
from pathlib import Path

import numpy as np
import pytest
from ruamel.yaml import YAML

from pipeline.artifacts import digest_file, read_json, write_json
from pipeline.image_writing import write_store
from pipeline.images import ImageStore
from pipeline.models.checkpoint import save_model
from pipeline.params import InputError
from stages.judge import JudgeParams, main
from tests.conftest import TINY, digits, make_store, untrained

SECTION = {"features": {"kind": "margin_model"}, "max_images": 40, "neighbours": 3, "closest": 2, "batch_size": 16, "seed": 0}


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory with stores and a model."""
    monkeypatch.chdir(tmp_path)
    images, labels = digits("train", 150)
    for name, rows in (("real/train", slice(0, 80)), ("real/test", slice(80, 110)), ("synthetic", slice(110, 150))):
        make_store(Path(name), (images[rows], labels[rows]))
    description = {**TINY.model_dump(), "shape": [8, 8, 1], "classes": list("0123456789")}
    save_model(Path("margin_model/best"), untrained(), description)


def judge(target: str) -> bytes:
    YAML(typ="safe").dump({"judge": SECTION, "execution": {"device": "cpu"}}, Path("params.yaml"))
    main(Path("real"), Path("synthetic"), Path("margin_model"), Path(target))
    return (Path(target) / "quality.json").read_bytes()


def test_the_stage_writes_the_figures_and_what_they_were_measured_with() -> None:
    assert judge("a") == judge("b")
    found = read_json(Path("a/quality.json"))
    assert found["features"]["model"] == "margin_model"
    assert len(found["features"]["digest"]) == 64
    assert (found["num_reference"], found["dimension"]) == (40, 8)
    assert found["synthetic"]["num_images"] == found["test"]["num_images"] == len(ImageStore.open(Path("real/test")))
    assert len(found["closest"]) == 2
    assert [path.name for path in Path("a").iterdir()] == ["quality.json"]


def test_the_figures_say_what_the_model_that_sees_the_labels_was_trained_on() -> None:
    assert json.loads(judge("unknown"))["judged_by"]["trained_on"] is None
    path = Path("margin_model/best/model.json")
    write_json(path, read_json(path) | {"inputs": {"synthetic": "1", "real": "0"}})
    found = json.loads(judge("known"))["judged_by"]
    assert found == {"digest": digest_file(Path("margin_model/best/model.safetensors")), "trained_on": ["real", "synthetic"]}


def test_copies_are_looked_for_in_the_mirror_unless_the_generator_was_trained_without_one() -> None:
    images, labels = digits("train", 40)
    flipped = np.ascontiguousarray(images[:, :, ::-1])
    classes, copies = tuple("0123456789"), []
    for origin in ({}, {"flip": True}, {"flip": False}):
        write_store(Path("synthetic"), [(flipped, labels)], classes=classes, shape=(8, 8, 1), shard_rows=40, origin=origin)
        found = json.loads(judge("mirrored"))
        copies.append((found["mirrored"], found["synthetic"]["copies"]))
    assert copies == [(True, 1), (True, 1), (False, 0)]


def test_parameters_are_checked() -> None:
    for wrong, message in (
        ({"max_images": 1}, "judge.max_images: Input should be greater than or equal to 2"),
        ({"features": {"kind": "inception"}}, "judge.features.inception.path: missing"),
    ):
        with pytest.raises(InputError) as error:
            JudgeParams.from_dict({"judge": SECTION | wrong})
        assert message in str(error.value)
