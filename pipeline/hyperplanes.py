"""Linear models of a classifier: which class boundary is nearest, and the shortest step onto it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.balls import Ball, per_sample
from pipeline.models.inference import MixedPrecision

NEWTON_STEPS = 8
CALIBRATION_BATCH = 16
MOST_CALIBRATED = 128  # classes: the gradients of all of them are in memory at a time


@dataclass(frozen=True)
class Hyperplane:
    """The boundary between the labels y and the classes `nearest` (B,), to first order at z: value f_y - f_k `gap` (B,)
    and gradient `grad` (B, ...). `logits` (B, K) are those at z."""

    logits: Tensor
    nearest: Tensor
    gap: Tensor
    grad: Tensor


def nearest_hyperplane(
    model: nn.Module,
    z: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    candidates: int | None,
    scale: Tensor | None,
    known: Tensor | None = None,
    rough: bool = False,
) -> Hyperplane:
    """Linearise the model at z (B, ...) and take the class k that minimises the signed distance
    (f_y - f_k) / ||grad (f_y - f_k)||_dual out of the candidates of `rank_classes`: one forward pass, and one backward
    pass per candidate. In mixed precision `known`, the logits at z where somebody has them, or `rough`, those of bfloat16,
    save a forward pass in float32."""
    z = z.detach()
    with torch.enable_grad():
        z.requires_grad_()
        logits = model(z, known, rough=rough) if isinstance(model, MixedPrecision) else model(z)
        classes = rank_classes(logits.detach(), y, candidates, scale)
        gaps = logits.gather(1, y[:, None]) - logits.gather(1, classes)
    least = torch.full_like(gaps[:, 0], torch.inf, requires_grad=False)
    gap, nearest, grad = least, y, z.detach()
    for column in range(classes.shape[1]):
        (slope,) = torch.autograd.grad(gaps[:, column].sum(), z, retain_graph=column < classes.shape[1] - 1)
        distance = gaps[:, column].detach() / positive(ball.dual_norm(slope))
        nearer = distance < least
        least = torch.where(nearer, distance, least)
        gap = torch.where(nearer, gaps[:, column].detach(), gap)
        nearest = torch.where(nearer, classes[:, column], nearest)
        grad = torch.where(per_sample(nearer, z), slope, grad)
    return Hyperplane(logits.detach(), nearest, gap, grad)


@torch.no_grad()
def class_scale(model: nn.Module) -> Tensor | None:
    """||w_i - w_j||_2 (K, K) for the weights of the last linear layer, which foretells ||grad (f_i - f_j)|| up to a factor
    per sample: exact for a linear head on features with orthogonal gradients. None where there is no linear layer."""
    exact = model.exact if isinstance(model, MixedPrecision) else model
    heads = [module.weight for module in exact.modules() if isinstance(module, nn.Linear)]
    return torch.cdist(heads[-1], heads[-1]) if heads else None


def gradient_scale(model: nn.Module, x: Tensor, ball: Ball) -> Tensor:
    """Mean of ||grad (f_i - f_j)||_dual over images x (N, C, H, W): (K, K). It foretells the norm at other images better than
    `class_scale`, for K backward passes an image."""
    total = torch.zeros(())
    for part in x.split(CALIBRATION_BATCH):
        z = part.detach().requires_grad_()
        with torch.enable_grad():
            logits = model(z)
        classes = logits.shape[1]
        slopes = [
            torch.autograd.grad(logits[:, k].sum(), z, retain_graph=k < classes - 1)[0].flatten(1) for k in range(classes)
        ]
        grads = torch.stack(slopes, dim=1)  # (n, K, D)
        norms = [ball.dual_norm((grads - grad[:, None]).flatten(0, 1)).view(len(part), classes) for grad in slopes]
        total = total.to(grads) + torch.stack(norms).sum(dim=1)
    return total / len(x)


def rank_classes(logits: Tensor, y: Tensor, count: int | None, scale: Tensor | None) -> Tensor:
    """The count classes (B, count) other than y of least (f_y - f_k) / scale[y, k], nearest first; all others when count is
    None. `scale` (K, K) foretells ||grad (f_y - f_k)|| up to a factor per sample; None takes it as equal for all classes, so
    that they come by logit."""
    foretold = logits.gather(1, y[:, None]) - logits
    if scale is not None and len(scale) == logits.shape[1]:
        foretold = foretold / positive(scale[y])
    available = logits.shape[1] - 1
    others = foretold.scatter(1, y[:, None], torch.inf)
    return others.topk(available if count is None else min(count, available), dim=1, largest=False).indices


def step_onto(gap: Tensor, grad: Tensor, ball: Ball) -> Tensor:
    """Shortest step (B, ...) that brings a function of value gap (B,) and gradient grad (B, ...) to zero; zero where the
    gradient is."""
    return per_sample(-gap / positive(ball.dual_norm(grad)), grad) * ball.ascend(grad)


def step_in_box(gap: Tensor, grad: Tensor, z: Tensor, ball: Ball) -> Tensor:
    """As `step_onto` among the steps that keep z + step in [0, 1]; as far as the box allows where it allows too little.

    The solution moves coordinate i by min(t u_i, room_i) with u = 1 (Linf) or |grad| (L2): t solves the concave,
    piecewise linear sum_i |grad_i| min(t u_i, room_i) = |gap|, here by Newton's method, which approaches it from below."""
    direction = -torch.sign(per_sample(gap, grad)) * torch.sign(grad)
    room = torch.where(direction > 0, 1 - z, z).flatten(1).clamp_min(0)
    weight = grad.abs().flatten(1)
    unit = torch.ones_like(weight) if ball.name == "linf" else weight
    slope_of = weight * unit
    need = gap.abs()
    t = need / positive(slope_of.sum(dim=1))
    for _ in range(NEWTON_STEPS):
        reach = t[:, None] * unit
        missing = need - (weight * torch.minimum(reach, room)).sum(dim=1)
        slope = (slope_of * (reach < room)).sum(dim=1)
        t = t + torch.where(slope > 0, missing.clamp_min(0) / positive(slope), 0)
    return direction * torch.minimum(t[:, None] * unit, room).view_as(grad)


def positive(values: Tensor) -> Tensor:
    """values with zeros replaced by the smallest positive normal number, to divide by."""
    return values.clamp_min(torch.finfo(values.dtype).tiny)
