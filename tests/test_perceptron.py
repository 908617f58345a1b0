"""The perceptron against Monte Carlo, other solvers and hand-worked cases."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import integrate, optimize, stats

from pipeline.params import InputError
from pipeline.perceptron import (
    RULES,
    Point,
    Share,
    accuracies,
    adversarial_loss,
    allowed_eps,
    choose,
    clean_accuracy,
    exact_share,
    learning_curves,
    measure_shares,
    robust_accuracy,
    settings,
    teacher_and_probe,
    train_student,
)
from pipeline.perceptron_conclusions import compare, compare_with_none, conclude, find_winners
from stages.perceptron import main

SMALL = """
perceptron:
  dimension: 5
  eps: 0.5
  fractions: [0.25, 0.5]
  alphas: [2, 4]
  num_seeds: 3
  num_examples: 4000
  weight_decay: 1e-3
  probe_angle_deg: 0.0
  seed: 0
"""


@pytest.mark.parametrize("eps", [0.1, 0.5, 1.5])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_exact_shares_equal_the_integral_of_the_half_normal(eps: float, fraction: float) -> None:
    kept = {
        "none": (0, np.inf),
        "prune_easy": (0, stats.halfnorm.ppf(1 - fraction)),
        "prune_hard": (stats.halfnorm.ppf(fraction), np.inf),
    }
    for name, (low, high) in kept.items():
        crossing = max(0.0, stats.halfnorm.cdf(min(eps, high)) - stats.halfnorm.cdf(low))
        mass = stats.halfnorm.cdf(high) - stats.halfnorm.cdf(low)
        assert exact_share(RULES[name], fraction, eps) == pytest.approx(crossing / mass, abs=1e-12)
    assert exact_share(RULES["puma"], fraction, eps) == 0


def test_monte_carlo_shares_lie_within_four_standard_errors_of_the_exact_ones() -> None:
    shares = measure_shares(np.random.default_rng(1), dimension=7, eps=0.5, fractions=(0.2, 0.5), num_examples=40_000)
    assert [(share.rule, share.fraction) for share in shares] == list(settings((0.2, 0.5)))
    for share in shares:
        assert abs(share.monte_carlo - share.exact) <= 4 * share.standard_error


def test_too_few_samples_for_the_shares_are_an_input_error() -> None:
    with pytest.raises(InputError, match="too few"):
        measure_shares(np.random.default_rng(0), dimension=2, eps=0.5, fractions=(0.999,), num_examples=3)


@pytest.mark.parametrize(("overlap", "eps"), [(0.0, 0.3), (0.6, 0.5), (0.95, 0.0), (-0.4, 0.7), (0.999, 1.0)])
def test_robust_accuracy_equals_the_integral_over_the_bivariate_normal(overlap: float, eps: float) -> None:
    sine = np.sqrt(1 - overlap**2)
    value, _ = integrate.quad(lambda s: 2 * stats.norm.pdf(s) * stats.norm.cdf(overlap / sine * s), eps, np.inf)
    assert robust_accuracy(overlap, eps) == pytest.approx(value, abs=1e-8)


def test_accuracies_agree_with_drawn_samples_and_an_explicit_worst_case() -> None:
    rng = np.random.default_rng(0)
    teacher, w = teacher_and_probe(rng, 6, 35)
    x = rng.standard_normal((200_000, 6))
    y = np.sign(x @ teacher)
    worst = x - 0.4 * y[:, None] * w / np.linalg.norm(w)
    clean, robust = accuracies(3 * w, teacher, 0.4)
    assert clean == pytest.approx((y * (x @ w) > 0).mean(), abs=0.004)
    assert robust == pytest.approx((y * (worst @ w) > 0).mean(), abs=0.004)


def test_accuracies_have_their_known_limits() -> None:
    assert robust_accuracy(1.0, 0.5) == pytest.approx(1 - exact_share(RULES["none"], 0, 0.5))
    assert robust_accuracy(0.3, 0.0) == pytest.approx(clean_accuracy(0.3))
    assert clean_accuracy(0.0) == 0.5
    assert robust_accuracy(-1.0, 0.5) == pytest.approx(0)


def test_a_collapsed_student_scores_one_half() -> None:
    assert accuracies(np.zeros(3), np.array([1.0, 0, 0]), 0.5) == (0.5, 0.5)


def test_the_gradient_of_the_loss_matches_finite_differences() -> None:
    rng = np.random.default_rng(0)
    z, eps, w = rng.standard_normal((9, 4)), rng.random(9), rng.standard_normal(4)
    steps = 1e-6 * np.eye(4)
    found = [(adversarial_loss(w + s, z, eps, 0.1)[0] - adversarial_loss(w - s, z, eps, 0.1)[0]) / 2e-6 for s in steps]
    np.testing.assert_allclose(adversarial_loss(w, z, eps, 0.1)[1], found, atol=1e-8)


def test_the_loss_is_that_of_the_worst_perturbation() -> None:
    rng = np.random.default_rng(0)
    z, w = rng.standard_normal((1, 3)), rng.standard_normal(3)
    around = rng.standard_normal((20_000, 3))
    around *= 0.3 / np.linalg.norm(around, axis=1, keepdims=True)
    sampled = np.logaddexp(0, -(z + around) @ w).max()
    exact = adversarial_loss(w, z, np.array([0.3]), 0.0)[0]
    assert sampled <= exact
    assert sampled == pytest.approx(exact, rel=1e-3)


def test_the_student_is_the_optimum_that_another_solver_finds() -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((60, 4))
    z, eps = x * np.sign(x[:, :1]), np.full(60, 0.3)
    w = train_student(z, eps, 0.01)

    def loss(v: NDArray[np.float64]) -> float:
        return adversarial_loss(v, z, eps, 0.01)[0]

    found = optimize.minimize(loss, z.mean(axis=0), method="Nelder-Mead", tol=1e-12)
    np.testing.assert_allclose(w, found.x, atol=1e-4)


@pytest.mark.parametrize(("scale", "collapses"), [(0.99, False), (1.01, True)])
def test_a_student_collapses_exactly_when_the_attack_outweighs_the_mean_sample(scale: float, collapses: bool) -> None:
    rng = np.random.default_rng(4)
    z = rng.standard_normal((30, 3)) + 0.2
    eps = np.full(30, scale * np.linalg.norm(z.mean(axis=0)))
    assert (not train_student(z, eps, 1e-3).any()) == collapses
    directions = rng.standard_normal((5000, 3)) * 1e-3
    better = min(adversarial_loss(direction, z, eps, 1e-3)[0] for direction in directions) < np.log(2)
    assert better == (not collapses)


def test_rules_keep_the_samples_that_their_names_say() -> None:
    margin, rng = np.array([0.3, -0.2, 0.9, 0.1]), np.random.default_rng(0)
    assert sorted(choose(RULES["prune_easy"], margin, 2, rng)) == [1, 3]
    assert sorted(choose(RULES["puma"], margin, 3, rng)) == [0, 1, 3]
    assert sorted(choose(RULES["prune_hard"], margin, 2, rng)) == [0, 2]
    assert sorted(choose(RULES["none"], margin, 4, rng)) == [0, 1, 2, 3]
    assert len(set(choose(RULES["random"], margin, 3, rng))) == 3


def test_puma_lowers_the_radius_to_the_margin_and_never_below_zero() -> None:
    margin = np.array([0.3, -0.2, 0.9])
    np.testing.assert_array_equal(allowed_eps(RULES["puma"], margin, 0.5), [0.3, 0, 0.5])
    np.testing.assert_array_equal(allowed_eps(RULES["prune_easy"], margin, 0.5), [0.5, 0.5, 0.5])


def test_the_probe_has_the_angle_asked_for() -> None:
    teacher, probe = teacher_and_probe(np.random.default_rng(0), 9, 25)
    assert np.rad2deg(np.arccos(teacher @ probe)) == pytest.approx(25)
    np.testing.assert_array_equal(*teacher_and_probe(np.random.default_rng(0), 9, 0))


def curves(**changes: float) -> list[Point]:
    knobs = {"dimension": 8, "eps": 0.5, "num_seeds": 2, "weight_decay": 1e-3, "probe_angle_deg": 0.0, "seed": 0}
    return learning_curves(fractions=(0.5,), alphas=(1, 16), **{**knobs, **changes})  # type: ignore[arg-type]


def test_more_samples_teach_better_and_the_seed_repeats() -> None:
    points, again, other = curves(), curves(), curves(seed=1)
    for few, many in zip(points[::2], points[1::2], strict=True):
        if few.rule != "prune_easy":  # it collapses when it has much
            assert many.clean.mean() > few.clean.mean()
    for point, same in zip(points, again, strict=True):
        np.testing.assert_array_equal(point.clean, same.clean)
    assert not np.array_equal(points[0].clean, other[0].clean)


def test_an_alpha_without_samples_is_an_input_error() -> None:
    with pytest.raises(InputError, match="alphas"):
        learning_curves(
            dimension=2, eps=0.5, fractions=(0.5,), alphas=(0.1,), num_seeds=2, weight_decay=1e-3, probe_angle_deg=0, seed=0
        )


def test_rules_are_told_apart_only_beyond_the_spread_of_the_seeds() -> None:
    base = np.array([0.5, 0.6, 0.7])
    assert compare(base + np.array([0.05, 0.051, 0.052]), base) == 1
    assert compare(base - np.array([0.05, 0.051, 0.052]), base) == -1
    assert compare(base + np.array([0.3, -0.1, 0.05]), base) == 0
    assert compare(base + 1e-5, base) == 0


def point(rule: str, fraction: float, robust: float, clean: float) -> Point:
    return Point(rule, fraction, 2.0, 10, 20, clean + np.array([0, 0.01]), robust + np.array([0, 0.01]), 0)


def test_conclusions_follow_the_numbers() -> None:
    shares = [Share("none", 0.0, 0.4, 0.41, 0.01, 100), Share("prune_hard", 0.5, 0.0, 0.0, 0.0, 50)]
    points = [point("none", 0, 0.5, 0.7), point("prune_hard", 0.5, 0.6, 0.6), point("random", 0.5, 0.4, 0.7)]
    assert [(best["metric"], best["setting"], best["tied"]) for best in find_winners(points)] == [
        ("robust", "prune_hard 50%", []),
        ("clean", "none", ["random 50%"]),
    ]
    told = "\n".join([*conclude(shares, points, eps=0.5, probe_angle_deg=0), *compare_with_none(points)])
    assert "Highest robust accuracy: prune_hard 50% at alpha 2 (0.605; without pruning 0.505)." in told
    assert "no rule beats none" in told
    assert "prune_hard 50% against none: higher robust accuracy at alpha 2; lower clean" in told
    assert "random 50% against none: lower robust accuracy at alpha 2." in told
    swapped = [point("none", 0, 0.6, 0.6), point("prune_hard", 0.5, 0.5, 0.7)]
    assert "lower robust accuracy at alpha 2; higher clean" in compare_with_none(swapped)[0]


def test_the_stage_writes_its_three_files_and_repeats_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(SMALL)
    main(tmp_path / "a")
    main(tmp_path / "b")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["curves.csv", "perceptron.json", "shares.csv"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    content = json.loads((tmp_path / "a" / "perceptron.json").read_text())
    assert content["margins_from"] == "the true margins, those of the teacher"
    rows = list(csv.DictReader((tmp_path / "a" / "curves.csv").read_text().splitlines()))
    assert len(rows) == len(list(settings((0.25, 0.5)))) * 2
    easy = next(row for row in rows if row["rule"] == "prune_easy" and row["fraction"] == "0.500000")
    assert (easy["num_kept"], easy["num_pool"]) == ("10", "20")


def test_a_fraction_of_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(SMALL.replace("[0.25, 0.5]", "[1.0]"))
    with pytest.raises(InputError, match=r"perceptron\.fractions"):
        main(tmp_path / "a")
