"""DeepFool (Moosavi-Dezfooli et al., arXiv:1511.04599): signed distances to the decision boundary, batched."""

from dataclasses import dataclass

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from pipeline.params import Section
from pipeline.threat import Ball, per_sample

NEWTON_STEPS = 8


class DeepFoolParams(Section):
    """`first_candidates` classes by logit are linearised at the first iteration (null: all), and the `candidates`
    nearest of them afterwards. `box` keeps the perturbed images in [0, 1]."""

    max_iterations: PositiveInt = 50
    overshoot: NonNegativeFloat = 0.02
    first_candidates: PositiveInt | None = None
    candidates: PositiveInt = 3
    box: bool = True


@dataclass(frozen=True)
class DeepFoolResult:
    """All of length B. `margin`: signed distance in the norm of the ball and the pixel range, negative where the model
    gets the label wrong, NaN where not converged. `nearest`: class across the boundary, -1 where not converged.
    `logits` (B, K) of the unperturbed images; `x_adv` (B, C, H, W) just across the boundary where converged."""

    margin: Tensor
    nearest: Tensor
    iterations: Tensor
    converged: Tensor
    logits: Tensor
    x_adv: Tensor


def deepfool(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    ball: Ball,
    max_iterations: int = 50,
    overshoot: float = 0.02,
    first_candidates: int | None = None,
    candidates: int = 3,
    box: bool = True,
) -> DeepFoolResult:
    """Untargeted from the label y (B,) of x (B, C, H, W) in [0, 1]. Each iteration linearises the model, takes the
    class k that minimises (f_y - f_k) / ||grad (f_y - f_k)||_dual and steps onto that hyperplane (eq. 8 to 11); a
    misclassified sample takes the same step back, towards its class. Images leave the work as soon as they cross.

    The margin is the length of the accumulated steps; `overshoot` only decides whether they cross. For an affine model
    without a box it is the exact signed margin (for a misclassified sample when one hyperplane separates it from its
    class, else an upper bound of the distance). Unlike the paper, which ignores the box, and its implementations, which
    clip, the step inside the box is the shortest that reaches the hyperplane. The model is not changed and must be in
    eval mode.

    Raises:
        ValueError: the model is in training mode, or its logits are not finite.
    """
    if any(module.training for module in model.modules()):
        raise ValueError("deepfool needs the model in eval mode: BatchNorm and dropout would couple or randomise the samples")
    delta, x_adv = torch.zeros_like(x), x.clone()
    iterations = torch.zeros_like(y)
    nearest = torch.full_like(y, -1)
    with torch.no_grad():
        logits_clean = model(x)
    if not bool(torch.isfinite(logits_clean).all()):
        raise ValueError("wanted finite logits from the model, got NaN or infinity; its weights or the images are damaged")
    correct = logits_clean.argmax(dim=1) == y
    active = torch.arange(len(x), device=x.device)
    classes = rank_by_logit(logits_clean, y, first_candidates)  # (A, C): candidates of each active row

    for _ in range(max_iterations):
        labels, start = y[active], x[active]
        gap, grad, chosen, distances = nearest_hyperplane(model, x_adv[active], labels, classes, ball)
        position = start + delta[active]
        step = step_in_box(gap, grad, position, ball) if box else step_onto(gap, grad, ball)
        delta[active] += step
        x_adv[active] = start + (1 + overshoot) * delta[active]
        if box:
            x_adv[active] = x_adv[active].clamp(0, 1)
        iterations[active] += 1

        with torch.no_grad():
            predicted = model(x_adv[active]).argmax(dim=1)
        was_correct = correct[active]
        crossed = (predicted == labels) ^ was_correct
        nearest[active[crossed]] = torch.where(was_correct, predicted, chosen)[crossed]
        if classes.shape[1] > candidates:
            classes = classes.gather(1, distances.topk(candidates, dim=1, largest=False).indices)
        active, classes = active[~crossed], classes[~crossed]
        if len(active) == 0:
            break

    converged = nearest >= 0
    sign = torch.where(correct, 1.0, -1.0).to(x.dtype)
    margin = torch.where(converged, sign * ball.norm(delta), torch.nan)
    return DeepFoolResult(margin, nearest, iterations, converged, logits_clean, x_adv)


def rank_by_logit(logits: Tensor, y: Tensor, count: int | None) -> Tensor:
    """The count classes (B, count) other than y with the highest logits; all others when count is None."""
    others = logits.scatter(1, y[:, None], -torch.inf)
    available = logits.shape[1] - 1
    return others.topk(available if count is None else min(count, available), dim=1).indices


def nearest_hyperplane(
    model: nn.Module, z: Tensor, y: Tensor, classes: Tensor, ball: Ball
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Linearise the model at z (B, ...). Of the candidates in classes (B, C), that whose boundary is nearest in signed
    distance: its gap f_y - f_k (B,), the gradient of the gap (B, ...), the class k (B,); and all distances (B, C)."""
    z = z.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(z)
        gaps = logits.gather(1, y[:, None]) - logits.gather(1, classes)
    distances = torch.empty_like(gaps, requires_grad=False)
    best, pick = torch.full_like(gaps[:, 0], torch.inf, requires_grad=False), torch.zeros_like(y)
    best_grad = torch.zeros_like(z, requires_grad=False)
    for column in range(classes.shape[1]):
        is_last = column == classes.shape[1] - 1
        (grad,) = torch.autograd.grad(gaps[:, column].sum(), z, retain_graph=not is_last)
        distance = gaps[:, column].detach() / positive(ball.dual_norm(grad))
        distances[:, column] = distance
        nearer = distance < best
        best, pick = torch.where(nearer, distance, best), torch.where(nearer, column, pick)
        best_grad = torch.where(per_sample(nearer, z), grad, best_grad)
    column_of = pick[:, None]
    return gaps.detach().gather(1, column_of).squeeze(1), best_grad, classes.gather(1, column_of).squeeze(1), distances


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
