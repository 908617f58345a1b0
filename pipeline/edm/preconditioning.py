"""The denoiser of EDM and its loss (Karras et al. 2022, arXiv:2206.00364, table 1 and section 5). Images are in [-1, 1]."""

from collections.abc import Callable

import torch
from torch import Tensor

# (c_in x (B, C, H, W), c_noise (B,), labels (B,) or None for no class, whether to drop) -> (B, C, H, W)
Network = Callable[[Tensor, Tensor, Tensor | None, bool], Tensor]


def c_skip(sigma: Tensor, sigma_data: float) -> Tensor:
    """Weight of the noisy image in the denoised one: sigma_data^2 / (sigma^2 + sigma_data^2)."""
    return sigma_data**2 / (sigma**2 + sigma_data**2)


def c_out(sigma: Tensor, sigma_data: float) -> Tensor:
    """Weight of the network's output: sigma sigma_data / sqrt(sigma^2 + sigma_data^2)."""
    return sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()


def c_in(sigma: Tensor, sigma_data: float) -> Tensor:
    """Scale that gives the network an input of unit variance: 1 / sqrt(sigma^2 + sigma_data^2)."""
    return 1 / (sigma**2 + sigma_data**2).sqrt()


def c_noise(sigma: Tensor) -> Tensor:
    """The noise level as the network sees it: ln(sigma) / 4."""
    return sigma.log() / 4


def loss_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 = 1 / c_out^2: all noise levels start at loss 1."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def denoise(
    network: Network,
    x: Tensor,
    sigma: Tensor,
    labels: Tensor | None,
    sigma_data: float,
    dropping: bool = False,
) -> Tensor:
    """D(x; sigma) of eq. 7: x (B, C, H, W) with noise of levels sigma (B,) -> the expected clean image (B, C, H, W).

    With `dropping` the network drops activations and labels, drawn from PyTorch's global generator.
    """
    level = sigma.view(-1, 1, 1, 1)
    output = network(c_in(level, sigma_data) * x, c_noise(sigma), labels, dropping)
    return c_skip(level, sigma_data) * x + c_out(level, sigma_data) * output


def guided_denoise(network: Network, x: Tensor, sigma: Tensor, labels: Tensor, sigma_data: float, scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans, arXiv:2207.12598) in terms of denoisers: D(x | none) + scale (D(x | label) -
    D(x | none)), as `denoise` for scale 1. The network must have been trained with label dropout."""
    conditional = denoise(network, x, sigma, labels, sigma_data)
    if scale == 1:
        return conditional
    return torch.lerp(denoise(network, x, sigma, None, sigma_data), conditional, scale)


def denoising_loss(
    network: Network,
    clean: Tensor,
    noise: Tensor,
    sigma: Tensor,
    labels: Tensor,
    sigma_data: float,
    dropping: bool = False,
) -> Tensor:
    """lambda(sigma) ||D(clean + sigma noise; sigma) - clean||^2 of eq. 8, averaged over pixels: (B, C, H, W) -> (B,)."""
    noisy = clean + sigma.view(-1, 1, 1, 1) * noise
    error = denoise(network, noisy, sigma, labels, sigma_data, dropping) - clean
    return loss_weight(sigma, sigma_data) * error.square().flatten(1).mean(dim=1)
