"""Projected gradient descent: one loop for every loss, norm and per-sample radius."""

from collections.abc import Callable

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from pipeline.balls import Ball, per_sample
from pipeline.params import Section

Loss = Callable[[Tensor], Tensor]  # x (B, C, H, W) -> (B,)


class PGDParams(Section):
    """`step_size_255` in units of 1/255, for a sample whose radius is the threat's; smaller radii scale it down."""

    num_steps: PositiveInt
    step_size_255: PositiveFloat


def pgd(
    loss: Loss,
    x: Tensor,
    *,
    ball: Ball,
    eps: Tensor,
    step_size: Tensor,
    num_steps: int,
    start: Tensor | None = None,
    check: bool = True,
) -> Tensor:
    """Maximise loss: (B, ...) -> (B,) in each sample's own ball around x (B, ...) in [0, 1] (Madry et al.,
    arXiv:1706.06083). eps and step_size are (B,) in the pixel range; start (B, ...) are samples of the unit ball
    (`ball.uniform`), from which each sample starts. Returns the last iterate; where eps is 0 it is exactly x. Without check,
    which on a GPU waits for all that was computed before, x and eps must be known to be right.

    Raises:
        ValueError: x leaves [0, 1], or eps is negative.
    """
    if check and len(x):
        check_attack_input(x, eps)
    x_adv = x
    if start is not None:
        x_adv = (x + per_sample(eps, x) * start).clamp(0, 1)
    for _ in range(num_steps):
        x_adv = x_adv.detach().requires_grad_()
        (grad,) = torch.autograd.grad(loss(x_adv).sum(), x_adv)
        with torch.no_grad():
            x_adv = x_adv + per_sample(step_size, x) * ball.ascend(grad)
            # x is in the box, so the clamp brings no point out of the ball.
            x_adv = (x + ball.project(x_adv - x, eps)).clamp(0, 1)
    return x_adv.detach()


def check_attack_input(x: Tensor, eps: Tensor) -> None:
    if not (x.min() >= 0 and x.max() <= 1):
        raise ValueError(
            f"pgd needs x in [0, 1], got [{x.min():.3g}, {x.max():.3g}]; normalise inside the model, not before the attack"
        )
    if eps.shape != x.shape[:1] or not bool((eps >= 0).all()):
        raise ValueError(
            f"pgd needs one eps >= 0 per sample ({len(x)},), got shape {tuple(eps.shape)}, minimum {eps.min():.3g}"
        )
