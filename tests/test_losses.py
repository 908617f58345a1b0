import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.losses import cross_entropy, cw_margin, kl_divergence, mart, trades

GENERATOR = torch.Generator().manual_seed(0)
CLEAN = torch.randn(6, 5, dtype=torch.float64, generator=GENERATOR)
ADV = torch.randn(6, 5, dtype=torch.float64, generator=GENERATOR)
Y = torch.tensor([0, 1, 2, 3, 4, 0])


def softmax(logits: Tensor) -> np.ndarray:
    z = np.exp(logits.numpy() - logits.numpy().max(axis=1, keepdims=True))
    return np.asarray(z / z.sum(axis=1, keepdims=True))


def test_losses_equal_their_formulas_written_in_numpy() -> None:
    p, q, rows = softmax(CLEAN), softmax(ADV), np.arange(6)
    kl = (p * np.log(p / q)).sum(axis=1)
    target = 0.9 * np.eye(5)[Y] + 0.1 / 5
    smooth = -(target * np.log(p)).sum(axis=1)
    np.testing.assert_allclose(cross_entropy(CLEAN, Y), -np.log(p[rows, Y]))
    np.testing.assert_allclose(cross_entropy(CLEAN, Y, label_smoothing=0.1), smooth)
    np.testing.assert_allclose(kl_divergence(ADV, CLEAN), kl)
    np.testing.assert_allclose(trades(CLEAN, ADV, Y, beta=5, label_smoothing=0.1), smooth + 5 * kl)
    others = np.where(np.eye(5)[Y] == 1, -np.inf, q).max(axis=1)
    boosted = -np.log(q[rows, Y]) - np.log(1 - others)
    np.testing.assert_allclose(mart(CLEAN, ADV, Y, beta=6), boosted + 6 * (1 - p[rows, Y]) * kl)
    f = CLEAN.numpy()
    margin = np.where(np.eye(5)[Y] == 1, -np.inf, f).max(axis=1) - f[rows, Y]
    np.testing.assert_allclose(cw_margin(CLEAN, Y), margin)


@pytest.mark.parametrize("name", ["cross_entropy", "kl", "trades", "mart", "cw"])
def test_gradients_equal_finite_differences(name: str) -> None:
    losses = {
        "cross_entropy": lambda a, _: cross_entropy(a, Y, label_smoothing=0.1),
        "kl": kl_divergence,
        "trades": lambda a, b: trades(a, b, Y, beta=5, label_smoothing=0.1),
        "mart": lambda a, b: mart(a, b, Y, beta=6),
        "cw": lambda a, _: cw_margin(a, Y),
    }
    inputs = (CLEAN.clone().requires_grad_(), ADV.clone().requires_grad_())
    assert torch.autograd.gradcheck(losses[name], inputs, check_batched_grad=False)


def test_kl_of_equal_logits_is_zero_and_extreme_logits_stay_finite() -> None:
    torch.testing.assert_close(kl_divergence(CLEAN, CLEAN), torch.zeros(6, dtype=torch.float64))
    extreme = torch.tensor([[1e4, -1e4, 0.0]])
    assert bool(torch.isfinite(trades(extreme, -extreme, torch.tensor([1]), beta=5)).all())
    assert bool(torch.isfinite(mart(extreme, -extreme, torch.tensor([2]), beta=5)).all())
