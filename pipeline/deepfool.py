"""DeepFool (Moosavi-Dezfooli et al., arXiv:1511.04599): signed distances to the decision boundary, batched."""

from dataclasses import dataclass

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from pipeline.balls import Ball
from pipeline.hyperplanes import class_scale, nearest_hyperplane, step_in_box, step_onto
from pipeline.losses import cw_margin
from pipeline.params import Section
from pipeline.segments import Segment, narrow, share_of_root

BENT = 0.1  # a gap that misses the foretold one by less, as a share of its change, is interpolated without a forward pass


class DeepFoolParams(Section):
    """`first_candidates` classes are linearised at the first iteration and `candidates` afterwards (null: all), those that
    are foretold to be the nearest. `box` keeps the perturbed images in [0, 1]. The margin is where the last step, which
    the linear model makes too long, crosses the boundary: by interpolation between its ends, after `refine_steps` forward
    passes where a parabola does not fit; null is plain DeepFool, the length of the steps. So an `overshoot` above the paper's
    0.02 saves iterations for margins that are a little longer."""

    max_iterations: PositiveInt = 50
    overshoot: NonNegativeFloat = 0.02
    first_candidates: PositiveInt | None = 2
    candidates: PositiveInt | None = 1
    box: bool = True
    refine_steps: NonNegativeInt | None = 2


@dataclass(frozen=True)
class DeepFoolResult:
    """All of length B. `margin`: signed distance in the norm of the ball and the pixel range, negative where the model
    gets the label wrong, NaN where not converged. `nearest`: class across the boundary, -1 where not converged.
    `logits` (B, K) of the unperturbed images; `x_adv` (B, C, H, W) is across the boundary where converged: the first point
    found there, farther out than the margin (on it where that is 0)."""

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
    first_candidates: int | None = 2,
    candidates: int | None = 1,
    box: bool = True,
    refine_steps: int | None = 2,
    scale: Tensor | None = None,
    rough: bool = True,
) -> DeepFoolResult:
    """Untargeted from the label y (B,) of x (B, C, H, W) in [0, 1]. Each iteration linearises the model, takes the
    class k that minimises (f_y - f_k) / ||grad (f_y - f_k)||_dual and steps onto that hyperplane (eq. 8 to 11); a
    misclassified sample takes the same step back, towards its class. Images leave the work as soon as they cross.

    The margin ends on the boundary; the `overshoot`, a share of the gap f_y - f_k of the step or of the clean image, the
    larger one, only makes the step cross. For an affine model without a box the margin is exact (for a misclassified
    sample when one hyperplane separates it from its class, else an upper bound of the distance: the way back is a sum of
    steps, about a quarter too long in Linf when two classes are ahead). A sample on the boundary has margin 0. Departures
    from the paper: inside the box the step is the shortest that reaches the hyperplane (implementations clip and fall
    short), and the boundary is looked for on the last segment. `scale` (K, K), of `gradient_scale` or else of `class_scale`,
    tells which classes are candidates. In mixed precision the logits of x are `rough` or exact. The model is not changed and
    must be in eval mode.

    Raises:
        ValueError: the model is in training mode, its logits are not finite, or x is not in the box.
    """
    if any(module.training for module in model.modules()):
        raise ValueError("deepfool needs the model in eval mode: BatchNorm and dropout would couple or randomise the samples")
    if box and len(x) and not bool((x.amin() >= 0) & (x.amax() <= 1)):
        raise ValueError(f"deepfool needs x in [0, 1], got [{x.amin():.3g}, {x.amax():.3g}]; normalise inside the model")
    scale = class_scale(model) if scale is None else scale
    plane = nearest_hyperplane(model, x, y, ball, candidates=first_candidates, scale=scale, rough=rough)
    logits = logits_clean = plane.logits
    if not bool(torch.isfinite(logits_clean).all()):
        raise ValueError("wanted finite logits from the model, got NaN or infinity; its weights or the images are damaged")
    correct, gap_clean = logits_clean.argmax(dim=1) == y, -cw_margin(logits_clean, y)
    delta, before, x_adv = torch.zeros_like(x), x.clone(), x.clone()  # before: the last point on this side of the boundary
    gap_before, gap_at, share = gap_clean.clone(), gap_clean.clone(), torch.ones_like(gap_clean)  # f_y - max other f
    bent, tied = torch.zeros_like(correct), gap_clean == 0
    iterations, nearest = torch.zeros_like(y), torch.full_like(y, -1)
    active = torch.arange(len(x), device=x.device)

    def step(gap: Tensor, grad: Tensor, z: Tensor) -> Tensor:
        return step_in_box(gap, grad, z, ball) if box else step_onto(gap, grad, ball)

    for iteration in range(max_iterations):
        labels, start, z, was_correct = y[active], x[active], x_adv[active], correct[active]
        if iteration > 0:
            plane = nearest_hyperplane(model, z, labels, ball, candidates=candidates, scale=scale, known=logits)
        before[active], gap_before[active] = z, -cw_margin(plane.logits, labels)
        if refine_steps is None:
            delta[active] = z + step(plane.gap, plane.grad, z) - start
        side = torch.where(was_correct, 1.0, -1.0).to(x.dtype)
        foretold = -overshoot * side * torch.maximum(plane.gap.abs(), gap_clean[active].abs())
        x_adv[active] = z + step(plane.gap - foretold, plane.grad, z)
        iterations[active] += 1

        with torch.no_grad():
            logits = model(x_adv[active])
        predicted = logits.argmax(dim=1)
        gap_at[active] = -cw_margin(logits, labels)
        reached = (logits.gather(1, labels[:, None]) - logits.gather(1, plane.nearest[:, None])).squeeze(1)
        share[active] = share_of_root(plane.gap, reached, slope=foretold - plane.gap)
        # The last segment is too crooked for a parabola, or a class other than the foretold one is the first across.
        bent[active] = ((reached - foretold).abs() > BENT * (reached - plane.gap).abs()) | (gap_at[active] < reached)
        crossed = ((predicted == labels) ^ was_correct) | tied[active]
        across = torch.where(was_correct & ~tied[active], predicted, plane.nearest)
        nearest[active] = torch.where(crossed, across, -1)
        going = (~crossed).nonzero().squeeze(1)
        active, logits = active[going], logits[going]
        if len(active) == 0:
            break

    converged = nearest >= 0
    if refine_steps is not None:
        last = Segment(before, gap_before, x_adv, gap_at)
        delta, rows = last.at(share) - x, (bent & converged).nonzero().squeeze(1)
        delta[rows] = narrow(model, last.rows(rows), y[rows], refine_steps).root() - x[rows]
    sign = torch.where(correct, 1.0, -1.0).to(x.dtype)
    margin = torch.where(converged, sign * ball.norm(delta), torch.nan)
    return DeepFoolResult(margin, nearest, iterations, converged, logits_clean, x_adv)
