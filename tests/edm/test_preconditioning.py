"""Preconditioning against its design goals: unit variances, unit loss at the start, the exact denoiser of Gaussian data."""

import pytest
import torch
from torch import Tensor

from pipeline.edm.preconditioning import c_in, c_noise, c_out, c_skip, denoise, denoising_loss, loss_weight

SIGMA_DATA = 0.6
SIGMAS = torch.tensor([0.002, 0.05, 0.3, 0.6, 2.0, 80.0], dtype=torch.float64)


def zero_network(x: Tensor, noise: Tensor, labels: Tensor | None, dropping: bool) -> Tensor:  # noqa: ARG001
    return torch.zeros_like(x)


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sigma", SIGMAS)
def test_input_and_target_of_the_network_have_unit_variance(sigma: Tensor) -> None:
    clean = SIGMA_DATA * gaussian(100_000, seed=0)
    noisy = clean + sigma * gaussian(100_000, seed=1)
    target = (clean - c_skip(sigma, SIGMA_DATA) * noisy) / c_out(sigma, SIGMA_DATA)
    for values in (c_in(sigma, SIGMA_DATA) * noisy, target):
        assert abs(values.mean()) < 0.02
        assert values.std().item() == pytest.approx(1, abs=0.01)


def test_little_noise_passes_the_image_and_much_noise_passes_the_network() -> None:
    low, high = torch.tensor(1e-6, dtype=torch.float64), torch.tensor(1e6, dtype=torch.float64)
    assert c_skip(low, SIGMA_DATA).item() == pytest.approx(1)
    assert c_out(low, SIGMA_DATA).item() == pytest.approx(0, abs=1e-5)
    assert c_skip(high, SIGMA_DATA).item() == pytest.approx(0, abs=1e-5)
    assert c_out(high, SIGMA_DATA).item() == pytest.approx(SIGMA_DATA)


def test_the_weight_undoes_the_output_scale() -> None:
    torch.testing.assert_close(loss_weight(SIGMAS, SIGMA_DATA) * c_out(SIGMAS, SIGMA_DATA) ** 2, torch.ones_like(SIGMAS))


def test_the_values_of_table_1_by_hand() -> None:
    sigma = torch.tensor(0.5, dtype=torch.float64)
    assert c_skip(sigma, 0.5).item() == pytest.approx(0.5)
    assert c_out(sigma, 0.5).item() == pytest.approx(0.25 / 0.5**0.5)
    assert c_in(sigma, 0.5).item() == pytest.approx(2**0.5)
    assert c_noise(sigma).item() == pytest.approx(-0.17328679513998632)


def test_the_loss_of_an_untrained_network_is_one_at_every_noise_level() -> None:
    clean, noise = SIGMA_DATA * gaussian(6, 3, 64, 64, seed=0), gaussian(6, 3, 64, 64, seed=1)
    loss = denoising_loss(zero_network, clean, noise, SIGMAS, torch.zeros(6, dtype=torch.int64), SIGMA_DATA)
    assert loss.shape == (6,)
    torch.testing.assert_close(loss, torch.ones(6, dtype=torch.float64), atol=0.05, rtol=0)


def test_a_network_that_outputs_the_target_has_no_loss() -> None:
    clean, noise = SIGMA_DATA * gaussian(6, 1, 4, 4, seed=0), gaussian(6, 1, 4, 4, seed=1)
    level = SIGMAS.view(-1, 1, 1, 1)
    target = (clean - c_skip(level, SIGMA_DATA) * (clean + level * noise)) / c_out(level, SIGMA_DATA)
    labels = torch.arange(6)
    loss = denoising_loss(lambda *_: target, clean, noise, SIGMAS, labels, SIGMA_DATA)
    torch.testing.assert_close(loss, torch.zeros_like(loss))


def test_the_network_sees_the_scaled_image_the_log_level_the_labels_and_whether_to_drop() -> None:
    x, labels = gaussian(6, 1, 2, 2, seed=0), torch.arange(6)
    seen: list[object] = []

    def network(x: Tensor, *rest: object) -> Tensor:
        seen.extend([x, *rest])
        return torch.ones_like(x)

    denoised = denoise(network, x, SIGMAS, labels, SIGMA_DATA, dropping=True)
    level = SIGMAS.view(-1, 1, 1, 1)
    torch.testing.assert_close(seen[0], x / (level**2 + SIGMA_DATA**2).sqrt())
    torch.testing.assert_close(seen[1], SIGMAS.log() / 4)
    assert seen[2] is labels
    assert seen[3] is True
    torch.testing.assert_close(denoised, c_skip(level, SIGMA_DATA) * x + c_out(level, SIGMA_DATA))
