"""DeepFool (Moosavi-Dezfooli et al., arXiv:1511.04599): signed distances to the decision boundary, batched."""

from dataclasses import dataclass

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from pipeline.losses import cw_margin
from pipeline.params import Section
from pipeline.threat import Ball, per_sample

NEWTON_STEPS = 8


class DeepFoolParams(Section):
    """`first_candidates` classes by logit are linearised at the first iteration (null: all), and `candidates` afterwards:
    the nearest of them, or for a misclassified sample those of the highest logits. `box` keeps the perturbed images in
    [0, 1]. `refine_steps` forward passes bring the last step, which the linear model makes too long, back onto the
    boundary; 0 is plain DeepFool."""

    max_iterations: PositiveInt = 50
    overshoot: NonNegativeFloat = 0.02
    first_candidates: PositiveInt | None = None
    candidates: PositiveInt = 3
    box: bool = True
    refine_steps: NonNegativeInt = 3


@dataclass(frozen=True)
class DeepFoolResult:
    """All of length B. `margin`: signed distance in the norm of the ball and the pixel range, negative where the model
    gets the label wrong, NaN where not converged. `nearest`: class across the boundary, -1 where not converged.
    `logits` (B, K) of the unperturbed images; `x_adv` (B, C, H, W) is across the boundary where converged: the first point
    found there, farther out than the margin."""

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
    refine_steps: int = 3,
) -> DeepFoolResult:
    """Untargeted from the label y (B,) of x (B, C, H, W) in [0, 1]. Each iteration linearises the model, takes the
    class k that minimises (f_y - f_k) / ||grad (f_y - f_k)||_dual and steps onto that hyperplane (eq. 8 to 11); a
    misclassified sample takes the same step back, towards its class. Images leave the work as soon as they cross.

    The margin ends on the boundary; the `overshoot` of each step only makes it cross. For an affine model
    without a box it is the exact signed margin (for a misclassified sample when one hyperplane separates it from its
    class, else an upper bound of the distance). Two departures from the paper: inside the box the step is the shortest
    that reaches the hyperplane (implementations clip and fall short), and `refine_steps` look for the boundary on the
    last segment. The model is not changed and must be in eval mode.

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
    gap_at = -cw_margin(logits_clean, y)  # f_y - max other f, at x_adv
    before, gap_before = x.clone(), gap_at.clone()  # the last point on this side of the boundary
    active = torch.arange(len(x), device=x.device)
    classes = rank_by_logit(logits_clean, y, first_candidates)  # (A, C): candidates of each active row

    for _ in range(max_iterations):
        labels, start = y[active], x[active]
        before[active], gap_before[active] = x_adv[active], gap_at[active]
        gap, grad, chosen, distances = nearest_hyperplane(model, x_adv[active], labels, classes, ball)
        z, beyond = x_adv[active], (1 + overshoot) * gap
        onto = step_in_box(gap, grad, z, ball) if box else step_onto(gap, grad, ball)
        across = step_in_box(beyond, grad, z, ball) if box else step_onto(beyond, grad, ball)
        delta[active], x_adv[active] = z + onto - start, z + across
        iterations[active] += 1

        with torch.no_grad():
            logits = model(x_adv[active])
        predicted = logits.argmax(dim=1)
        gap_at[active] = -cw_margin(logits, labels)
        was_correct = correct[active]
        crossed = (predicted == labels) ^ was_correct
        nearest[active[crossed]] = torch.where(was_correct, predicted, chosen)[crossed]
        # A correct sample leaves through the nearest boundary; the way back must pass every class that is still ahead.
        few = min(candidates, classes.shape[1])
        nearest_few = classes.gather(1, distances.topk(few, dim=1, largest=False).indices)
        classes = torch.where(was_correct[:, None], nearest_few, rank_by_logit(logits, labels, few))
        active, classes = active[~crossed], classes[~crossed]
        if len(active) == 0:
            break

    converged = nearest >= 0
    if refine_steps:
        last = (before[converged], gap_before[converged], x_adv[converged], gap_at[converged])
        delta[converged] = find_boundary(model, *last, y[converged], refine_steps) - x[converged]
    sign = torch.where(correct, 1.0, -1.0).to(x.dtype)
    margin = torch.where(converged, sign * ball.norm(delta), torch.nan)
    return DeepFoolResult(margin, nearest, iterations, converged, logits_clean, x_adv)


@torch.no_grad()
def find_boundary(
    model: nn.Module, here: Tensor, gap_here: Tensor, there: Tensor, gap_there: Tensor, y: Tensor, num_steps: int
) -> Tensor:
    """Where on the segments from here to there (B, ...) the gap f_y - max other f, of opposite signs (B,) at their ends,
    is zero: the estimate (B, ...) after num_steps of the Illinois method."""
    low, high = torch.zeros_like(gap_here), torch.ones_like(gap_here)
    side = torch.zeros_like(gap_here)  # which end moved last: -1 the lower, 1 the upper

    def root() -> Tensor:
        share = gap_here / (gap_here - gap_there)
        return low + (high - low) * torch.nan_to_num(share, nan=1.0).clamp(0, 1)

    for _ in range(num_steps if len(y) else 0):
        t = root()
        point = here + per_sample(t, here) * (there - here)
        gap = -cw_margin(model(point), y)
        crossed = torch.sign(gap) == torch.sign(gap_there)
        gap_here = torch.where(crossed, torch.where(side == 1, gap_here / 2, gap_here), gap)
        gap_there = torch.where(crossed, gap, torch.where(side == -1, gap_there / 2, gap_there))
        low, high = torch.where(crossed, low, t), torch.where(crossed, t, high)
        side = torch.where(crossed, 1.0, -1.0).to(side.dtype)
    return here + per_sample(root(), here) * (there - here)


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
