"""What BatchNorm normalises by while a batch is attacked. Its own buffers never move there.

Rows of radius 0 take no attack steps, so the network sees only the other rows again and again. Normalised by those alone, it
would be another network than the one that is trained on the whole batch, the more so the fewer are attacked, and what is
adversarial to it need not be so to that one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipeline.batchnorm import batch_norm, merge, moments, per_channel, scale_and_shift
from pipeline.ranks import gather_over_ranks, world_size

Mode = Literal["batch", "clean", "running"]
Forward = Callable[[nn.BatchNorm2d, Tensor], Tensor]


class AttackNorms:
    """BatchNorm of a model in training for one batch, of which the rows `rest` (n,) are not attacked; `some_rest`: there are
    such rows on some rank. By `mode` it normalises

    - "batch": by the batch at every step, as in the recipe; rows that are not attacked count as what they were in the clean
      pass. Where all are attacked this is the recipe to the letter. Gradients flow through the statistics.
    - "clean": by the statistics of the whole clean batch, which do not move.
    - "running": by the running statistics.
    """

    def __init__(self, model: nn.Module, mode: Mode, rest: Tensor, some_rest: bool) -> None:
        self.norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        self.mode, self.rest = mode, rest
        self.wants_clean_pass = bool(self.norms) and (mode == "clean" or (mode == "batch" and some_rest))
        self.noted: dict[nn.BatchNorm2d, Tensor] = {}  # moments of the rest on every rank
        self.fixed: dict[nn.BatchNorm2d, tuple[Tensor, Tensor]] = {}  # mean and variance

    @contextmanager
    def noting(self) -> Iterator[None]:
        """In it the model is called once, in training, with the whole clean batch."""
        hooks = [norm.register_forward_pre_hook(self.note) for norm in self.norms if self.wants_clean_pass]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def note(self, norm: nn.Module, inputs: tuple[Tensor]) -> None:
        assert isinstance(norm, nn.BatchNorm2d)
        if self.mode == "batch":
            self.noted[norm] = gather_over_ranks(moments(inputs[0][self.rest]))
        else:
            mean, var, _ = merge(gather_over_ranks(moments(inputs[0])))
            self.fixed[norm] = mean, var

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """In it the model normalises as said, the attacked rows being its input, and its buffers stay."""
        forward = {"batch": self.by_batch, "clean": self.by_clean, "running": by_running}[self.mode]
        with replaced_forward(self.norms, forward):
            yield

    def by_batch(self, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
        if norm not in self.noted and world_size() == 1:
            return F.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)
        return batch_norm(norm, x, self.noted.get(norm))[0]

    def by_clean(self, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
        return ByFixed.apply(x, *self.fixed[norm], *scale_and_shift(norm, x), norm.eps)


def by_running(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    return ByFixed.apply(x, norm.running_mean, norm.running_var, *scale_and_shift(norm, x), norm.eps)


class ByFixed(torch.autograd.Function):
    """x (B, C, H, W) by a mean and variance (C,) that do not depend on it. The gradient is that of x alone, in one pass, which
    PyTorch's own does not reach."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(weight * torch.rsqrt(var + eps))
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (scale,) = ctx.saved_tensors
        return grads[0] * per_channel(scale).to(grads[0].dtype), None, None, None, None, None


@contextmanager
def replaced_forward(norms: list[nn.BatchNorm2d], forward: Forward) -> Iterator[None]:
    """Every one of norms computes forward(norm, x)."""
    for norm in norms:
        norm.forward = partial(forward, norm)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


@contextmanager
def unmoved_statistics(norms: list[nn.BatchNorm2d]) -> Iterator[None]:
    """In it the running statistics stay, whatever the model is called with."""
    before = [norm.track_running_stats for norm in norms]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm, track in zip(norms, before, strict=True):
            norm.track_running_stats = track


@contextmanager
def first_statistics(model: nn.Module, step: int) -> Iterator[None]:
    """In the first step the running statistics become those of its batch (as in the published code), where else the zeros
    and ones that a network is made with would fade slowly."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)] if step == 0 else []
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum
