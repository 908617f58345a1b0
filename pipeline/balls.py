"""Geometry of the threat: norms, projections, steepest ascent and uniform samples of a ball, the same for every norm."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.threat import NormName


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, ...) so that it broadcasts over like (B, ...)."""
    return values.view(-1, *[1] * (like.ndim - 1))


def norm_linf(delta: Tensor) -> Tensor:
    """(B, ...) -> (B,): largest absolute entry."""
    return delta.flatten(1).abs().amax(dim=1)


def norm_l1(delta: Tensor) -> Tensor:
    """(B, ...) -> (B,): sum of absolute entries."""
    return delta.flatten(1).abs().sum(dim=1)


def norm_l2(delta: Tensor) -> Tensor:
    """(B, ...) -> (B,): Euclidean norm."""
    return torch.linalg.vector_norm(delta.flatten(1), dim=1)


def project_linf(delta: Tensor, eps: Tensor) -> Tensor:
    """Nearest point to each delta (B, ...) in the Linf ball of radius eps (B,)."""
    radius = per_sample(eps, delta)
    return torch.minimum(torch.maximum(delta, -radius), radius)


def project_l2(delta: Tensor, eps: Tensor) -> Tensor:
    """Nearest point to each delta (B, ...) in the L2 ball of radius eps (B,): delta * min(1, eps / ||delta||)."""
    norm = norm_l2(delta)
    return delta * per_sample(eps / torch.maximum(norm, eps).clamp_min(torch.finfo(delta.dtype).tiny), delta)


def ascend_l2(grad: Tensor) -> Tensor:
    """Unit L2 vectors along grad (B, ...); zero where grad is zero."""
    return grad / per_sample(norm_l2(grad).clamp_min(torch.finfo(grad.dtype).tiny), grad)


def uniform_linf(like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform samples of the unit Linf ball, shaped like like (B, ...)."""
    noise = torch.empty(like.shape, dtype=like.dtype, device=generator.device)
    return noise.uniform_(-1, 1, generator=generator).to(like.device)


def uniform_l2(like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform samples of the unit L2 ball, shaped like like (B, ...): Gaussian direction, radius U^(1/d)."""
    noise = torch.empty(like.shape, dtype=like.dtype, device=generator.device).normal_(generator=generator)
    radius = torch.empty(len(like), dtype=like.dtype, device=generator.device).uniform_(generator=generator)
    return (ascend_l2(noise) * per_sample(radius ** (1 / like[0].numel()), noise)).to(like.device)


@dataclass(frozen=True)
class Ball:
    """Geometry of one norm. `ascend` maps a gradient to the unit-norm direction of steepest ascent."""

    name: NormName
    norm: Callable[[Tensor], Tensor]
    dual_norm: Callable[[Tensor], Tensor]
    project: Callable[[Tensor, Tensor], Tensor]
    ascend: Callable[[Tensor], Tensor]
    uniform: Callable[[Tensor, torch.Generator], Tensor]


BALLS: dict[NormName, Ball] = {
    "linf": Ball("linf", norm_linf, norm_l1, project_linf, torch.sign, uniform_linf),
    "l2": Ball("l2", norm_l2, norm_l2, project_l2, ascend_l2, uniform_l2),
}
