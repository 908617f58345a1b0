"""The tight estimate against closed forms and against FAB."""

import pytest
import torch
from pyautoattack.fab_pt import FABAttack_PT

from pipeline.balls import BALLS, Ball
from pipeline.deepfool import deepfool
from pipeline.tight import gap_at, tight
from tests.conftest import digits, untrained
from tests.test_deepfool import Affine, exact_margin

both = pytest.mark.parametrize("ball", BALLS.values(), ids=BALLS)


@both
def test_the_margins_of_an_affine_classifier_are_exact(ball: Ball) -> None:
    model = Affine(10, 48, seed=3).eval()
    x = torch.rand(64, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(dim=1)
    result = tight(model, x, y, ball=ball, box=False, first_candidates=None)
    torch.testing.assert_close(result.margin, exact_margin(model, x, y, ball), rtol=1e-9, atol=1e-9)


@both
def test_a_tight_margin_is_never_longer_than_deepfools_points_and_ends_beside_a_point_across(ball: Ball) -> None:
    model = untrained().double()
    x = torch.rand(64, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(64) % 10
    plain, closer = deepfool(model, x, y, ball=ball), tight(model, x, y, ball=ball)
    known = plain.converged
    assert torch.equal(known, closer.converged)
    assert bool((closer.margin.abs() <= ball.norm(plain.x_adv - x) + 1e-9)[known].all())
    assert bool((closer.margin.abs() <= ball.norm(closer.x_adv - x) + 1e-12)[known].all())
    assert (closer.margin.abs() / ball.norm(closer.x_adv - x))[known].median() > 0.99
    assert bool(((closer.x_adv >= -1e-12) & (closer.x_adv <= 1 + 1e-12)).all())
    clean_sign = torch.sign(gap_at(model, x, y))
    assert bool((torch.sign(gap_at(model, closer.x_adv, y)) != clean_sign)[known].all())
    assert torch.equal(torch.sign(closer.margin)[known], clean_sign[known])


@both
def test_the_median_is_within_two_percent_of_fab_with_100_steps(ball: Ball) -> None:
    model = untrained()
    images, _ = digits("train", 24)
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    y = model(x).argmax(dim=1)
    norm = {"linf": "Linf", "l2": "L2"}[ball.name]
    fab = FABAttack_PT(model, norm=norm, n_restarts=1, n_iter=100, eps=1e3, device=torch.device("cpu"))
    found = fab.perturb(x, y).detach()
    closer = tight(model, x, y, ball=ball, first_candidates=None)
    assert bool((gap_at(model, found, y) < 0).all())
    assert closer.margin.median() <= 1.02 * ball.norm(found - x).median()
