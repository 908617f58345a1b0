import pytest
import torch
from torch import Tensor

from pipeline.attacks import pgd
from pipeline.balls import BALLS, Ball

EPS = torch.tensor([0.0, 0.01, 0.05, 0.05], dtype=torch.float64)


def linear(seed: int = 0) -> Tensor:
    return torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("ball", BALLS.values(), ids=BALLS)
def test_pgd_reaches_the_exact_worst_case_of_a_linear_model_for_every_radius(ball: Ball) -> None:
    w = linear()
    x = torch.full((4, 12), 0.5, dtype=torch.float64)
    x_adv = pgd(lambda z: -(z @ w), x, ball=ball, eps=EPS, step_size=EPS, num_steps=3)
    dual = {"linf": w.abs().sum(), "l2": w.norm()}[ball.name]
    torch.testing.assert_close(x_adv @ w, x @ w - EPS * dual)


@pytest.mark.parametrize("ball", BALLS.values(), ids=BALLS)
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_every_sample_stays_in_its_own_ball_and_in_the_box_and_eps_0_gives_exactly_x(ball: Ball, num_steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(4, 3, 5, 5, dtype=torch.float64, generator=generator).round(decimals=1)  # some pixels at 0 and at 1
    w = torch.randn(75, dtype=torch.float64, generator=generator)
    start = ball.uniform(x, generator)
    x_adv = pgd(lambda z: (z.flatten(1) @ w).sin(), x, ball=ball, eps=EPS, step_size=EPS / 2, num_steps=num_steps, start=start)
    assert torch.equal(x_adv[0], x[0])
    assert bool((ball.norm(x_adv - x) <= EPS * (1 + 1e-9)).all())
    assert 0 <= x_adv.min()
    assert x_adv.max() <= 1


def test_where_the_box_binds_pgd_reaches_the_best_point_of_ball_and_box() -> None:
    w = torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)
    x = torch.tensor([[0.99, 0.5, 0.0]], dtype=torch.float64)
    eps = torch.tensor([0.1], dtype=torch.float64)
    x_adv = pgd(lambda z: z @ w, x, ball=BALLS["linf"], eps=eps, step_size=eps, num_steps=2)
    torch.testing.assert_close(x_adv, torch.tensor([[1.0, 0.4, 0.1]], dtype=torch.float64))


def test_more_steps_are_not_worse_on_a_concave_loss() -> None:
    x = torch.full((1, 12), 0.5, dtype=torch.float64)
    target = torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    eps = torch.tensor([0.2], dtype=torch.float64)

    def loss(z: Tensor) -> Tensor:
        return -(z - target).square().sum(dim=1)

    values = [loss(pgd(loss, x, ball=BALLS["l2"], eps=eps, step_size=eps / 10, num_steps=n)).item() for n in (1, 5, 10, 20)]
    assert values == sorted(values)


def test_the_same_seed_gives_the_same_start_and_an_empty_batch_is_no_error() -> None:
    x = torch.full((2, 4), 0.5)
    eps = torch.tensor([0.1, 0.1])

    def attack(seed: int) -> Tensor:
        start = BALLS["l2"].uniform(x, torch.Generator().manual_seed(seed))
        return pgd(lambda z: z.sum(dim=1) * 0, x, ball=BALLS["l2"], eps=eps, step_size=eps, num_steps=1, start=start)

    assert torch.equal(attack(5), attack(5))
    assert not torch.equal(attack(5), attack(6))
    empty = pgd(lambda z: z.sum(dim=1), x[:0], ball=BALLS["linf"], eps=eps[:0], step_size=eps[:0], num_steps=1)
    assert empty.shape == (0, 4)


def test_images_outside_the_unit_box_and_negative_radii_are_refused() -> None:
    x = torch.full((2, 4), 0.5)
    eps = torch.tensor([0.1, 0.1])
    with pytest.raises(ValueError, match=r"x in \[0, 1\], got \[-2, 0.5\]; normalise inside the model"):
        pgd(lambda z: z.sum(dim=1), torch.where(x > 0, x, x).index_fill(0, torch.tensor(0), -2), ball=BALLS["linf"], eps=eps,
            step_size=eps, num_steps=1)  # fmt: skip
    with pytest.raises(ValueError, match="one eps >= 0 per sample"):
        pgd(lambda z: z.sum(dim=1), x, ball=BALLS["linf"], eps=-eps, step_size=eps, num_steps=1)
