"""Where a segment crosses the decision boundary."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.balls import per_sample
from pipeline.losses import cw_margin


@dataclass(frozen=True)
class Segment:
    """From points `here` (B, ...) to points `there`, where the gap f_y - max other f has opposite signs: `gap_here` and
    `gap_there` (B,)."""

    here: Tensor
    gap_here: Tensor
    there: Tensor
    gap_there: Tensor

    def rows(self, chosen: Tensor) -> "Segment":
        """Some of the segments, by index."""
        return Segment(self.here[chosen], self.gap_here[chosen], self.there[chosen], self.gap_there[chosen])

    def at(self, share: Tensor) -> Tensor:
        """The points (B, ...) at a share (B,) of the way."""
        return self.here + per_sample(share, self.here) * (self.there - self.here)

    def root(self) -> Tensor:
        """The points (B, ...) where the gap is zero if it changes linearly."""
        return self.at(share_of_root(self.gap_here, self.gap_there))


def share_of_root(gap_here: Tensor, gap_there: Tensor, slope: Tensor | None = None) -> Tensor:
    """The share (B,) of the way at which a gap of opposite signs at the ends is zero, if it changes linearly, or else as the
    parabola of `slope` (B,), which points to zero and is per whole way, at the beginning."""
    if slope is None:
        slope = gap_there - gap_here
    root = (slope.square() - 4 * (gap_there - gap_here - slope) * gap_here).clamp_min(0).sqrt()
    return torch.nan_to_num(2 * gap_here / (torch.sign(gap_here) * root - slope), nan=1.0).clamp(0, 1)


@torch.no_grad()
def narrow(model: nn.Module, segment: Segment, y: Tensor, num_steps: int) -> Segment:
    """The part of each segment that still crosses the boundary after num_steps of the Illinois method, one forward pass
    each: false position, where the gap of an end that stays twice or more counts half each time."""
    low, high = torch.zeros_like(segment.gap_here), torch.ones_like(segment.gap_here)
    gap_low, gap_high = segment.gap_here, segment.gap_there
    weight_low, weight_high, side = torch.ones_like(low), torch.ones_like(low), torch.zeros_like(low)
    for _ in range(num_steps if len(y) else 0):
        share = low + (high - low) * share_of_root(weight_low * gap_low, weight_high * gap_high)
        gap = -cw_margin(model(segment.at(share)), y)
        crossed = torch.sign(gap) == torch.sign(gap_high)
        low, gap_low = torch.where(crossed, low, share), torch.where(crossed, gap_low, gap)
        high, gap_high = torch.where(crossed, share, high), torch.where(crossed, gap, gap_high)
        weight_low = torch.where(crossed, torch.where(side == 1, weight_low / 2, weight_low), 1)
        weight_high = torch.where(crossed, 1, torch.where(side == -1, weight_high / 2, weight_high))
        side = torch.where(crossed, 1.0, -1.0).to(side.dtype)
    return Segment(segment.at(low), gap_low, segment.at(high), gap_high)
