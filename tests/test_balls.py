import numpy as np
import pytest
import torch

from pipeline.balls import BALLS, Ball, norm_l2, project_l2, project_linf
from pipeline.threat import ThreatParams

both = pytest.mark.parametrize("ball", BALLS.values(), ids=BALLS)


@both
def test_projection_leaves_points_inside_moves_points_outside_onto_the_sphere_and_is_idempotent(ball: Ball) -> None:
    delta = torch.randn(64, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    eps = ball.norm(delta) * torch.tensor([0.5, 1.0, 2.0, 0.0], dtype=torch.float64).repeat(16)
    projected = ball.project(delta, eps)
    inside = eps >= ball.norm(delta)
    torch.testing.assert_close(projected[inside], delta[inside])
    torch.testing.assert_close(ball.norm(projected)[~inside], eps[~inside])
    torch.testing.assert_close(ball.project(projected, eps), projected)


def test_projections_equal_the_hand_worked_case() -> None:
    delta = torch.tensor([[3.0, -4.0]])
    torch.testing.assert_close(project_l2(delta, torch.tensor([1.0])), torch.tensor([[0.6, -0.8]]))
    torch.testing.assert_close(project_linf(delta, torch.tensor([3.5])), torch.tensor([[3.0, -3.5]]))
    assert torch.equal(project_l2(torch.zeros(1, 2), torch.tensor([0.0])), torch.zeros(1, 2))


@both
def test_ascent_is_a_unit_vector_whose_product_with_the_gradient_is_the_dual_norm(ball: Ball) -> None:
    grad = torch.randn(8, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    direction = ball.ascend(grad)
    torch.testing.assert_close(ball.norm(direction), torch.ones(8, dtype=torch.float64))
    torch.testing.assert_close((grad * direction).flatten(1).sum(dim=1), ball.dual_norm(grad))
    assert torch.equal(ball.ascend(torch.zeros_like(grad)), torch.zeros_like(grad))


@both
def test_uniform_samples_fill_the_unit_ball_evenly(ball: Ball) -> None:
    samples = ball.uniform(torch.empty(20_000, 3, dtype=torch.float64), torch.Generator().manual_seed(0))
    norms = ball.norm(samples).numpy()
    assert norms.max() <= 1
    # The share of a ball of dimension 3 within radius r is r^3, in any norm.
    for radius in (0.5, 0.8, 0.95):
        share = radius**3
        assert abs((norms < radius).mean() - share) < 4 * np.sqrt(share * (1 - share) / 20_000)


def test_eps_is_exact_and_named_as_a_fraction() -> None:
    threat = ThreatParams(norm="linf", eps_255=8)
    assert threat.eps == 8 / 255
    assert threat.exact == "8/255"
    assert norm_l2(torch.tensor([[3.0, 4.0]])).item() == 5
