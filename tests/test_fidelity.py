"""Distances between sets of images against SciPy, brute force and hand-worked cases."""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from pipeline import fidelity
from pipeline.fidelity import density_and_coverage, frechet_distance, nearest_images
from pipeline.image_writing import write_store
from pipeline.images import Images, ImageStore

CPU = torch.device("cpu")


def features(count: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(4, 4, generator=torch.Generator().manual_seed(9))
    return torch.randn(count, 4, generator=generator) @ mixing + shift


def test_the_frechet_distance_is_that_of_the_two_normal_distributions() -> None:
    real, fake = features(60, 0), features(40, 1, shift=0.5)
    mean, covariance = zip(*((x.double().mean(0).numpy(), x.double().T.cov().numpy()) for x in (real, fake)), strict=True)
    root = scipy.linalg.sqrtm(covariance[0] @ covariance[1]).real
    expected = np.square(mean[0] - mean[1]).sum() + np.trace(covariance[0] + covariance[1] - 2 * root)
    assert frechet_distance(real, fake) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("chunk", [7, 2048])
def test_density_and_coverage_count_balls_around_the_real_features(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "CHUNK", chunk)
    real, fake = features(30, 0), features(20, 1)
    distance = np.linalg.norm(real.numpy()[:, None] - fake.numpy()[None], axis=2)
    between = np.sort(np.linalg.norm(real.numpy()[:, None] - real.numpy()[None], axis=2), axis=1)
    inside = distance <= between[:, 3:4]  # the third neighbour: column 0 is the image itself
    density, coverage = density_and_coverage(real, fake, 3)
    assert density == pytest.approx(inside.sum() / (3 * 20))
    assert coverage == pytest.approx(inside.any(axis=1).mean())


def test_equal_distributions_have_density_and_coverage_near_one_and_far_ones_none() -> None:
    density, coverage = density_and_coverage(features(1000, 0), features(1000, 1), 5)
    assert density == pytest.approx(1, abs=0.06)
    assert coverage == pytest.approx(1 - 0.5**5, abs=0.03)  # eq. 7 of the paper, for as many fakes as reals
    assert density_and_coverage(features(100, 0), features(100, 1, shift=100), 5) == (0, 0)


def store_of(path: Path, images: Images) -> ImageStore:
    labels = np.zeros(len(images), np.int64)
    shape = (images.shape[1], images.shape[2], images.shape[3])
    return write_store(path, [(images, labels)], classes=("a",), shape=shape, shard_rows=10, origin={})


@pytest.mark.parametrize("chunk", [6, 2048])
def test_the_nearest_training_image_is_found_and_its_distance_is_exact(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fidelity, "CHUNK", chunk)
    rng = np.random.default_rng(0)
    train = store_of(tmp_path / "train", rng.integers(0, 256, (25, 4, 4, 3), np.uint8))
    images = rng.integers(0, 256, (9, 4, 4, 3), np.uint8)
    found = nearest_images(images, train, CPU)
    everything = train.batch(np.arange(25)).astype(float) / 255
    distance = np.sqrt(np.square(images[:, None] / 255 - everything[None]).sum(axis=(2, 3, 4)))
    np.testing.assert_array_equal(found.row, distance.argmin(axis=1))
    np.testing.assert_allclose(found.distance, distance.min(axis=1))
    ordered = np.sort(distance, axis=1)
    np.testing.assert_allclose(found.ratio, ordered[:, 0] / ordered[:, 1])
    assert not found.copied.any()


def test_a_copy_is_nearer_than_a_third_of_the_way_to_the_next() -> None:
    distance, ratio = np.array([0.3, 0.4, 0, 0]), np.array([0.3, 0.4, 0, 1])
    found = fidelity.Nearest(np.zeros(4, int), np.zeros(4, bool), distance, ratio)
    assert found.copied.tolist() == [True, False, True, True]


@pytest.mark.parametrize("times", [1, 2, 5])
@pytest.mark.parametrize("apart", [0, 2])
def test_noisy_copies_are_found_also_of_what_the_training_set_has_several_times(tmp_path: Path, times: int, apart: int) -> None:
    """The same image again, or one that is two levels brighter."""
    images = np.random.default_rng(0).integers(0, 250, (12, 8, 8, 1), np.uint8)
    images[12 - times + 1 :] = images[3] + apart
    noisy = np.clip(images[:4].astype(int) + 3, 0, 255).astype(np.uint8)
    found = nearest_images(np.concatenate([images[3:4], noisy]), store_of(tmp_path / "train", images), CPU)
    assert found.distance[0] == 0
    assert found.copied.all()
    assert (found.ratio < 0.1).all()
    assert not found.mirrored.any()


@pytest.mark.parametrize("chunk", [5, 2048])
def test_mirrored_copies_are_found_where_they_are_looked_for(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fidelity, "CHUNK", chunk)
    images = np.random.default_rng(0).integers(0, 250, (12, 8, 8, 3), np.uint8)
    images[9] = images[2, :, ::-1]  # one training image has its mirror image among the others
    train = store_of(tmp_path / "train", images)
    mirrored = images[[7, 2, 11], :, ::-1] + np.uint8(3)
    plain, found = (nearest_images(mirrored, train, CPU, mirrored=search) for search in (False, True))
    assert plain.copied.tolist() == [False, True, False]
    assert found.copied.all()
    assert found.row[[0, 2]].tolist() == [7, 11]
    assert found.mirrored[[0, 2]].all()
    np.testing.assert_allclose(found.distance, 3 / 255 * np.sqrt(8 * 8 * 3))


def test_a_training_set_of_one_image_has_no_other_to_compare_with(tmp_path: Path) -> None:
    images = np.full((3, 8, 8, 1), 100, np.uint8)
    images[0] += 2
    found = nearest_images(images[1:2] - np.uint8(50), store_of(tmp_path / "train", images), CPU, mirrored=True)
    assert found.ratio.tolist() == [1]
    assert not found.copied.any()
