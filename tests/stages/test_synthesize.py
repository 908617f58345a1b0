"""The synthesize stage: a store of synthetic images from every kind of source."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ruamel.yaml import YAML

from pipeline.artifacts import digest_file, read_json
from pipeline.images import ImageStore, write_store
from pipeline.params import InputError
from stages.generator import main as generate
from stages.synthesize import main

NETWORK = {"channels": 8, "multipliers": [1], "blocks": 1, "attention_resolutions": []}
TRAINING = {"steps": 2, "batch_size": 4, "warmup_steps": 0, "ema_decay": 0.0, "flip": False, "seed": 0}
GENERATOR = {"kind": "edm", "network": NETWORK, "training": TRAINING}
EDM: dict[str, Any] = {"kind": "edm", "num_images": 10, "batch_size": 4, "seed": 0, "sampler": {"num_steps": 2}}
NPZ: dict[str, Any] = {"kind": "npz", "files": ["synthetic.npz"], "seed": 3}


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory with real images of three classes."""
    monkeypatch.chdir(tmp_path)
    write_train()


def write_train(classes: tuple[str, ...] = ("a", "b", "c")) -> None:
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 1), np.uint8)
    write_store(
        Path("train"), [(images, np.arange(9) % len(classes))], classes=classes, shape=(8, 8, 1), shard_rows=9, origin={}
    )


def synthesize(source: dict[str, Any], generator: dict[str, Any] | None = None, shard_rows: int = 6) -> ImageStore:
    """Run the stage, after that of the generator where there is one."""
    params = {
        "generator": generator or {"kind": "none"},
        "synthesize": {"source": source, "shard_rows": shard_rows},
        "execution": {"device": "cpu"},
    }
    YAML(typ="safe").dump(params, Path("params.yaml"))
    generate(Path("train"), Path("generator"))
    main(Path("train"), Path("generator"), Path("synthetic"))
    return ImageStore.open(Path("synthetic"))


def everything(store: ImageStore) -> np.ndarray[Any, Any]:
    return store.batch(np.arange(len(store)))


def test_images_are_drawn_in_balanced_classes_into_shards() -> None:
    store = synthesize(EDM, GENERATOR)
    assert (store.classes, store.shape, store.shard_counts) == (("a", "b", "c"), (8, 8, 1), (6, 4))
    assert store.labels.tolist() == [row % 3 for row in range(10)]
    assert everything(store).std() > 10
    origin = read_json(store.path / "store.json")["origin"]
    assert origin["kind"] == "edm"
    assert origin["generator"] == digest_file(Path("generator/generator.safetensors"))
    assert (origin["num_steps"], origin["rho"], origin["batch_size"]) == (2, 7, 4)


def test_images_do_not_depend_on_their_number_or_on_the_shards() -> None:
    first = everything(synthesize(EDM, GENERATOR))
    assert (everything(synthesize(EDM | {"num_images": 7}, GENERATOR, shard_rows=5)) == first[:7]).all()


def test_the_same_parameters_give_the_same_bytes() -> None:
    assert synthesize(EDM, GENERATOR).digest == synthesize(EDM, GENERATOR).digest
    assert synthesize(EDM | {"seed": 1}, GENERATOR).digest != synthesize(EDM, GENERATOR).digest


def test_images_cannot_be_drawn_without_a_generator() -> None:
    with pytest.raises(InputError, match=r"set generator.kind: edm, or synthesize.source.kind to npz or none"):
        synthesize(EDM)


def test_images_cannot_be_drawn_from_a_generator_of_other_classes() -> None:
    synthesize(EDM, GENERATOR)
    write_train(("x", "y"))
    with pytest.raises(InputError, match=r"of \('x', 'y'\), got one of"):
        main(Path("train"), Path("generator"), Path("synthetic"))


def test_no_images_are_an_empty_store_of_the_same_classes_and_shape() -> None:
    store = synthesize({"kind": "none"})
    assert (len(store), store.classes, store.shape) == (0, ("a", "b", "c"), (8, 8, 1))
    assert everything(store).shape == (0, 8, 8, 1)


def test_images_of_files_come_in_a_seeded_order_with_their_labels() -> None:
    images = np.arange(30, dtype=np.uint8).reshape(30, 1, 1, 1).repeat(8, 1).repeat(8, 2)
    np.savez("synthetic.npz", image=images, label=np.arange(30) // 10)
    store = synthesize(NPZ)
    rows = everything(store)[:, 0, 0, 0]
    assert sorted(rows) == list(range(30))
    assert list(rows) != sorted(rows)
    np.testing.assert_array_equal(store.labels, rows // 10)
    assert len(set(store.labels[:10].tolist())) > 1
    np.testing.assert_array_equal(everything(synthesize(NPZ | {"num_images": 12}))[:, 0, 0, 0], rows[:12])
    origin = read_json(store.path / "store.json")["origin"]
    assert (origin["kind"], origin["seed"], origin["files"][0]["file"]) == ("npz", 3, "synthetic.npz")


@pytest.mark.parametrize(
    ("shape", "label", "message"),
    [((16, 16, 3), 0, r"wanted uint8 of shape \(8, 8, 1\)"), ((8, 8, 1), 3, r"wanted integers in \[0, 3\)")],
)
def test_files_of_other_images_are_refused_and_leave_nothing(shape: tuple[int, ...], label: int, message: str) -> None:
    np.savez("synthetic.npz", image=np.zeros((4, *shape), np.uint8), label=np.full(4, label))
    with pytest.raises(InputError, match=message):
        synthesize(NPZ)
    assert not Path("synthetic").exists()
