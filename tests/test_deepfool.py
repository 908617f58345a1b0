import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize
from torch import Tensor, nn

from pipeline.balls import BALLS, Ball
from pipeline.deepfool import deepfool
from pipeline.hyperplanes import class_scale, gradient_scale, rank_classes, step_in_box
from pipeline.models.inference import FEW_CLASSES, inference_copy
from tests.conftest import untrained

both = pytest.mark.parametrize("ball", BALLS.values(), ids=BALLS)


class Affine(nn.Module):
    """f(x) = W x + b on flattened images, in float64."""

    def __init__(self, num_classes: int, dimension: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(num_classes, dimension, dtype=torch.float64, generator=generator))
        self.bias = nn.Parameter(torch.randn(num_classes, dtype=torch.float64, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T + self.bias


def exact_margin(model: Affine, x: Tensor, y: Tensor, ball: Ball) -> Tensor:
    """min over k != y of (f_y - f_k) / ||w_y - w_k||_dual."""
    f = model(x).detach()
    order = {"linf": 1, "l2": 2}[ball.name]
    distances = []
    for k in range(f.shape[1]):
        difference = model.weight[y].detach() - model.weight[k].detach()
        distance = (f.gather(1, y[:, None])[:, 0] - f[:, k]) / torch.linalg.vector_norm(difference, ord=order, dim=1)
        distances.append(torch.where(y == k, torch.inf, distance))
    return torch.stack(distances).amin(dim=0)


@both
@pytest.mark.parametrize("num_classes", [2, 3, 10, 100])
def test_correct_samples_of_an_affine_classifier_have_the_exact_margin_after_one_iteration(
    ball: Ball, num_classes: int
) -> None:
    model = Affine(num_classes, 48, seed=num_classes).eval()
    x = torch.rand(64, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(dim=1)
    result = deepfool(model, x, y, ball=ball, box=False, first_candidates=None)
    truth = exact_margin(model, x, y, ball)
    torch.testing.assert_close(result.margin, truth, rtol=1e-9, atol=1e-9)
    assert bool(result.converged.all())
    assert result.iterations.unique().tolist() == [1]
    assert torch.equal(result.nearest, model(result.x_adv).argmax(dim=1))
    plain = deepfool(model, x, y, ball=ball, box=False, first_candidates=None, refine_steps=None)
    torch.testing.assert_close(plain.margin, truth, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ball.norm(plain.x_adv - x), 1.02 * truth)


@both
def test_a_sample_across_one_boundary_has_minus_its_distance_to_it(ball: Ball) -> None:
    model = Affine(2, 48, seed=2).eval()
    x = torch.rand(64, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wrong = 1 - model(x).argmax(dim=1)
    result = deepfool(model, x, wrong, ball=ball, box=False)
    torch.testing.assert_close(result.margin, exact_margin(model, x, wrong, ball), rtol=1e-9, atol=1e-9)
    assert bool((result.margin < 0).all())
    assert torch.equal(result.nearest, 1 - wrong)


@both
def test_the_way_back_past_many_boundaries_is_at_least_the_farthest_and_ends_in_the_class(ball: Ball) -> None:
    model = Affine(10, 48, seed=3).eval()
    x = torch.rand(64, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wrong = model(x).argsort(dim=1)[:, 5]
    result = deepfool(model, x, wrong, ball=ball, box=False, candidates=9)
    assert bool(result.converged.all())
    assert bool((result.margin <= exact_margin(model, x, wrong, ball) + 1e-9).all())
    assert torch.equal(model(result.x_adv).argmax(dim=1), wrong)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), name=st.sampled_from(["linf", "l2"]), reach=st.floats(0.05, 0.95))
def test_the_step_in_the_box_is_the_shortest_that_scipy_finds(seed: int, name: str, reach: float) -> None:
    rng = np.random.default_rng(seed)
    grad, z = rng.normal(size=6), rng.choice([0.0, 0.1, 0.5, 0.9, 1.0], size=6)
    capacity = np.where(grad > 0, grad * z, -grad * (1 - z)).sum()
    gap = reach * capacity  # reachable by lowering the function inside the box
    if capacity < 1e-6:
        return
    gaps, grads, points = (torch.tensor(value, dtype=torch.float64)[None] for value in (gap, grad, z))
    step = step_in_box(gaps, grads, points, BALLS["linf" if name == "linf" else "l2"])[0].numpy()
    assert np.all((z + step >= -1e-12) & (z + step <= 1 + 1e-12))
    np.testing.assert_allclose(grad @ step, -gap, atol=1e-9)
    bounds = [(-v, 1 - v) for v in z]
    if name == "linf":
        cost = np.r_[np.zeros(6), 1]
        above, below = np.c_[np.eye(6), -np.ones(6)], np.c_[-np.eye(6), -np.ones(6)]
        best = linprog(cost, np.r_[above, below], np.zeros(12), np.r_[grad, 0][None], [-gap], [*bounds, (0, None)]).x
        assert best is not None
        np.testing.assert_allclose(np.abs(step).max(), best[-1], atol=1e-7)
    else:
        constraint = {"type": "eq", "fun": lambda r: grad @ r + gap, "jac": lambda _: grad}
        squared = minimize(lambda r: r @ r, step * 0.9, jac=lambda r: 2 * r, bounds=bounds, constraints=constraint, tol=1e-14)  # type: ignore[call-overload]
        assert np.linalg.norm(step) <= np.linalg.norm(squared.x) + 1e-6


@both
def test_images_at_the_edge_of_the_box_converge_and_stay_in_it(ball: Ball) -> None:
    model = untrained()
    x = (torch.rand(128, 1, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    y = model(x).argmax(dim=1)
    result = deepfool(model, x, y, ball=ball)
    assert result.converged.float().mean() > 0.95
    assert 0 <= result.x_adv.min()
    assert result.x_adv.max() <= 1
    crossed = model(result.x_adv).argmax(dim=1) != y
    assert torch.equal(crossed, result.converged)


@both
def test_refined_margins_are_never_longer_than_the_point_found_across(ball: Ball) -> None:
    model = untrained()
    x = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = model(x).argmax(dim=1)
    result = deepfool(model, x, y, ball=ball)
    assert bool((result.margin <= ball.norm(result.x_adv - x) + 1e-6)[result.converged].all())


def test_signs_follow_the_prediction_and_rows_do_not_depend_on_their_neighbours() -> None:
    model = untrained().double()
    x = torch.rand(32, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(32) % 10
    whole = deepfool(model, x, y, ball=BALLS["l2"])
    finite = whole.converged
    assert torch.equal((whole.margin > 0)[finite], (whole.logits.argmax(dim=1) == y)[finite])
    parts = [deepfool(model, x[i : i + 5], y[i : i + 5], ball=BALLS["l2"]).margin for i in range(0, 32, 5)]
    torch.testing.assert_close(torch.cat(parts), whole.margin, rtol=1e-9, atol=1e-12, equal_nan=True)


@both
def test_every_misclassified_sample_finds_its_way_back_between_two_boundaries(ball: Ball) -> None:
    """Two half-spaces at an acute angle: steps onto one leave the other, and steps of 2 % beyond each never end."""
    model = Affine(3, 48, seed=0).eval()
    with torch.no_grad():
        noise = torch.randn(48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        model.weight[1] = -0.6 * model.weight[2] + 0.8 * noise
        model.weight[0], model.bias[:] = 0, torch.tensor([0.0, 0.5, 0.5])
    x = torch.rand(64, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = x[model(x).argmax(dim=1) != 0]
    result = deepfool(model, x, torch.zeros(len(x), dtype=torch.int64), ball=ball, box=False)
    assert bool(result.converged.all())
    assert bool((result.iterations > 2).any())
    assert not model(result.x_adv).argmax(dim=1).any()


@both
@pytest.mark.parametrize("bf16", [False, True])
def test_a_float32_margin_is_the_same_to_the_last_bit_whatever_the_batch_and_the_order(ball: Ball, bf16: bool) -> None:
    model = inference_copy(untrained(), bf16=bf16)
    x = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.where(torch.arange(64) % 4 > 0, model(x).argmax(dim=1), torch.arange(64) % 10)
    whole = deepfool(model, x, y, ball=ball).margin
    assert whole.isfinite().float().mean() > 0.7
    for size in (1, 7, 32):
        pieces = [deepfool(model, a, b, ball=ball).margin for a, b in zip(x.split(size), y.split(size), strict=True)]
        torch.testing.assert_close(torch.cat(pieces), whole, rtol=0, atol=0, equal_nan=True)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2))
    shuffled = deepfool(model, x[order], y[order], ball=ball).margin
    torch.testing.assert_close(shuffled, whole[order], rtol=0, atol=0, equal_nan=True)


@both
def test_a_sample_on_the_boundary_has_margin_zero(ball: Ball) -> None:
    model = Affine(3, 48, seed=0).eval()
    with torch.no_grad():
        model.weight[1], model.bias[1] = model.weight[0], model.bias[0]
        model.bias[2] = -100
    x = torch.rand(8, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for label in (0, 1):  # the one that argmax takes, and the other
        result = deepfool(model, x, torch.full((8,), label), ball=ball, first_candidates=None)
        assert bool(result.converged.all())
        assert result.margin.tolist() == [0.0] * 8
        assert result.nearest.tolist() == [1 - label] * 8


@both
def test_the_margin_ends_where_the_first_class_crosses_though_another_was_foretold(ball: Ball) -> None:
    model = Affine(3, 48, seed=0).eval()
    with torch.no_grad():  # at x = 0.5: class 1 is ahead by logit (gap 1, slope 1), class 2 by distance (1.05, slope 2)
        model.weight[:] = 0
        model.weight[1, 0], model.weight[2, 0] = 1, 2
        model.bias[:] = torch.tensor([0, -1.5, -2.05])
    x, y = torch.full((4, 3, 4, 4), 0.5, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    result = deepfool(model, x, y, ball=ball, box=False, first_candidates=1)
    assert result.nearest.tolist() == [2] * 4
    torch.testing.assert_close(result.margin, exact_margin(model, x, y, ball))
    torch.testing.assert_close(result.margin, torch.full_like(result.margin, 0.525))


@both
def test_images_outside_of_the_box_are_refused(ball: Ball) -> None:
    x = torch.full((2, 1, 8, 8), 1.5)
    with pytest.raises(ValueError, match=r"needs x in \[0, 1\], got \[1.5, 1.5\]"):
        deepfool(untrained(), x, torch.zeros(2, dtype=torch.int64), ball=ball)


@both
def test_the_way_back_of_a_misclassified_sample_is_not_much_longer_than_the_shortest(ball: Ball) -> None:
    """Steps onto one hyperplane after the other, against the exact distance by linear or quadratic programming."""
    model = Affine(4, 12, seed=6).eval()
    x = torch.rand(40, 1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wrong = model(x).argsort(dim=1)[:, 1]  # of true rank 3
    result = deepfool(model, x, wrong, ball=ball, box=False, first_candidates=None, candidates=None)
    weight, bias = model.weight.detach().numpy(), model.bias.detach().numpy()
    ratios = []
    for image, label, margin in zip(x.flatten(1).numpy(), wrong.tolist(), result.margin.tolist(), strict=True):
        others = [k for k in range(4) if k != label]
        slope, need = weight[others] - weight[label], (bias[label] - bias[others]) - (weight[others] - weight[label]) @ image
        if ball.name == "linf":
            above, below = np.c_[np.eye(12), -np.ones(12)], np.c_[-np.eye(12), -np.ones(12)]
            rows = np.r_[np.c_[slope, np.zeros(3)], above, below]
            exact = linprog(np.r_[np.zeros(12), 1], rows, np.r_[need, np.zeros(24)], bounds=[(None, None)] * 13).fun
        else:
            constraint = {"type": "ineq", "fun": lambda d, s=slope, n=need: n - s @ d}
            exact = np.sqrt(minimize(lambda d: d @ d, np.zeros(12), constraints=constraint, tol=1e-12).fun)  # type: ignore[call-overload]
        ratios.append(-margin / exact)
    assert min(ratios) >= 1 - 1e-5
    assert np.median(ratios) <= {"linf": 1.3, "l2": 1.05}[ball.name]
    assert max(ratios) <= {"linf": 1.7, "l2": 1.2}[ball.name]


@both
def test_margins_of_few_candidates_are_never_shorter_in_an_affine_model_and_rank_alike(ball: Ball) -> None:
    model = Affine(10, 48, seed=4).eval()
    x = torch.rand(256, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(dim=1)
    truth = exact_margin(model, x, y, ball)
    excess = [deepfool(model, x, y, ball=ball, box=False, first_candidates=count).margin - truth for count in (1, 2, 4, 9)]
    assert all(bool((e >= -1e-9).all()) for e in excess)
    assert [e.mean().item() for e in excess] == sorted([e.mean().item() for e in excess], reverse=True)
    assert excess[-1].abs().max() < 1e-9


def test_classes_are_ranked_by_gap_over_the_distance_of_their_weights() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 3)

    head = Head()
    with torch.no_grad():
        head.fc.weight[:] = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
    scale = class_scale(head)
    assert scale is not None
    torch.testing.assert_close(scale[0], torch.tensor([0.0, 5.0, 1.0]))
    logits, y = torch.tensor([[3.0, 1.0, 2.5], [3.0, 1.0, 2.5]]), torch.tensor([0, 0])  # gaps 2 and 0.5
    assert rank_classes(logits, y, None, scale).tolist() == [[1, 2], [1, 2]]  # 2 / 5 before 0.5 / 1
    assert rank_classes(logits, y, 1, None).tolist() == [[2], [2]]
    assert class_scale(nn.Flatten()) is None
    assert (found := class_scale(inference_copy(head, bf16=True))) is not None
    assert torch.equal(found, scale)  # of the float32 weights


@both
def test_the_gradients_foretell_the_exact_norms_of_an_affine_model(ball: Ball) -> None:
    model = Affine(5, 48, seed=0).eval()
    x = torch.rand(20, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    differences = (model.weight[:, None] - model.weight[None]).detach()
    exact = torch.linalg.vector_norm(differences, ord={"linf": 1, "l2": 2}[ball.name], dim=2)
    torch.testing.assert_close(gradient_scale(model, x, ball), exact)


def test_a_sample_that_does_not_converge_has_no_number() -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([[1.0, 0.0]]).repeat(len(x), 1) + 0 * x.flatten(1).sum(dim=1, keepdim=True)

    result = deepfool(Constant().eval(), torch.full((3, 1, 2, 2), 0.5), torch.zeros(3, dtype=torch.int64), ball=BALLS["l2"])
    assert not result.converged.any()
    assert bool(result.margin.isnan().all())
    assert result.nearest.tolist() == [-1, -1, -1]


def test_the_model_is_left_as_it_was() -> None:
    model = untrained()
    before = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    deepfool(model, torch.rand(4, 1, 8, 8), torch.arange(4), ball=BALLS["linf"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


def test_training_mode_and_broken_models_are_refused() -> None:
    x, y = torch.rand(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="eval mode"):
        deepfool(untrained().train(), x, y, ball=BALLS["l2"])
    broken = untrained()
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="finite logits"):
        deepfool(broken, x, y, ball=BALLS["l2"])


@both
def test_a_boundary_that_is_a_parabola_along_the_step_is_found_without_another_pass(ball: Ball) -> None:
    """f_0 - f_1 = 1 - u - bend u^2 with u the sum of the pixels less that of the image: curved by up to 10 % of the step."""

    class Curved(nn.Module):
        bend = 0.05

        def forward(self, x: Tensor) -> Tensor:
            u = (x - 0.5).flatten(1).sum(dim=1)
            return torch.stack([1 - u - self.bend * u.square(), torch.zeros_like(u)], dim=1)

    x, y = torch.full((2, 1, 4, 4), 0.5, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    for bend in (0.05, -0.01):
        model = Curved().eval()
        model.bend = bend
        found = deepfool(model, x, y, ball=ball, refine_steps=0)
        u = (np.sqrt(1 + 4 * bend) - 1) / (2 * bend)
        truth = torch.full((2,), u / {"linf": 16, "l2": 4}[ball.name], dtype=torch.float64)
        assert found.iterations.tolist() == [1, 1]
        torch.testing.assert_close(found.margin, truth, rtol=1e-12, atol=0)


@both
@pytest.mark.parametrize("num_classes", [2, 3, 8, 10])
def test_rough_logits_change_no_sign_and_margins_by_their_rounding(ball: Ball, num_classes: int) -> None:
    model = untrained(num_classes=num_classes)
    x = torch.rand(256, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.where(torch.arange(256) % 4 > 0, model(x).argmax(dim=1), torch.arange(256) % num_classes)
    exact, mixed = (deepfool(inference_copy(model, bf16=bf16), x, y, ball=ball) for bf16 in (False, True))
    assert torch.equal(mixed.logits, exact.logits) == (num_classes < FEW_CLASSES)
    assert torch.equal(mixed.logits.argmax(dim=1), exact.logits.argmax(dim=1))
    both_converged = exact.converged & mixed.converged
    assert both_converged.float().mean() > 0.8
    assert torch.equal((exact.margin > 0)[both_converged], (mixed.margin > 0)[both_converged])
    assert ((mixed.margin / exact.margin - 1).abs()[both_converged]).median() < 0.01
