"""Which strategies are tested against which, and the tests against SciPy and hand-worked cases."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from pipeline import recipes
from pipeline.csv_tables import read_csv
from pipeline.params import InputError
from pipeline.pruning import Strategy
from pipeline.reporting.contrasts import (
    Contrast,
    Pair,
    check_pairs,
    derive,
    measure,
    sentences,
    write_differences_csv,
    write_differences_tex,
)
from pipeline.reporting.intervals import paired_difference, pooled_variance
from pipeline.reporting.runs import Run, by_strategy, read_runs
from pipeline.reporting.text_tables import difference_rows
from tests.reporting.conftest import SEEDS, STRATEGIES

RADIUS = {"rule": "margin", "scale": 1.0}
CHOSEN = {"none": {}, "random": {"score": "random", "keep": 0.9}, "puma": {"score": "margin", "keep": 0.8}}


def parsed(strategies: Mapping[str, Any]) -> dict[str, Strategy]:
    return {name: Strategy.model_validate(strategy) for name, strategy in strategies.items()}


def baselines(strategies: Mapping[str, Any]) -> dict[str, list[str]]:
    pairs = derive(parsed(strategies))
    return {name: [baseline for ours, baseline in pairs if ours == name] for name in strategies}


def test_the_default_tests_every_strategy_against_those_that_lack_one_of_its_parts() -> None:
    assert baselines(recipes.parse(recipes.read("digits", []))["strategies"]) == {
        "none": [],
        "random": ["none"],
        "prune_easy": ["none", "random"],
        "puma": ["none", "random", "prune_easy"],
    }


def test_the_study_tests_puma_against_random_pruning_alone_radii_alone_and_nothing_at_each_fraction_and_budget() -> None:
    found = baselines(recipes.parse(recipes.read("cifar10-study", []))["strategies"])
    for end in ("-30", "-50", "-70", "-50-short"):
        assert found[f"puma{end}"] == ["none", "adaptive_eps", f"random{end}", f"prune_easy{end}"]
        assert found[f"prune_easy{end}"] == found[f"prune_hard{end}"] == ["none", f"random{end}"]
    assert found["adaptive_eps"] == ["none"]
    assert found["none"] == []
    for end in ("c05", "c2", "class"):
        assert found[f"puma-50-{end}"][-1] == "puma-50"
        assert all("puma" not in baseline for baseline in found[f"puma-50-{end}"][:-1])


PUMA = {"score": "margin", "keep": 0.5, "eps": RADIUS}
HALF = {"rule": "margin", "scale": 0.5}


@pytest.mark.parametrize(
    ("variant", "is_tested"),
    [
        (PUMA | {"eps": HALF}, True),
        (PUMA | {"eps": {"rule": "rank", "q": 0.5}}, True),
        (PUMA | {"per_class": True}, True),
        (PUMA | {"misclassified": "drop"}, True),
        (PUMA | {"eps": HALF, "per_class": True}, False),  # two things at a time
        (PUMA | {"keep": 0.3}, False),
        (PUMA | {"score": "entropy"}, False),
        (PUMA | {"budget": "scaled"}, False),
    ],
)
def test_a_variant_is_tested_against_what_stands_above_it(variant: dict[str, Any], is_tested: bool) -> None:
    assert derive(parsed({"puma": PUMA, "variant": variant})) == [("variant", "puma")] * is_tested


def test_of_several_variants_the_first_one_is_the_reference() -> None:
    scales = {f"c{scale}": PUMA | {"eps": {"rule": "margin", "scale": scale}} for scale in (1.0, 0.5, 2.0)}
    assert derive(parsed(scales)) == [("c0.5", "c1.0"), ("c2.0", "c1.0")]


@pytest.mark.parametrize(
    ("strategy", "other"),
    [
        ({"score": "margin", "keep": 0.5}, {"score": "random", "keep": 0.7}),  # not as many
        ({"score": "margin", "keep": 0.5}, {"score": "random", "keep": 0.5, "budget": "scaled"}),  # not for as long
        ({"score": "margin", "keep": 0.5}, {"score": "random", "keep": 0.5, "eps": RADIUS}),  # has a part more
        ({"score": "margin", "keep": 0.5, "eps": RADIUS}, {"eps": {"rule": "margin", "scale": 2.0}}),  # other radii
        ({"score": "margin", "keep": 0.5}, {"score": "margin", "prune": "lowest", "keep": 0.5}),  # another part
        ({"score": "random", "keep": 0.5}, {"score": "random", "keep": 0.5, "seed": 1}),
        ({}, {"score": "random", "keep": 0.5}),
        ({}, {"budget": "scaled"}),  # the same: nothing is pruned
    ],
)
def test_strategies_that_differ_otherwise_are_not_tested(strategy: dict[str, Any], other: dict[str, Any]) -> None:
    assert ("a", "b") not in derive(parsed({"a": strategy, "b": other}))


def test_pairs_of_unknown_or_equal_names_are_input_errors() -> None:
    check_pairs([("a", "b")], ["a", "b", "c"])
    for pair in (("a", "d"), ("b", "b")):
        with pytest.raises(InputError, match="wanted pairs of two strategies out of a, b, c, got"):
            check_pairs([("a", "b"), pair], ["a", "b", "c"])


@pytest.fixture
def groups(made: Path) -> dict[str, list[Run]]:
    return by_strategy(read_runs(made / "manifests", made / "evaluations", STRATEGIES, SEEDS))


def test_only_the_pairs_that_are_tested_share_a_correction(groups: dict[str, list[Run]]) -> None:
    pairs: list[Pair] = [("random", "none"), ("puma", "none")]
    (_, found) = measure(pairs, groups, parsed(CHOSEN), 0.95)
    assert (found.kept, found.baseline_kept) == (0.8, 1.0)
    assert found.differs_in == ["score", "keep"]
    outcomes = [[run.robust_outcomes for run in groups[name]] for name in ("puma", "none")]
    seeds = pooled_variance([run.robust for run in group] for group in groups.values())
    assert found.robust == paired_difference(outcomes[0], outcomes[1], 0.975, seeds)
    assert found.robust.p_value == stats.binomtest(0, 3).pvalue  # puma misses one image more with one seed, two with the other
    assert [each.clean.confidence for each in measure(pairs[:1], groups, parsed(CHOSEN), 0.95)] == [0.95]
    assert measure([], groups, parsed(CHOSEN), 0.95) == []


@pytest.fixture
def apart(groups: dict[str, list[Run]]) -> list[Contrast]:
    """Robust accuracies 75.1, 50.1 and 74.9 % of 400 images; the clean ones as they are."""
    rows = np.arange(400)
    right = {"none": 300, "random": 200, "puma": 299}
    far = {
        name: [replace(run, robust=(count + run.seed) / 400, robust_outcomes=rows < count + run.seed) for run in groups[name]]
        for name, count in right.items()
    }
    return measure([("random", "none"), ("puma", "none"), ("puma", "random")], far, parsed(CHOSEN), 0.95)


def test_the_sentences_name_what_is_supported_and_count_the_rest(apart: list[Contrast]) -> None:
    assert sentences(apart) == [
        "Planned contrasts of robust accuracy: 2 of 3 told apart: puma is higher than random; random is lower than none.",
        "Planned contrasts of clean accuracy: 0 of 3 told apart.",
    ]
    assert sentences([]) == []
    many = [replace(apart[0], strategy=f"random-{share}") for share in range(7)]
    assert sentences(many[:6])[0].startswith(
        "Planned contrasts of robust accuracy: 6 of 6 told apart: random-0 is lower than none;"
    )
    assert sentences(many)[0] == "Planned contrasts of robust accuracy: 7 of 7 told apart, see the table below."


def test_the_table_is_one_row_per_contrast_as_csv_text_and_latex(apart: list[Contrast], tmp_path: Path) -> None:
    write_differences_csv(tmp_path / "differences.csv", apart)
    rows = read_csv(tmp_path / "differences.csv", ["strategy", "baseline", "robust", "robust_p", "robust_verdict", "seeds"])
    assert [(row["strategy"], row["baseline"], row["robust_verdict"], row["clean_verdict"]) for row in rows] == [
        ("random", "none", "lower", "not told apart"),
        ("puma", "none", "not told apart", "not told apart"),
        ("puma", "random", "higher", "not told apart"),
    ]
    last = rows[2]
    assert (last["kept"], last["baseline_kept"], last["seeds"], last["confidence"]) == ("0.800000", "0.900000", "2", "0.983333")
    assert (last["differs_in"], last["robust"], last["robust_p"]) == ("score keep", "0.247500", "1.6e-30")
    assert float(last["robust_p"]) == pytest.approx(stats.binomtest(0, 99 + 1).pvalue, rel=0.05)
    low, high = (f"{100 * end:+.1f}" for end in (apart[2].robust.low, apart[2].robust.high))
    text = difference_rows(tmp_path / "differences.csv")
    assert text[0][:4] == ["contrast", "differs in", "kept", "clean, points"]
    assert text[3][:3] == ["puma less random", "score, keep", "80% / 90%"]
    assert text[3][6:] == [f"+24.8 [{low}, {high}]", "1.6e-30", "higher"]
    write_differences_tex(tmp_path / "differences.tex", [replace(apart[0], strategy="prune_easy")])
    (line,) = [line for line in (tmp_path / "differences.tex").read_text().splitlines() if "less" in line]
    assert line.startswith(r"prune\_easy less none & 90 / 100 & ")
    assert "$-$25.0 [$-$" in line
    assert line.endswith(r"lower \\")
