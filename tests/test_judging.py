"""The figures of quality.json tell a generator that was trained on digits from Gaussians, copies and means of neighbours."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.batches import to_tensor
from pipeline.edm.network import NetworkParams, build_unet
from pipeline.edm.sampling import SamplerParams, sample_images
from pipeline.edm.training import start, train_generator
from pipeline.features import Penultimate
from pipeline.images import Chunk, ImageStore
from pipeline.judging import JudgeSection, judge
from pipeline.losses import cross_entropy
from pipeline.models import Classifier
from tests.conftest import digits, make_store, untrained

COUNT = 360
CPU = torch.device("cpu")
Floats = NDArray[np.float64]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ImageStore]:
    folder = tmp_path_factory.mktemp("real")
    return {
        "train": make_store(folder / "train", digits("train", 1438)),
        "test": make_store(folder / "test", digits("test", 359)),
    }


@pytest.fixture(scope="module")
def classifier(real: dict[str, ImageStore]) -> Classifier:
    """A small network, trained normally for a second."""
    store, model = real["train"], untrained().train()
    x, y = to_tensor(store.batch(np.arange(len(store))), CPU), torch.from_numpy(np.array(store.labels))
    optimizer, generator = torch.optim.Adam(model.parameters(), lr=3e-3), torch.Generator().manual_seed(0)
    for _ in range(150):
        rows = torch.randint(len(x), (128,), generator=generator)
        loss = cross_entropy(model(x[rows]), y[rows]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def generated(real: dict[str, ImageStore]) -> Chunk:
    """Digits of the EDM generator of the embedded default."""
    network = NetworkParams(channels=16, multipliers=(1, 1), blocks=1, attention_resolutions=())
    state = start(build_unet(network, (8, 8, 1), 10, 0), ema_decay=0.995)
    settings = {"batch_size": 64, "lr": 4e-3, "warmup_steps": 20, "p_mean": -0.3, "p_std": 1.2, "flip": False, "seed": 0}
    train_generator(state, real["train"], steps=1500, sigma_data=0.5, **settings)  # type: ignore[arg-type]
    sampler = SamplerParams(num_steps=18, sigma_min=0.01, sigma_max=20.0)
    chunks = sample_images(state.ema.model, 0, COUNT, batch_size=120, seed=0, sigma_data=0.5, sampler=sampler)
    images, labels = zip(*chunks, strict=True)
    return np.concatenate(images), np.concatenate(labels)


def chunk_of(pixels: Floats, labels: NDArray[np.int64]) -> Chunk:
    """Images from pixels (n, 64) in [0, 1]."""
    return np.round(pixels.clip(0, 1) * 255).astype(np.uint8).reshape(-1, 8, 8, 1), labels


def gaussian(store: ImageStore) -> Chunk:
    """Draws of the normal distribution of all training images, with labels in turn."""
    pixels = store.batch(np.arange(len(store))).reshape(len(store), -1) / 255
    rng = np.random.default_rng(0)
    return chunk_of(rng.multivariate_normal(pixels.mean(0), np.cov(pixels.T), COUNT), np.arange(COUNT) % 10)


def noisy_copies(store: ImageStore, std: float) -> Chunk:
    rng = np.random.default_rng(0)
    rows = rng.choice(len(store), COUNT, replace=False)
    pixels = store.batch(rows).reshape(COUNT, -1) / 255
    return chunk_of(pixels + std * rng.standard_normal(pixels.shape), np.asarray(store.labels[rows]))


def interpolations(store: ImageStore) -> Chunk:
    """Means of a training image and its nearest neighbour of the same class, in pixels."""
    rng = np.random.default_rng(0)
    pixels, labels = store.batch(np.arange(len(store))).reshape(len(store), -1) / 255, np.asarray(store.labels)
    rows = rng.choice(len(store), COUNT, replace=False)
    distance = np.linalg.norm(pixels[rows, None] - pixels[None], axis=2)
    distance[labels[rows, None] != labels[None]] = np.inf
    neighbours = distance.argsort(axis=1)[:, 1]  # 0 is the image itself
    return chunk_of((pixels[rows] + pixels[neighbours]) / 2, labels[rows])


def judged(folder: Path, chunk: Chunk, real: dict[str, ImageStore], model: Classifier, **changes: Any) -> dict[str, Any]:
    stores = real | {"synthetic": make_store(folder / "synthetic", chunk)}
    return judge(stores, model, Penultimate(model), JudgeSection(**changes), CPU)


FIGURES = ("density", "coverage", "class_agreement")


def test_a_trained_generator_beats_a_gaussian(
    real: dict[str, ImageStore], classifier: Classifier, generated: Chunk, tmp_path: Path
) -> None:
    ours = judged(tmp_path / "ours", generated, real, classifier)["synthetic"]
    normal = judged(tmp_path / "gaussian", gaussian(real["train"]), real, classifier)["synthetic"]
    assert ours["frechet_distance"] < 0.5 * normal["frechet_distance"]
    for name in FIGURES:
        assert ours[name] > 1.2 * normal[name], name
    assert ours["class_agreement"] > 0.6
    assert ours["copies"] == 0


def test_a_trained_generator_beats_copies_of_training_images_and_means_of_neighbours(
    real: dict[str, ImageStore], classifier: Classifier, generated: Chunk, tmp_path: Path
) -> None:
    """Copies with so much noise that they no longer count as copies, and in Fréchet distance means of two neighbours too. These
    are denser than test images are, which a generator should not be; what tells them, as well as copies with little noise, is
    how near to the training images they are."""
    both = judged(tmp_path / "ours", generated, real, classifier)
    ours, test = both["synthetic"], both["test"]
    hidden = judged(tmp_path / "hidden", noisy_copies(real["train"], 0.15), real, classifier)["synthetic"]
    assert hidden["copies"] < 0.01
    assert ours["frechet_distance"] < 0.5 * hidden["frechet_distance"]
    assert ours["density"] > hidden["density"]
    assert ours["coverage"] > hidden["coverage"]
    assert ours["class_agreement"] > 0.95 * hidden["class_agreement"]
    near = judged(tmp_path / "near", noisy_copies(real["train"], 0.02), real, classifier)["synthetic"]
    means = judged(tmp_path / "means", interpolations(real["train"]), real, classifier)["synthetic"]
    assert ours["frechet_distance"] < means["frechet_distance"]
    assert means["density"] > 1.2 * test["density"]
    assert all(baseline["nearest_distance"] < 0.75 * test["nearest_distance"] for baseline in (near, means))
    assert (near["copies"], means["copies"], test["copies"]) == (1, 0, 0)
    assert ours["copies"] == 0
    assert ours["nearest_distance"] > 0.75 * test["nearest_distance"]


def test_as_many_test_images_are_judged_beside_and_are_no_copies(
    real: dict[str, ImageStore], classifier: Classifier, generated: Chunk, tmp_path: Path
) -> None:
    found = judged(tmp_path, generated, real, classifier, closest=4)
    assert found["num_reference"] == 1438
    assert found["synthetic"]["num_images"] == found["test"]["num_images"] == 359
    assert all(found["test"][name] > 0.95 * found["synthetic"][name] for name in FIGURES)
    assert found["test"]["copies"] == 0
    store = ImageStore.open(tmp_path / "synthetic")
    shares = found["class_agreement_by_class"]
    assert list(shares) == list(store.classes)
    assert np.mean(list(shares.values())) == pytest.approx(found["synthetic"]["class_agreement"], abs=0.01)
    ratios = [pair["ratio"] for pair in found["closest"]]
    assert len(ratios) == 4
    assert ratios == sorted(ratios)
    pair = found["closest"][0]
    difference = store.batch(np.array([pair["row"]])) / 255 - real["train"].batch(np.array([pair["train_row"]])) / 255
    assert np.linalg.norm(difference) == pytest.approx(pair["distance"])


def test_the_number_of_images_is_bounded_and_the_draw_repeats(
    real: dict[str, ImageStore], classifier: Classifier, generated: Chunk, tmp_path: Path
) -> None:
    one = judged(tmp_path / "one", generated, real, classifier, max_images=50)
    assert (one["num_reference"], one["synthetic"]["num_images"]) == (50, 50)
    assert one == judged(tmp_path / "two", generated, real, classifier, max_images=50)
    assert one != judged(tmp_path / "three", generated, real, classifier, max_images=50, seed=1)


def test_without_synthetic_images_there_is_nothing_to_judge(
    real: dict[str, ImageStore], classifier: Classifier, generated: Chunk, tmp_path: Path
) -> None:
    nothing = {"num_images": 0}
    found = judged(tmp_path, (generated[0][:0], generated[1][:0]), real, classifier)
    assert found == {"num_reference": 1438, "synthetic": nothing, "test": nothing}
