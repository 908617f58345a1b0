"""The synthesize stage: a store of synthetic images from every kind of source."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML
from torch import nn

from pipeline.artifacts import digest_file, read_json
from pipeline.batches import to_tensor
from pipeline.image_writing import write_store
from pipeline.images import ImageStore
from pipeline.models import Classifier, build_network
from pipeline.models.checkpoint import load_model, save_model
from pipeline.params import InputError
from stages.generator import main as generate
from stages.ingest import main as ingest
from stages.synthesize import main
from tests.conftest import TINY

CPU = torch.device("cpu")
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


def synthesize(
    source: dict[str, Any],
    generator: dict[str, Any] | None = None,
    shard_rows: int = 6,
    select: dict[str, Any] | None = None,
) -> ImageStore:
    """Run the stage, after that of the generator where there is one."""
    params = {
        "generator": generator or {"kind": "none"},
        "synthesize": {"source": source, "select": select or {"kind": "none"}, "shard_rows": shard_rows},
        "execution": {"device": "cpu"},
    }
    YAML(typ="safe").dump(params, Path("params.yaml"))
    generate(Path("train"), Path("generator"))
    Path("guide").mkdir(exist_ok=True)
    main(Path("train"), Path("generator"), Path("guide"), Path("synthetic"))
    return ImageStore.open(Path("synthetic"))


def everything(store: ImageStore) -> np.ndarray[Any, Any]:
    return store.batch(np.arange(len(store)))


def test_images_are_drawn_in_balanced_classes_into_shards() -> None:
    store = synthesize(EDM, GENERATOR)
    assert (store.classes, store.shape, store.shard_counts) == (("a", "b", "c"), (8, 8, 1), (6, 4))
    assert store.labels.tolist() == [row % 3 for row in range(10)]
    assert everything(store).std() > 10
    origin = read_json(store.path / "store.json")["origin"]
    assert (origin["kind"], origin["select"], origin["flip"]) == ("edm", "none", False)
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
        main(Path("train"), Path("generator"), Path("guide"), Path("synthetic"))


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


def write_files(rows: int = 20) -> dict[str, Any]:
    """A source of npz files with that many training images, of which the stage ingest keeps 8."""
    images = np.random.default_rng(1).integers(0, 256, (rows, 8, 8, 1), np.uint8)
    np.savez(Path("all.npz"), image=images, label=np.arange(rows) % 3)
    np.savez(Path("test.npz"), image=images[:3], label=np.arange(3))
    source = {"kind": "npz", "train": ["all.npz"], "test": ["test.npz"], "seed": 5}
    params = {"ingest": {"source": source, "max_train": 8, "max_test": 3, "seed": 0, "shard_rows": 100}}
    YAML(typ="safe").dump(params, Path("params.yaml"))
    ingest(Path("real"))
    Path("train").rename("unused")
    Path("real/train").rename("train")
    return source


def test_what_ingest_left_out_stands_in_and_no_image_is_in_both() -> None:
    source = write_files()
    store = synthesize({"kind": "left_out", "source": source, "num_images": 6, "seed": 0})
    train = ImageStore.open(Path("train"))
    both = {image.tobytes() for image in everything(store)} & {image.tobytes() for image in everything(train)}
    assert (len(train), len(store), both) == (8, 6, set())
    with np.load("all.npz") as archive:
        label_of = {image.tobytes(): label for image, label in zip(archive["image"], archive["label"], strict=True)}
    assert [label_of[image.tobytes()] for image in everything(store)] == store.labels.tolist()
    assert store.origin["kind"] == "left_out"
    rest = synthesize({"kind": "left_out", "source": source, "num_images": None, "seed": 0})
    assert len(rest) == 12


def test_a_stand_in_from_another_source_or_of_too_many_images_is_refused() -> None:
    source = write_files()
    with pytest.raises(InputError, match="wanted the source that ingest read, got another"):
        synthesize({"kind": "left_out", "source": source | {"seed": 6}})
    with pytest.raises(InputError, match="wanted 13 images, ingest left 12 out"):
        synthesize({"kind": "left_out", "source": source, "num_images": 13})


def with_guide() -> str:
    """A guide for the images of these tests that sees each class in some of them; the digest of its weights."""
    guide = Classifier(build_network(TINY, (8, 8, 1), 3, 3), [0.5], [0.3]).eval()
    (*_, head) = [module for module in guide.modules() if isinstance(module, nn.Linear)]
    x = to_tensor(everything(synthesize(EDM, GENERATOR)), CPU)
    with torch.no_grad():
        head.bias.sub_(guide(x).mean(dim=0))
    description = {**TINY.model_dump(), "shape": [8, 8, 1], "classes": ["a", "b", "c"]}
    save_model(Path("guide/best"), guide, description)
    return digest_file(Path("guide/best/model.safetensors"))


RULES: dict[str, dict[str, Any]] = {
    "class_agreement": {"kind": "class_agreement"},
    "top_confidence": {"kind": "top_confidence", "keep": 0.4, "pilot_images": 30},
    "margin": {"kind": "margin", "norm": "linf", "keep": 0.5, "per_class": True, "pilot_images": 30},
}


@pytest.mark.parametrize("name", RULES)
def test_a_guide_selects_and_the_store_says_what_it_kept_and_cost(name: str) -> None:
    digest = with_guide()
    store = synthesize(EDM, GENERATOR, select=RULES[name])
    assert store.labels.tolist() == [row % 3 for row in range(10)]
    assert store.origin["select"] == name
    found = store.origin["selection"]
    assert found["rule"]["kind"] == name
    assert found["guide"] == digest
    assert found["kept"] == 10
    assert found["acceptance"] == 10 / found["drawn"]
    assert found["network_evaluations"] == 3 * (found["drawn"] + found["drawn_for_pilot"])
    assert store.digest == synthesize(EDM, GENERATOR, select=RULES[name]).digest
    assert found["drawn"] > 10
    images = everything(store)
    fewer = everything(synthesize(EDM | {"num_images": 7}, GENERATOR, shard_rows=5, select=RULES[name]))
    np.testing.assert_array_equal(fewer, images[:7])
    plain = everything(synthesize(EDM, GENERATOR))
    assert 0 < (images == plain).all(axis=(1, 2, 3)).sum() < 10  # accepted at the first attempt
    if name == "class_agreement":
        guide, _ = load_model(Path("guide/best"), CPU)
        seen, unselected = (guide(to_tensor(given, CPU)).argmax(dim=1).numpy() for given in (images, plain))
        assert (seen == store.labels).all()
        assert not (unselected == store.labels).all()


def test_selection_wants_a_guide_and_drawn_images() -> None:
    with pytest.raises(InputError, match=r"wanted a guide to select with, got guide\.kind: none"):
        synthesize(EDM, GENERATOR, select=RULES["margin"])
    with pytest.raises(InputError, match=r"select: wanted none, unless source\.kind is edm"):
        synthesize(NPZ, select=RULES["margin"])
