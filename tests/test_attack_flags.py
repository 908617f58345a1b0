"""The checks row by row against those of the package on the whole batch."""

from collections.abc import Callable

import pyarrow as pa
import pytest
import torch
from pyautoattack import checks
from torch import Tensor, nn

from pipeline.attack_flags import row_flags, square_is_stronger, summarise_flags
from pipeline.losses import cw_margin

Change = Callable[[Tensor], Tensor]


class Warned:
    """A logger that counts warnings."""

    def __init__(self) -> None:
        self.count = 0

    def warning(self, message: str) -> None:
        assert message
        self.count += 1


class Model(nn.Module):
    """Three classes, linear; `after` changes the logits, `before` the images."""

    def __init__(
        self, after: Callable[[Tensor], Tensor] = lambda z: z, before: Callable[[Tensor], Tensor] = lambda x: x
    ) -> None:
        super().__init__()
        self.w = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
        self.after, self.before = after, before

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.before(x.flatten(1)) @ self.w)


X = torch.rand(20, 1, 2, 2, generator=torch.Generator().manual_seed(1))
Y = torch.arange(20) % 3
NOISE = torch.Generator().manual_seed(2)
MODELS = {
    "plain": Model(),
    "noisy": Model(after=lambda z: z + 0.01 * torch.randn(z.shape, generator=NOISE)),
    "a little noise": Model(after=lambda z: z * (1 + 1e-6 * torch.randn(z.shape, generator=NOISE))),
    "softmax": Model(after=lambda z: z.softmax(dim=1)),
    "rounded": Model(before=torch.round),
    "bounded": Model(after=lambda z: z.sigmoid()),
    "clipped": Model(before=lambda x: x.clamp(0.3, 0.35)),
}


@pytest.mark.parametrize(
    ("name", "random", "probability", "zero"),
    [
        ("plain", False, False, False),
        ("noisy", True, False, False),
        ("a little noise", False, False, False),
        ("softmax", False, True, False),
        ("rounded", False, False, True),
        ("bounded", False, False, False),
        ("clipped", False, False, True),
    ],
)
def test_the_flags_are_those_of_the_package(name: str, random: bool, probability: bool, zero: bool) -> None:
    model = MODELS[name].eval()
    samples = pa.table(row_flags(model, X, Y))
    found = summarise_flags(samples, {"apgd-ce": 0.5})
    logs = [Warned() for _ in range(3)]
    checks.check_randomized(model, X, Y, bs=20, logger=logs[0])
    checks.check_range_output(model, X, logger=logs[1])
    z = X.clone().requires_grad_()
    (grad,) = torch.autograd.grad(cw_margin(model(z), Y).sum(), z)
    checks.check_zero_gradients(grad, logger=logs[2])
    assert [log.count for log in logs] == [random, probability, zero]
    assert (found["random_outputs"] > 0) == random
    assert found["probability_outputs"] == probability
    assert (found["zero_gradients"] > 0) == zero


def test_a_model_that_is_certain_is_not_taken_for_one_without_gradients() -> None:
    flags = row_flags(Model(after=lambda z: 1e6 * z), X, Y)
    assert not flags["zero_gradient"].any()


def test_only_the_rows_without_a_gradient_are_counted() -> None:
    x = X.clone()
    x[5:] = x[5:].clamp(0.31, 0.34)
    x[:5] = 0.9
    flags = row_flags(MODELS["clipped"], x, Y)
    assert flags["zero_gradient"].tolist() == [True] * 5 + [False] * 15
    assert summarise_flags(pa.table(flags), {})["zero_gradients"] == 5


@pytest.mark.parametrize("square", [0.5, 0.499, 0.4979, 0.3])
def test_square_is_stronger_where_the_package_says_so(square: float) -> None:
    correct = {"apgd-ce": 0.6, "apgd-t": 0.5, "square": square}
    log = Warned()
    checks.check_square_sr({"clean": 0.9, **correct}, logger=log)
    assert square_is_stronger(correct) == bool(log.count)


def test_square_alone_or_not_run_is_not_judged() -> None:
    assert square_is_stronger({"square": 0.5}) is None
    assert square_is_stronger({"apgd-ce": 0.5}) is None
    assert summarise_flags(pa.table(row_flags(Model(), X, Y)), {})["square_stronger"] is None
