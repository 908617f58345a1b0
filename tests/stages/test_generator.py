"""The generator stage: params.yaml and real images in, a generator that can be loaded out."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file

from pipeline.artifacts import digest_file, read_json, write_json
from pipeline.edm import load_generator
from pipeline.image_writing import write_store
from pipeline.images import ImageStore
from pipeline.params import InputError
from stages.generator import GeneratorParams, main

NETWORK = {"channels": 8, "multipliers": [1], "blocks": 1, "attention_resolutions": [], "dropout": 0.1}
TRAINING = {"steps": 3, "batch_size": 4, "warmup_steps": 0, "ema_decay": 0.9, "flip": False, "seed": 0}
EDM: dict[str, Any] = {"kind": "edm", "network": NETWORK, "training": TRAINING}
CPU = torch.device("cpu")
FITTING: dict[str, Any] = {"classes": ("a", "b"), "shape": (8, 8, 1)}


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def generate(section: dict[str, Any], path: str = "data/generator") -> Path:
    """Run the stage on a small store."""
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 1), np.uint8)
    write_store(Path("train"), [(images, np.arange(10) % 2)], **FITTING, shard_rows=10, origin={})
    YAML(typ="safe").dump({"generator": section, "execution": {"device": "cpu"}}, Path("params.yaml"))
    main(Path("train"), Path(path))
    return Path(path)


def test_the_generator_that_is_written_can_be_loaded() -> None:
    path = generate(EDM | {"sigma_data": 0.7})
    generator = load_generator(path, CPU, **FITTING)
    assert generator.sigma_data == 0.7
    assert generator.digest == digest_file(path / "generator.safetensors")
    for name, tensor in load_file(path / "generator.safetensors").items():
        assert torch.equal(generator.net.state_dict()[name], tensor)
    description = read_json(path / "generator.json")
    assert description["origin"] == {"train": ImageStore.open(Path("train")).digest, "flip": False}
    assert description["network"] == NETWORK | {"label_dropout": 0.0, "adaptive_scale": True}
    rows = list(csv.reader((path / "training.csv").read_text().splitlines()))
    assert rows[0] == ["step", "loss"]
    assert [row[0] for row in rows[1:]] == ["1", "2", "3"]


def test_the_same_parameters_give_the_same_bytes() -> None:
    one, two = generate(EDM, "one"), generate(EDM, "two")
    for name in ("generator.json", "generator.safetensors", "training.csv"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_no_generator_says_so_and_cannot_be_drawn_from() -> None:
    path = generate({"kind": "none"})
    assert [file.name for file in path.iterdir()] == ["generator.json"]
    with pytest.raises(InputError, match=r"got kind none; in params.yaml set generator.kind: edm, or synthesize.source.kind"):
        load_generator(path, CPU, **FITTING)


def test_a_failed_training_leaves_nothing() -> None:
    with pytest.raises(InputError, match=r"lower generator\.training\.lr"):
        generate(EDM | {"training": TRAINING | {"lr": 1e30}})
    assert not Path("data").exists()


def test_a_generator_for_other_images_is_refused() -> None:
    path = generate(EDM)
    with pytest.raises(InputError, match=r"wanted a generator of \(8, 8, 1\) images of \('a', 'c'\), got"):
        load_generator(path, CPU, classes=("a", "c"), shape=(8, 8, 1))


def test_damaged_generators_are_refused() -> None:
    path = generate(EDM)
    description, weights = read_json(path / "generator.json"), load_file(path / "generator.safetensors")
    save_file({name: tensor for name, tensor in weights.items() if "map_layer0" not in name}, path / "generator.safetensors")
    with pytest.raises(InputError, match=r"(?s)wanted weights that fit .*map_layer0.*rerun the generator stage"):
        load_generator(path, CPU, **FITTING)
    (path / "generator.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(InputError, match="wanted weights that fit"):
        load_generator(path, CPU, **FITTING)
    write_json(path / "generator.json", description | {"network": NETWORK | {"channels": 6}})
    with pytest.raises(InputError, match=r"generator.json: network: channels: .* got 6"):
        load_generator(path, CPU, **FITTING)
    write_json(path / "generator.json", {"kind": "edm"})
    with pytest.raises(InputError, match=r"wanted weights that fit generator\.json, but: 'classes'"):
        load_generator(path, CPU, **FITTING)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"kind": "gan"}, "generator: Input tag 'gan' found using 'kind' does not match"),
        (EDM | {"network": NETWORK | {"channels": 6}}, "generator.edm.network.channels: Input should be a multiple of 4"),
        (EDM | {"training": TRAINING | {"ema_decay": 1.0}}, "generator.edm.training.ema_decay: Input should be less than 1"),
        ({"kind": "none", "network": NETWORK}, "generator.none.network: no such parameter"),
    ],
)
def test_parameters_are_checked(section: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        GeneratorParams.from_dict({"generator": section})
    assert message in str(error.value)
