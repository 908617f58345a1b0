"""The guide stage: a classifier trained on real images alone, imported, or none."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from pipeline.artifacts import read_json
from pipeline.images import ImageStore
from pipeline.models.checkpoint import load_model
from stages.guide import main
from tests.conftest import TINY, digits, make_store

TRAINING = {
    "loss": "standard", "epochs": 1, "batch_size": 32, "synthetic_fraction": 0.5, "lr": 0.1, "beta": 0.0,
    "augmentation": {"crop_padding": 0, "flip": False}, "attack": {"num_steps": 1, "step_size_255": 8}, "label_smoothing": 0.0,
    "holdout": 10, "select_every": 1, "selection_attack": {"num_steps": 1, "step_size_255": 8},
}  # fmt: skip
TRAIN: dict[str, Any] = {"kind": "train", "seed": 0, "model": TINY.model_dump(), "training": TRAINING}


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_store(Path("train"), digits("train", 80))


def guide(section: dict[str, Any], target: str = "guide") -> Path:
    params = {"guide": section, "threat": {"norm": "linf", "eps_255": 24}, "execution": {"device": "cpu"}}
    YAML(typ="safe").dump(params, Path("params.yaml"))
    main(Path("train"), Path(target))
    return Path(target)


def test_a_guide_is_trained_on_the_real_images_alone() -> None:
    path = guide(TRAIN)
    _, description = load_model(path / "best", torch.device("cpu"))
    assert description["inputs"] == {"real": ImageStore.open(Path("train")).digest}
    assert read_json(path / "guide.json") == {"kind": "train"}


def test_a_guide_can_be_imported_or_left_out() -> None:
    trained = guide(TRAIN)
    imported = guide({"kind": "import", "path": str(trained / "best")}, "imported")
    assert (imported / "best/model.safetensors").read_bytes() == (trained / "best/model.safetensors").read_bytes()
    assert [path.name for path in guide({"kind": "none"}, "none").iterdir()] == ["guide.json"]
