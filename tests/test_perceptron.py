"""The perceptron against Monte Carlo, other solvers and hand-worked cases."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
from pipeline.perceptron_conclusions import (
    compare,
    compare_with_none,
    conclude,
    count_comparisons,
    describe_shares,
    find_winners,
    tail_of,
)
from stages.perceptron import main
from tests.conftest import ROOT

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


@pytest.mark.parametrize("eps", [0.1, 0.5, 1.5])
def test_monte_carlo_shares_lie_within_three_standard_errors_of_the_exact_ones(eps: float) -> None:
    fractions = (0.2, 0.5, 0.8)
    shares = measure_shares(np.random.default_rng(1), dimension=7, eps=eps, fractions=fractions, num_examples=40_000)
    assert [(share.rule, share.fraction) for share in shares] == list(settings(fractions))
    crossing = stats.halfnorm.cdf(eps)
    for share in shares:
        p = share.fraction
        exact = {
            "prune_easy": min(1, crossing / (1 - p)),
            "prune_hard": max(0, crossing - p) / (1 - p),
            "adaptive_eps": 0,
            "puma": 0,
        }.get(share.rule, crossing)
        standard_error = np.sqrt(exact * (1 - exact) / share.num_kept)
        assert abs(share.monte_carlo - exact) <= 3 * standard_error
        assert share.standard_error == pytest.approx(standard_error, rel=0.1)


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


def curves(**changes: Any) -> list[Point]:
    knobs = {"dimension": 8, "eps": 0.5, "num_seeds": 2, "weight_decay": 1e-3, "probe_angle_deg": 0.0, "seed": 0}
    return learning_curves(**{"fractions": (0.5,), "alphas": (1, 16), **knobs, **changes})


def test_more_samples_teach_better_and_the_seed_repeats() -> None:
    points, again, other = curves(), curves(), curves(seed=1)
    for few, many in zip(points[::2], points[1::2], strict=True):
        if few.rule != "prune_easy":  # it collapses when it has much
            assert many.clean.mean() > few.clean.mean()
    for point, same in zip(points, again, strict=True):
        np.testing.assert_array_equal(point.clean, same.clean)
    assert not np.array_equal(points[0].clean, other[0].clean)


def test_a_point_does_not_depend_on_the_other_points() -> None:
    """All pools of a seed are the beginning of its largest."""
    for point, alone in zip(curves()[::2], curves(alphas=(1,)), strict=True):
        assert (point.setting, point.num_kept, point.num_pool) == (alone.setting, alone.num_kept, alone.num_pool)
        np.testing.assert_allclose(point.clean, alone.clean, atol=1e-5)
        np.testing.assert_allclose(point.robust, alone.robust, atol=1e-5)


def test_an_alpha_without_samples_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"perceptron\.alphas: 0\.05 keeps no sample in 8 dimensions"):
        curves(alphas=(4, 0.05))


def test_rules_are_told_apart_only_beyond_the_spread_of_the_seeds() -> None:
    base = np.array([0.5, 0.6, 0.7])
    assert compare(base + np.array([0.05, 0.051, 0.052]), base, 0.01) == 1
    assert compare(base - np.array([0.05, 0.051, 0.052]), base, 0.01) == -1
    assert compare(base + np.array([0.3, -0.1, 0.05]), base, 0.01) == 0
    assert compare(base + 1e-5, base, 0.01) == 0


def test_the_comparison_is_the_paired_t_test_of_scipy() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(0.52, 0.05, 12), rng.normal(0.5, 0.05, 12)
    p_value = float(stats.ttest_rel(ours, theirs).pvalue)
    assert (compare(ours, theirs, 1.01 * p_value), compare(ours, theirs, 0.99 * p_value)) == (1, 0)


def point(
    rule: str, fraction: float, robust: float, clean: float, alpha: float = 2.0, num_collapsed: int = 0, num_kept: int = 0
) -> Point:
    kept = num_kept or round(100 * alpha)
    spread = np.array([0, 0.01])  # the same for all: differences have none
    return Point(rule, fraction, alpha, kept, round(kept / (1 - fraction)), clean + spread, robust + spread, num_collapsed)


def test_comparisons_are_counted_by_hand_and_share_the_level() -> None:
    """3 settings have 3 pairs, at 2 alphas, in 2 metrics; puma's pool at alpha 1 is that of none at alpha 2."""
    settings = (("none", 0.0), ("random", 0.5), ("puma", 0.5))
    points = [point(rule, fraction, 0.5, 0.7, alpha) for rule, fraction in settings for alpha in (1, 2)]
    assert count_comparisons(points) == 3 * 2 * 2 + 2
    assert tail_of(points) == pytest.approx(0.05 / 14)


def test_noise_is_called_a_difference_in_one_table_of_twenty_at_most() -> None:
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(100):
        points = [
            Point(rule, fraction, alpha, 10, 20, rng.normal(0.8, 0.05, 20), rng.normal(0.5, 0.05, 20), 0)
            for rule, fraction in (("none", 0.0), ("random", 0.2), ("random", 0.5), ("prune_hard", 0.5))
            for alpha in (1.0, 2.0, 4.0, 8.0)
        ]
        wrong += any("no difference" not in told for told in compare_with_none(points))
    assert wrong <= 10


Gaps = Sequence[tuple[float, float]]  # robust and clean above none, at each of ALPHAS
ALPHAS = (0.5, 1, 2, 4)


def table(rules: dict[tuple[str, float], Gaps], collapsed: Sequence[tuple[float, float]] = ()) -> list[Point]:
    """none at 0.5 robust and 0.7 clean everywhere; the cases (fraction, alpha) that collapsed."""
    points = [point("none", 0.0, 0.5, 0.7, alpha) for alpha in ALPHAS]
    for (rule, fraction), gaps in rules.items():
        for alpha, (robust, clean) in zip(ALPHAS, gaps, strict=True):
            num = 2 * ((fraction, alpha) in collapsed)
            points.append(point(rule, fraction, 0.5 + robust, 0.7 + clean, alpha, num))
    return points


UP, DOWN, LEVEL, TRADE = (0.05, 0.1), (-0.05, -0.1), (0.0, 0.0), (-0.02, 0.1)


@pytest.mark.parametrize(
    ("rules", "collapsed", "robust", "clean"),
    [
        ({0.5: [UP, UP, (0.06, 0.2), UP]}, [], "wins by up to 6.0 points throughout", "wins by up to 20.0 points throughout"),
        ({0.5: [DOWN] * 4}, [], "loses by up to 5.0 points throughout", "loses by up to 10.0 points throughout"),
        (
            {0.2: [DOWN, LEVEL, UP, UP], 0.5: [DOWN, LEVEL, LEVEL, UP]}, [],
            "wins by up to 5.0 points at alpha 2 to 4 (20% pruned) and 4 (50% pruned), loses by up to 5.0 points at alpha 0.5 "
            "(20% and 50% pruned) and is level elsewhere",
            "wins by up to 10.0 points at alpha 2 to 4 (20% pruned) and 4 (50% pruned), loses by up to 10.0 points at alpha "
            "0.5 (20% and 50% pruned) and is level elsewhere",
        ),
        (
            {0.5: [TRADE, UP, TRADE, TRADE]}, [],
            "wins by up to 5.0 points at alpha 1 (50% pruned) and loses by up to 2.0 points at alpha 0.5, 2 to 4 (50% pruned)",
            "wins by up to 10.0 points throughout",
        ),
        (
            {0.0: [LEVEL, LEVEL, UP, UP]}, [], "wins by up to 5.0 points at alpha 2 to 4 and is level elsewhere",
            "wins by up to 10.0 points at alpha 2 to 4 and is level elsewhere",
        ),
    ],
    ids=["wins", "loses", "mixed", "trades", "prunes nothing"],
)  # fmt: skip
def test_a_rule_is_described_as_its_table_was_made(
    rules: dict[float, Gaps], collapsed: list[tuple[float, float]], robust: str, clean: str
) -> None:
    told = f"in robust accuracy it {robust}; in clean accuracy it {clean}."
    assert describe("adaptive_eps" if 0.0 in rules else "prune_hard", rules, collapsed) == told


def describe(rule: str, rules: dict[float, Gaps], collapsed: Sequence[tuple[float, float]] = ()) -> str:
    points = table({(rule, fraction): gaps for fraction, gaps in rules.items()}, collapsed)
    start = f"{rule} against none: "
    (found,) = [sentence.removeprefix(start) for sentence in conclude(points) if sentence.startswith(start)]
    return found


def test_a_rule_that_is_level_everywhere_is_said_to_be() -> None:
    assert describe("random", {0.2: [LEVEL] * 4, 0.5: [LEVEL] * 4}) == "in robust and clean accuracy it is level throughout."


def test_where_students_collapse_a_rule_neither_wins_nor_loses() -> None:
    assert describe("prune_easy", {0.5: [LEVEL, LEVEL, UP, DOWN]}, [(0.5, 2), (0.5, 4)]) == (
        "its students collapse to one class at alpha 2 to 4 (50% pruned); otherwise in robust and clean accuracy it is level "
        "throughout."
    )
    everywhere = [(0.5, alpha) for alpha in ALPHAS]
    assert describe("prune_easy", {0.5: [UP] * 4}, everywhere) == "its students collapse to one class throughout."


NOWHERE = "nowhere: against none and prune_easy in 0 of 4 cases; {pool} in 0 of 3 cases."
EVERYWHERE = "everywhere: against none and prune_easy in all 4 cases; {pool} in all 3 cases."


@pytest.mark.parametrize(
    ("puma", "easy", "collapsed", "told"),
    [
        ([UP] * 4, [DOWN] * 4, [], EVERYWHERE),
        ([(0.0, 0.1)] * 4, [DOWN] * 4, [], EVERYWHERE),
        ([DOWN] * 4, [UP] * 4, [], NOWHERE),
        ([LEVEL] * 4, [LEVEL] * 4, [], NOWHERE),
        ([TRADE] * 4, [LEVEL] * 4, [], NOWHERE),
        ([UP] * 4, [DOWN] * 4, [(0.5, alpha) for alpha in ALPHAS], NOWHERE),
        (
            [DOWN, UP, UP, TRADE], [UP, UP, DOWN, DOWN], [],
            "in part: against none in 2 of 4 cases, at alpha 1 to 2 (50% pruned); against prune_easy in 2 of 4 cases, at alpha "
            "2 to 4 (50% pruned); {pool} in 2 of 3 cases, at alpha 1 to 2 (50% pruned).",
        ),
    ],
    ids=["wins", "same robustness", "loses", "level", "trades", "collapses", "mixed"],
)  # fmt: skip
def test_the_claim_of_puma_is_judged_by_its_table(
    puma: Gaps, easy: Gaps, collapsed: list[tuple[float, float]], told: str
) -> None:
    sentence = conclude(table({("prune_easy", 0.5): easy, ("puma", 0.5): puma}, collapsed))[0]
    pool = "against none on the whole pool of which puma keeps a part"
    start = "The claim of PUMA, more clean accuracy and no less robustness with as many samples kept, holds "
    assert sentence == start + told.format(pool=pool)


def test_puma_is_compared_with_rivals_of_its_own_fraction() -> None:
    points = table({("random", 0.2): [UP] * 4, ("random", 0.5): [DOWN] * 4, ("puma", 0.5): [LEVEL] * 4})
    assert "against random in all 4 cases" in conclude(points)[0]


def test_on_its_whole_pool_none_has_as_many_samples_as_puma_chose_from() -> None:
    """none gains with alpha, so that puma is above it with as many samples, and below it where none has all of the pool."""
    none = [point("none", 0.0, 0.5 + 0.1 * step, 0.7, alpha) for step, alpha in enumerate(ALPHAS)]
    puma = [point("puma", 0.5, 0.55 + 0.1 * step, 0.75, alpha) for step, alpha in enumerate(ALPHAS)]
    assert "holds in part: against none in all 4 cases; against none on the whole" in conclude(none + puma)[0]
    assert conclude(none + puma)[0].endswith("keeps a part in 0 of 3 cases.")


def test_conclusions_follow_the_numbers() -> None:
    shares = [Share("none", 0.0, 0.4, 0.41, 0.01, 100), Share("prune_hard", 0.5, 0.0, 0.0, 0.0, 50)]
    points = [point("none", 0, 0.5, 0.7), point("prune_hard", 0.5, 0.6, 0.6), point("random", 0.5, 0.4, 0.7)]
    assert [(best["metric"], best["setting"], best["tied"]) for best in find_winners(points)] == [
        ("robust", "prune_hard 50%", []),
        ("clean", "none", ["random 50%"]),
    ]
    told = "\n".join([*conclude(points), *describe_shares(shares, eps=0.5, probe_angle_deg=0), *compare_with_none(points)])
    assert "Highest robust accuracy: prune_hard 50% at alpha 2 (0.605; without pruning 0.505)." in told
    assert "Highest clean accuracy: no rule beats none at alpha 2." in told
    assert "all 6 comparisons hold together with 95% confidence" in told
    assert "can push 40.0% of all samples over the true boundary: no student is more robust than 0.600. 100 drawn" in told
    assert "agree with all exact shares to 1.0 standard errors" in told
    assert "after prune_hard: 0.0% with 50% pruned." in told
    assert "prune_hard 50% against none: higher robust accuracy at alpha 2; lower clean" in told
    assert "random 50% against none: lower robust accuracy at alpha 2." in told
    swapped = [point("none", 0, 0.6, 0.6), point("prune_hard", 0.5, 0.5, 0.7)]
    assert "lower robust accuracy at alpha 2; higher clean" in compare_with_none(swapped)[0]


def test_winners_are_told_in_ranges_of_alpha_with_where_others_are_level() -> None:
    points = table({("random", 0.5): [LEVEL, LEVEL, UP, DOWN], ("prune_hard", 0.5): [UP, UP, UP, DOWN]})
    assert (
        "Highest robust accuracy: prune_hard 50% at alpha 0.5 to 1 (0.555; without pruning 0.505); random 50% at alpha 2 "
        "(0.555; without pruning 0.505; level with others at alpha 2); no rule beats none at alpha 4."
    ) in conclude(points)


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


def test_the_report_shows_the_conclusions_in_view_and_not_in_what_is_to_be_opened() -> None:
    template = (ROOT / "pipeline" / "reporting" / "report.html.j2").read_text()
    before, _ = template.split("page.perceptron.conclusions")
    assert before.count("<details") == before.count("</details>")


def test_a_fraction_of_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(SMALL.replace("[0.25, 0.5]", "[1.0]"))
    with pytest.raises(InputError, match=r"perceptron\.fractions"):
        main(tmp_path / "a")
