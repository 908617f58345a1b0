"""The judge stage: stores and a margin model in, quality.json out."""

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline.artifacts import read_json
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


def test_parameters_are_checked() -> None:
    for wrong, message in (
        ({"max_images": 1}, "judge.max_images: Input should be greater than or equal to 2"),
        ({"features": {"kind": "inception"}}, "judge.features.inception.path: missing"),
    ):
        with pytest.raises(InputError) as error:
            JudgeParams.from_dict({"judge": SECTION | wrong})
        assert message in str(error.value)
