"""The solver against closed forms: for a Gaussian the flow is linear, for a mixture its denoiser is known."""

import copy
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pipeline.edm import sampling
from pipeline.edm.network import NetworkParams, UNet, build_unet
from pipeline.edm.preconditioning import c_in, c_out, c_skip, guided_denoise
from pipeline.edm.sampling import (
    Denoiser,
    EdmSourceParams,
    SamplerParams,
    blocks,
    heun,
    image_noise,
    image_sampler,
    sample_images,
    sigma_schedule,
    to_uint8,
)
from pipeline.edm.training import from_uint8
from pipeline.images import Images, Labels
from pipeline.params import InputError

DEFAULTS = SamplerParams().model_dump(include={"num_steps", "sigma_min", "sigma_max", "rho"})
FAST: dict[str, Any] = {"num_steps": 3}
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
    params = NetworkParams(channels=8, multipliers=(1, 2), blocks=1, attention_resolutions=(4,))
    net = build_unet(params, (8, 8, 3), 4, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return net


def sampled(net: UNet, start: int, stop: int, batch_size: int, seed: int = 0, **more: Any) -> tuple[Images, Labels]:
    chunks = list(
        sample_images(net, start, stop, batch_size=batch_size, seed=seed, sigma_data=0.5, sampler=SamplerParams(**FAST, **more))
    )
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


@pytest.mark.parametrize("more", [{}, {"bf16": True}])
def test_on_a_cpu_an_image_is_the_same_bit_for_bit_whatever_it_is_drawn_with(net: UNet, more: dict[str, Any]) -> None:
    images, _ = sampled(net, 0, 96, batch_size=96, **more)
    for batch_size, stop in ((1, 7), (5, 40), (33, 70)):
        np.testing.assert_array_equal(sampled(net, 0, stop, batch_size=batch_size, **more)[0], images[:stop])
    draw = image_sampler(net, 0, 0.5, SamplerParams(**FAST, **more))
    for rows in ([7], [64, 0, 32], [95, 3, 3, 40], list(range(95, 0, -5))):
        np.testing.assert_array_equal(draw(np.array(rows), np.array(rows) % 4), images[rows])


def test_a_block_has_one_place_for_each_row_and_every_row_is_in_one() -> None:
    rows = np.array([9, 1, 4, 5, 2**40 + 1, 6])
    assert blocks(rows, 4).tolist() == [[2, 0, 5, -1], [-1, 1, -1, -1], [-1, 3, -1, -1], [-1, 4, -1, -1]]


def test_what_is_drawn_is_what_was_asked_for(net: UNet, monkeypatch: pytest.MonkeyPatch) -> None:
    named: list[int] = []

    def noted(seed: int, row: int, shape: tuple[int, int, int]) -> Any:
        named.append(row)
        return image_noise(seed, row, shape)

    monkeypatch.setattr(sampling, "image_noise", noted)
    sampled(net, 3, 10, batch_size=4)
    assert named == list(range(3, 10))


def test_another_seed_gives_other_images(net: UNet) -> None:
    assert np.abs(sampled(net, 0, 2, 2)[0].astype(int) - sampled(net, 0, 2, 2, seed=1)[0]).max() > 10


def test_progress_counts_the_images(net: UNet) -> None:
    calls: list[tuple[int, int]] = []
    list(
        sample_images(
            net,
            3,
            10,
            batch_size=4,
            seed=0,
            sigma_data=0.5,
            sampler=SamplerParams(**FAST),
            progress=lambda done, total: calls.append((done, total)),
        )
    )
    assert calls == [(1, 7), (5, 7), (7, 7)]


def with_label_dropout(net: UNet) -> UNet:
    dropping = copy.deepcopy(net)
    dropping.label_dropout = 0.1
    return dropping


def test_guidance_of_scale_one_is_off_and_another_is_not(net: UNet) -> None:
    dropping = with_label_dropout(net)
    plain = sampled(net, 0, 8, 8)[0].astype(int)
    np.testing.assert_array_equal(sampled(dropping, 0, 8, 8, guidance_scale=1.0)[0], plain)
    for scale in (0.0, 2.0):
        assert np.abs(sampled(dropping, 0, 8, 8, guidance_scale=scale)[0].astype(int) - plain).max() > 5


def test_without_guidance_by_class_all_classes_give_the_same_image(net: UNet) -> None:
    """Scale 0 is the network without labels, so a row is its noise alone."""
    dropping = with_label_dropout(net)
    sampler = image_sampler(dropping, 0, 0.5, SamplerParams(**FAST, guidance_scale=0.0))
    one, other = (sampler(np.arange(2), np.full(2, label)) for label in (0, 3))
    np.testing.assert_array_equal(one, other)


def test_guidance_needs_a_network_that_saw_images_without_labels(net: UNet) -> None:
    with pytest.raises(InputError, match=r"guidance_scale: wanted 1, got 2: .* set generator\.network\.label_dropout"):
        sampled(net, 0, 2, 2, guidance_scale=2.0)


def test_guided_samples_of_two_normals_move_away_from_the_other_class() -> None:
    """Classes N(+-m, s^2), no class their equal mixture: at high noise D(x | none) is about D(x | label) less what tells the
    classes apart, so that scale w moves the mean of class 1 outwards."""
    mean, std, scale = 0.5, 0.2, 3.0
    weights = torch.tensor([0.5, 0.5], dtype=torch.float64)
    mixture = mixture_denoiser(weights, torch.tensor([-mean, mean], dtype=torch.float64), std)
    single = mixture_denoiser(weights[:1], torch.tensor([mean], dtype=torch.float64), std)

    def network(x: Tensor, noise: Tensor, labels: Tensor | None, _: bool) -> Tensor:
        """F of eq. 7 for these denoisers, x and noise as the network is given them."""
        sigma = (4 * noise[0]).exp()
        raw = x / c_in(sigma, 0.5)
        denoised = (mixture if labels is None else single)(raw.flatten(1), sigma).view_as(raw)
        return (denoised - c_skip(sigma, 0.5) * raw) / c_out(sigma, 0.5)

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        levels = sigma.expand(len(x))
        return guided_denoise(network, x.view(-1, 1, 1, 1), levels, torch.ones(len(x)), 0.5, scale).view_as(x)

    def expected(x: Tensor, sigma: Tensor) -> Tensor:
        return mixture(x, sigma) + scale * (single(x, sigma) - mixture(x, sigma))

    noise = noise_of(500, 1)
    sigmas = sigma_schedule(40, 0.002, 80.0, 7.0)
    found = heun(guided, noise, sigmas)
    torch.testing.assert_close(found, heun(expected, noise, sigmas))
    assert found.mean() > mean + 0.05


def test_bf16_changes_the_images_a_little(net: UNet) -> None:
    plain, found = sampled(net, 0, 4, 4)[0].astype(int), sampled(net, 0, 4, 4, bf16=True)[0]
    assert 0 < np.abs(found - plain).mean() < 4


def test_compile_draws_from_the_compiled_network(net: UNet, compiled_calls: list[Any]) -> None:
    np.testing.assert_array_equal(sampled(net, 0, 4, 4, compile=True)[0], sampled(net, 0, 4, 4)[0])
    assert len(compiled_calls) == SamplerParams(**FAST).evaluations == 5


def test_the_largest_seed_names_noise_and_a_larger_one_is_refused() -> None:
    source: dict[str, Any] = {"kind": "edm", "num_images": 1, "batch_size": 1}
    assert image_noise(EdmSourceParams(**source, seed=2**64 - 1).seed, 0, (8, 8, 1)).shape == (1, 8, 8)
    with pytest.raises(ValidationError, match="less than 18446744073709551616"):
        EdmSourceParams(**source, seed=2**64)


def test_noise_levels_out_of_order_are_refused() -> None:
    with pytest.raises(ValidationError, match="wanted sigma_min < sigma_max"):
        SamplerParams(sigma_min=80.0, sigma_max=1.0)
    assert math.isclose(SamplerParams().rho, 7)
