"""Along a segment, the boundary is found where arithmetic says that it is."""

import torch
from torch import Tensor, nn

from pipeline.balls import BALLS
from pipeline.deepfool import deepfool
from pipeline.losses import cw_margin
from pipeline.segments import Segment, narrow, share_of_root
from tests.conftest import untrained


class Cubic(nn.Module):
    """Two classes; f_0 - f_1 = 0.3^3 - t^3 at the first pixel t, so that the boundary is at t = 0.3."""

    def forward(self, x: Tensor) -> Tensor:
        t = x.flatten(1)[:, 0]
        return torch.stack([0.3**3 - t**3, torch.zeros_like(t)], dim=1)


def cubic_segment() -> tuple[Segment, Tensor]:
    here, there, y = torch.zeros(3, 1, 1, 1, dtype=torch.float64), torch.zeros(3, 1, 1, 1, dtype=torch.float64), torch.zeros(3)
    there[:, 0, 0, 0] = torch.tensor([0.4, 0.7, 1.0])
    gaps = (-cw_margin(Cubic()(z), y.long()) for z in (here, there))
    return Segment(here, next(gaps), there, next(gaps)), y.long()


def test_without_a_forward_pass_the_root_is_that_of_the_chord() -> None:
    segment, y = cubic_segment()
    ends = segment.there[:, 0, 0, 0]
    torch.testing.assert_close(narrow(Cubic(), segment, y, 0).root()[:, 0, 0, 0], 0.3**3 / ends**2)


def test_the_root_of_a_parabola_of_which_the_slope_at_the_beginning_is_known() -> None:
    """f(t) = here + slope t + bend t^2, upwards and downwards, curved either way, and straight."""
    here, slope, bend = torch.tensor(
        [[1.0, -1.5, 0.2], [1, -0.5, -1], [-1, 1.5, -0.2], [-1, 0.5, 1], [1, -2, 0]], dtype=torch.float64
    ).T
    share = share_of_root(here, here + slope + bend, slope)
    assert (here + slope * share + bend * share.square()).abs().max() < 1e-12
    assert bool(((share > 0) & (share < 1)).all())
    nothing = torch.zeros(1, dtype=torch.float64)
    assert share_of_root(nothing, nothing, nothing).item() == 1  # a sample on the boundary


def test_forward_passes_bring_the_root_of_a_cubic_to_its_place() -> None:
    segment, y = cubic_segment()
    errors = [(narrow(Cubic(), segment, y, steps).root()[:, 0, 0, 0] - 0.3).abs().max().item() for steps in (0, 3, 6, 12, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-9


def test_the_ends_stay_on_their_sides_and_no_segment_grows() -> None:
    model = untrained().double()
    x = torch.rand(64, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = model(x).argmax(dim=1)
    other = x + 3 * (deepfool(model, x, y, ball=BALLS["l2"]).x_adv - x)
    with torch.no_grad():
        apart = model(other).argmax(dim=1) != y
        here, there, labels = x[apart], other[apart], y[apart]
        segment = Segment(here, -cw_margin(model(here), labels), there, -cw_margin(model(there), labels))
        assert len(labels) > 10
        for steps in (1, 5):
            short = narrow(model, segment, labels, steps)
            torch.testing.assert_close(short.gap_here, -cw_margin(model(short.here), labels))
            torch.testing.assert_close(short.gap_there, -cw_margin(model(short.there), labels))
            assert bool((short.gap_here >= 0).all())
            assert bool((short.gap_there <= 0).all())
            lengths = ((s.there - s.here).flatten(1).norm(dim=1) for s in (short, segment))
            assert bool((next(lengths) <= next(lengths) + 1e-12).all())
