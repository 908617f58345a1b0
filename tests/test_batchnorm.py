"""BatchNorm from merged moments against PyTorch's own."""

import math
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.batchnorm import OverParts, batch_norm, merge, moments
from pipeline.training.batchnorm import AttackNorms, Mode

ALL = [0, 1, 2, 3, 4]
CHANNELS = {"cpu": ALL, "cuda": [0, 2, 4]}  # a GPU sums one after the other, and loses the digits of a mean far above the rest
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
OWN = 7  # the first rows of images(), whose outputs are wanted; of the others only the moments count


def images(dtype: torch.dtype = torch.float32, channels: list[int] = ALL) -> Tensor:
    """Channels: ordinary, constant 7.3, of mean 1,000, of mean -20,000, constant 0."""
    x = torch.randn(12, 5, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scale, shift = torch.tensor([[3.0, 0, 1, 10, 0], [0.5, 7.3, 1000, -20_000, 0]], dtype=torch.float64).view(2, 1, 5, 1, 1)
    return (x * scale + shift).to(dtype)[:, channels]


def trained_norm(channels: list[int] = ALL) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(len(channels))
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 0.5, 1.5, -1.0])[channels])
        norm.bias.copy_(torch.tensor([0.0, 0.1, -0.2, 0.3, 1.0])[channels])
    return norm


def in_parts(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """The first rows of x, normalised in the whole."""
    y: Tensor = batch_norm(norm, x[:OWN], torch.stack([moments(part) for part in (x[OWN:8], x[:0], x[8:])]))[0]
    return y


def by_pytorch(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)[:OWN]


def as_an_attack_has_it(norm: nn.BatchNorm2d, x: Tensor, mode: Mode = "batch") -> Tensor:
    """The first rows are attacked, of the others the moments are noted in the clean pass."""
    norms = AttackNorms(nn.Sequential(norm), mode, torch.arange(5, len(x)), some_rest=True)
    with norms.noting():
        norm(x)
    with norms.frozen():
        inside: Tensor = norm(x[:5])
    return inside


def test_merged_moments_are_those_of_the_whole() -> None:
    x = images()
    mean, var, count = merge(torch.stack([moments(part) for part in (x[:1], x[1:8], x[:0], x[8:])]))
    exact = x.double().transpose(0, 1).flatten(1)
    assert count == exact.shape[1]
    torch.testing.assert_close(mean.double(), exact.mean(dim=1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var.double(), exact.var(dim=1, correction=0), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("device", DEVICES)
def test_values_and_gradients_are_those_of_pytorch_also_for_constant_channels_and_large_means(
    device: str, layout: torch.memory_format
) -> None:
    channels = CHANNELS[device]
    x, norm = images(channels=channels), trained_norm(channels)
    weights = torch.randn(x[:OWN].shape, generator=torch.Generator().manual_seed(1))
    found = []
    for forward, inputs, where in ((in_parts, x, device), (by_pytorch, x.double(), "cpu")):
        module = trained_norm(channels).to(where, inputs.dtype)
        inputs = inputs.to(where).contiguous(memory_format=layout).requires_grad_()
        out = forward(module, inputs)
        (out * weights.to(where)).sum().backward()
        assert inputs.grad is not None
        parts = (out.detach(), inputs.grad[:OWN], module.weight.grad, module.bias.grad)
        found.append([part.double().cpu() for part in parts if part is not None])
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=2e-3, atol=2e-3 * exact.abs().amax().item())
    # A constant channel has no digits but those of its rounded mean: four steps of 7.3, beside sqrt(eps), times the weight 2.
    few_digits = 4 * 7.3 * 2**-23 / math.sqrt(norm.eps) * 2
    plain = by_pytorch(norm, x).detach().double()
    assert (found[0][0] - found[1][0]).abs().max() <= 3 * (plain - found[1][0]).abs().max() + few_digits


def test_gradients_are_those_of_finite_differences() -> None:
    x, norm = images(torch.float64)[:, [0, 3]], nn.BatchNorm2d(2).double()
    others = moments(x[OWN:])[None]

    def forward(own: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y: Tensor = OverParts.apply(own, weight, bias, others, norm.eps)[0]
        return y

    inputs = [t.detach().clone().requires_grad_() for t in (x[:2], norm.weight, norm.bias)]
    assert torch.autograd.gradcheck(forward, inputs)


def test_an_attack_on_some_rows_normalises_them_as_pytorch_does_in_the_whole_batch() -> None:
    x, norm = images(), trained_norm()
    ours, whole = as_an_attack_has_it(norm, x), by_pytorch(norm, x)[:5]
    torch.testing.assert_close(ours, whole, rtol=1e-3, atol=3e-3)


@pytest.mark.parametrize("mode", get_args(Mode))
def test_a_norm_without_weights_is_one_of_weight_one_and_bias_zero(mode: Mode) -> None:
    x = images(channels=[0, 2])
    found = [as_an_attack_has_it(nn.BatchNorm2d(2, affine=affine), x, mode) for affine in (True, False)]
    assert torch.equal(*found)


@pytest.mark.parametrize("mode", ["clean", "running"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_by_fixed_statistics_values_and_gradients_are_those_of_pytorch_in_evaluation(mode: Mode, dtype: torch.dtype) -> None:
    channels = [0, 1, 2, 4]
    x, norm = images(dtype, channels), trained_norm(channels).to(torch.float64 if dtype == torch.float64 else torch.float32)
    norm.momentum = 0.0
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(torch.tensor([1.0, 7.3, 999, 0.5]))
    norm.running_var.copy_(torch.tensor([4.0, 0.1, 2, 0]))
    every, exact = (0, 2, 3), x.double()
    mean, var = exact.mean(every), exact.var(every, correction=0)
    if mode == "running":
        mean, var = norm.running_mean.double(), norm.running_var.double()
    weights = torch.randn(5, 4, 6, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    z, z_exact = x.clone().requires_grad_(), exact.clone().requires_grad_()
    out = as_an_attack_has_it(norm, z, mode)
    wanted = F.batch_norm(z_exact, mean, var, norm.weight.double(), norm.bias.double(), eps=norm.eps)[:5]
    (grad,), (grad_wanted,) = torch.autograd.grad(out, z, weights), torch.autograd.grad(wanted, z_exact, weights.double())
    tolerance = {torch.float64: 1e-9, torch.float32: 3e-3, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(out.double(), wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad.double(), grad_wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
def test_in_bf16_the_result_is_as_near_as_rounding_it_allows(device: str) -> None:
    x, norm = images(torch.bfloat16, CHANNELS[device]), trained_norm(CHANNELS[device])
    exact = by_pytorch(norm.double(), x.double())
    ours = in_parts(trained_norm(CHANNELS[device]).to(device), x.to(device).contiguous(memory_format=torch.channels_last))
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double().cpu(), exact.bfloat16().double(), rtol=2**-8, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_of_no_images_are_zero_and_join_the_graph(dtype: torch.dtype) -> None:
    x = torch.zeros(0, 3, 2, 2, dtype=dtype, requires_grad=True)
    found = moments(x)
    assert found.tolist() == [0.0] * 7
    assert found.dtype == dtype
    found.sum().backward()  # as on a rank whose images are all unattacked
    assert x.grad is not None
