"""Margins nearer to the truth than DeepFool's: from the boundary, back towards the image along planes near it."""

from dataclasses import replace
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from pipeline.balls import Ball, per_sample
from pipeline.deepfool import DeepFoolResult, deepfool
from pipeline.hyperplanes import nearest_hyperplane, step_in_box, step_onto
from pipeline.losses import cw_margin
from pipeline.params import Section
from pipeline.segments import Segment, narrow

BACKWARD = 0.9  # of the way from the image to the boundary, as in FAB: planes on it lead to the same point again


class TightParams(Section):
    """`num_steps` planes after DeepFool, each followed by `search_steps` forward passes along a segment."""

    num_steps: PositiveInt = 5
    search_steps: PositiveInt = 3


def tight(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    ball: Ball,
    num_steps: int = 5,
    search_steps: int = 3,
    box: bool = True,
    **settings: Any,
) -> DeepFoolResult:
    """As `deepfool` (whose other settings it takes, but for the candidates: all classes, then 3) with a smaller margin.
    `x_adv` is across the boundary up to rounding, so that its distance is an upper bound of the true margin; `margin` ends
    where the gap is zero on the last segment.

    From the point that DeepFool finds, repeat: linearise the model a little on the image's side of the boundary, project the
    image itself onto that plane inside the box, and find the boundary between the projection and the image (where the
    projection is across) or the last point across. The idea of SuperDeepFool (Abdollahpour et al., arXiv:2303.12481), whose
    projection is for L2 without a box, and of FAB (Croce & Hein, arXiv:1907.02044, eq. 7 and its backward step), which also
    projects for other norms."""
    own = {"first_candidates": None, "candidates": 3, "refine_steps": None, "rough": False}
    start = deepfool(model, x, y, ball=ball, box=box, **{**settings, **own})
    rows = start.converged.nonzero().squeeze(1)
    image, labels = x[rows], y[rows]
    gap_image = -cw_margin(start.logits[rows], labels)
    across = start.x_adv[rows]
    found = narrow(model, Segment(image, gap_image, across, gap_at(model, across, labels)), labels, search_steps)
    best, length = found.there, ball.norm(found.root() - image)
    for _ in range(num_steps if len(rows) else 0):
        z = torch.lerp(image, found.there, BACKWARD)
        plane = nearest_hyperplane(model, z, labels, ball, candidates=1, scale=None)
        gap = plane.gap + (plane.grad * (image - z)).flatten(1).sum(dim=1)  # of the plane, at the image
        step = step_in_box(gap, plane.grad, image, ball) if box else step_onto(gap, plane.grad, ball)
        projected = image + step
        gap_projected = gap_at(model, projected, labels)
        crossed = torch.sign(gap_projected) != torch.sign(gap_image)
        segment = Segment(
            torch.where(per_sample(crossed, x), image, projected),
            torch.where(crossed, gap_image, gap_projected),
            torch.where(per_sample(crossed, x), projected, found.there),
            torch.where(crossed, gap_projected, found.gap_there),
        )
        found = narrow(model, segment, labels, search_steps)
        reached = ball.norm(found.root() - image)
        nearer = reached < length
        best, length = torch.where(per_sample(nearer, x), found.there, best), torch.where(nearer, reached, length)
    margin, x_adv = start.margin.clone(), start.x_adv.clone()
    margin[rows], x_adv[rows] = torch.sign(gap_image) * length, best
    return replace(start, margin=margin, x_adv=x_adv)


@torch.no_grad()
def gap_at(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """f_y - max other f (B,)."""
    return -cw_margin(model(x), y)
