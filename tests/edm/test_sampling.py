"""The solver against closed forms: for a Gaussian the flow is linear, for a mixture its denoiser is known."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pipeline.edm.network import NetworkParams, UNet, build_unet
from pipeline.edm.sampling import Denoiser, SamplerParams, heun, image_noise, sample_images, sigma_schedule, to_uint8
from pipeline.edm.training import from_uint8
from pipeline.images import Images, Labels

DEFAULTS = SamplerParams().model_dump()
FAST: dict[str, Any] = {"num_steps": 3, "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}
MEAN = torch.tensor([0.3, -0.2], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.30, 0.12], [0.12, 0.10]], dtype=torch.float64)


def noise_of(count: int, dimension: int) -> Tensor:
    return torch.randn(count, dimension, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def gaussian_denoiser(x: Tensor, sigma: Tensor) -> Tensor:
    """E[y | y + sigma n = x] = mean + S (S + sigma^2 I)^-1 (x - mean)."""
    gain = COVARIANCE @ torch.linalg.inv(COVARIANCE + sigma**2 * torch.eye(2, dtype=torch.float64))
    return MEAN + (x - MEAN) @ gain.T


def gaussian_flow(noise: Tensor, sigma_max: float) -> Tensor:
    """Exact end of the flow: mean + S^(1/2) (S + sigma_max^2 I)^(-1/2) (sigma_max noise - mean)."""
    values, vectors = torch.linalg.eigh(COVARIANCE)
    factor = vectors @ torch.diag((values / (values + sigma_max**2)).sqrt()) @ vectors.T
    return MEAN + (sigma_max * noise - MEAN) @ factor.T


def mixture_denoiser(weights: Tensor, means: Tensor, std: float) -> Denoiser:
    """Posterior mean under a one-dimensional mixture of normals of one std."""

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:  # x (B, 1)
        variance = std**2 + sigma**2
        share = torch.softmax(weights.log() - (x - means) ** 2 / (2 * variance), dim=1)
        return (share * (means + std**2 / variance * (x - means))).sum(dim=1, keepdim=True)

    return denoiser


def test_the_schedule_is_even_in_the_root_of_sigma_and_ends_in_zero() -> None:
    sigmas = sigma_schedule(18, 0.002, 80.0, 7.0)
    assert sigmas.dtype == torch.float64
    assert len(sigmas) == 19
    assert sigmas[0].item() == pytest.approx(80)
    assert sigmas[-2].item() == pytest.approx(0.002)
    assert sigmas[-1] == 0
    roots = sigmas[:-1] ** (1 / 7)
    torch.testing.assert_close(roots.diff(), roots.diff().mean().expand(17))


def test_samples_of_a_gaussian_have_its_mean_and_covariance() -> None:
    samples = heun(gaussian_denoiser, noise_of(50_000, 2), sigma_schedule(100, 0.002, 80.0, 7.0))
    torch.testing.assert_close(samples.mean(0), MEAN, atol=0.01, rtol=0)
    torch.testing.assert_close(samples.T.cov(), COVARIANCE, atol=0.01, rtol=0)


def test_the_error_falls_with_the_square_of_the_number_of_steps() -> None:
    noise = noise_of(100, 2)
    exact = gaussian_flow(noise, 80.0)
    errors = [
        (heun(gaussian_denoiser, noise, sigma_schedule(steps, 0.002, 80.0, 7.0)) - exact).square().mean().sqrt().item()
        for steps in (20, 40, 80)
    ]
    assert errors[0] < 0.02
    for coarse, fine in pairwise(errors):
        assert 3 < coarse / fine < 5.5


def test_samples_of_a_mixture_have_its_weights_means_and_spread() -> None:
    weights, means = torch.tensor([0.3, 0.7], dtype=torch.float64), torch.tensor([-0.8, 0.6], dtype=torch.float64)
    samples = heun(mixture_denoiser(weights, means, 0.1), noise_of(20_000, 1), sigma_schedule(40, 0.002, 80.0, 7.0))
    left = samples[samples < 0]
    right = samples[samples > 0]
    assert len(left) / len(samples) == pytest.approx(0.3, abs=0.02)
    for part, mean in ((left, -0.8), (right, 0.6)):
        assert part.mean().item() == pytest.approx(mean, abs=0.01)
        assert part.std().item() == pytest.approx(0.1, abs=0.01)


def test_eighteen_steps_take_thirty_five_evaluations() -> None:
    levels = []

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        levels.append(sigma.item())
        return torch.zeros_like(x)

    heun(denoiser, noise_of(1, 1), sigma_schedule(**DEFAULTS))
    assert len(levels) == 35
    assert min(levels) == pytest.approx(0.002)


def test_noise_is_normal_and_named_by_seed_and_row() -> None:
    noise = np.stack([image_noise(3, row, (8, 8, 3)) for row in range(200)])
    assert noise.shape == (200, 3, 8, 8)
    assert noise.mean() == pytest.approx(0, abs=0.03)
    assert noise.std() == pytest.approx(1, abs=0.03)
    np.testing.assert_array_equal(noise[7], image_noise(3, 7, (8, 8, 3)))
    others = [image_noise(4, 7, (8, 8, 3)), image_noise(7, 3, (8, 8, 3)), image_noise(3, 7 + 2**32, (8, 8, 3))]
    assert all(np.abs(noise[7] - other).max() > 0.1 for other in others)


def test_every_pixel_value_survives_the_way_to_the_network_and_back() -> None:
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    scaled = from_uint8(images, torch.device("cpu"))
    assert [scaled.min().item(), scaled.max().item()] == [-1, 1]
    np.testing.assert_array_equal(to_uint8(scaled), images)
    assert to_uint8(torch.tensor([[[[-3.0, 3.0]]]])).ravel().tolist() == [0, 255]


@pytest.fixture(scope="module")
def net() -> UNet:
    """A random network of 4 classes whose output is not zero."""
    params = NetworkParams(channels=8, multipliers=(1, 2), blocks=1, attention_resolutions=())
    net = build_unet(params, (8, 8, 3), 4, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return net


def sampled(net: UNet, start: int, stop: int, batch_size: int, seed: int = 0) -> tuple[Images, Labels]:
    chunks = list(sample_images(net, start, stop, batch_size=batch_size, seed=seed, sigma_data=0.5, **FAST))
    assert all(len(images) <= batch_size for images, _ in chunks)
    return np.concatenate([images for images, _ in chunks]), np.concatenate([labels for _, labels in chunks])


def test_images_and_labels_depend_on_the_row_alone_not_on_shards_or_count(net: UNet) -> None:
    images, labels = sampled(net, 0, 20, batch_size=8)
    assert images.shape == (20, 8, 8, 3)
    assert images.dtype == np.uint8
    assert images.std() > 10
    assert labels.tolist() == [row % 4 for row in range(20)]
    for start, stop in ((0, 8), (3, 5), (7, 17), (19, 20)):
        part, part_labels = sampled(net, start, stop, batch_size=8)
        np.testing.assert_array_equal(part, images[start:stop])
        np.testing.assert_array_equal(part_labels, labels[start:stop])


def test_another_batch_size_changes_rounding_at_most(net: UNet) -> None:
    images, _ = sampled(net, 0, 12, batch_size=12)
    for batch_size in (1, 5):
        difference = sampled(net, 0, 12, batch_size=batch_size)[0].astype(int) - images
        assert np.abs(difference).max() <= 1
        assert np.count_nonzero(difference) <= 0.001 * difference.size


def test_another_seed_gives_other_images(net: UNet) -> None:
    assert np.abs(sampled(net, 0, 2, 2)[0].astype(int) - sampled(net, 0, 2, 2, seed=1)[0]).max() > 10


def test_progress_counts_the_images(net: UNet) -> None:
    calls: list[tuple[int, int]] = []
    list(
        sample_images(
            net, 3, 10, batch_size=4, seed=0, sigma_data=0.5, **FAST, progress=lambda done, total: calls.append((done, total))
        )
    )
    assert calls == [(1, 7), (5, 7), (7, 7)]


def test_noise_levels_out_of_order_are_refused() -> None:
    with pytest.raises(ValidationError, match="wanted sigma_min < sigma_max"):
        SamplerParams(sigma_min=80.0, sigma_max=1.0)
    assert math.isclose(SamplerParams().rho, 7)
