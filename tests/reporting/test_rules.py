"""Which strategies are of one rule, how they look, and the lines that join them."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import recipes
from pipeline.perceptron import RULES
from pipeline.pruning import Strategy
from pipeline.reporting.figures import COLOURS, DASHES, GREYS, SYMBOLS, rule_lines, styles_of
from pipeline.reporting.rules import PERCEPTRON, rule_of
from pipeline.reporting.runs import Run, read_runs
from tests.reporting.conftest import SEEDS, STRATEGIES


def study() -> dict[str, Strategy]:
    strategies = recipes.parse(recipes.read("cifar10-study", []))["strategies"]
    return {name: Strategy.model_validate(strategy) for name, strategy in strategies.items()}


def test_a_rule_is_all_but_the_share_that_is_kept() -> None:
    rules = {name: rule_of(strategy) for name, strategy in study().items()}
    assert rules["puma-30"] == rules["puma-50"] == rules["puma-70"] == PERCEPTRON["puma"]
    assert len({rules[name] for name in ("puma-50", "puma-50-short", "prune_easy-50", "prune_hard-50", "random-50")}) == 5
    assert (rules["none"], rules["adaptive_eps"]) == (PERCEPTRON["none"], PERCEPTRON["adaptive_eps"])
    assert rule_of(Strategy(budget="scaled")) == Strategy()  # nothing is pruned


def test_every_rule_of_the_perceptron_is_a_strategy() -> None:
    assert set(PERCEPTRON) == set(RULES)
    assert len(set(PERCEPTRON.values())) == len(PERCEPTRON)


def test_the_strategies_of_a_rule_have_one_colour_and_symbols_of_their_own() -> None:
    strategies = study()
    styles = styles_of(strategies, RULES)
    pumas = [styles[f"puma-{share}"] for share in (30, 50, 70)]
    assert len({style.colour for style in pumas}) == 1
    assert len({style.symbol for style in pumas}) == len({style.dash for style in pumas}) == 3
    assert styles["puma"] == pumas[0]
    greys = (styles["none"].colour, styles["random-30"].colour)
    assert greys == (GREYS[PERCEPTRON["none"]], GREYS[PERCEPTRON["random"]])
    shown = {(style.colour, style.symbol, style.dash) for name, style in styles.items() if name in strategies}
    assert len(shown) == len(strategies)


def test_more_rules_than_colours_differ_in_their_dash() -> None:
    seeds = {f"s{seed}": Strategy(score="margin", keep=0.5, seed=seed) for seed in range(len(COLOURS) + 1)}
    styles = styles_of(seeds, [])
    assert styles["s0"].colour == styles[f"s{len(COLOURS)}"].colour
    assert [styles[name].dash for name in ("s0", f"s{len(COLOURS)}")] == list(DASHES[:2])
    assert [styles[f"s{index}"].symbol for index in range(len(SYMBOLS))] == list(SYMBOLS)


@pytest.fixture
def runs(made: Path) -> list[Run]:
    return read_runs(made / "manifests", made / "evaluations", STRATEGIES, SEEDS)


def test_a_line_joins_the_means_of_one_rule_in_the_order_of_the_shares(runs: list[Run]) -> None:
    strategies = {
        "none": Strategy(score="margin"),
        "random": Strategy(score="random"),
        "puma": Strategy(score="margin", keep=0.8),
    }
    styles = styles_of(strategies, [])
    (line,) = rule_lines(runs, styles, "robust", strategies)
    assert (line["x"], line["y"], line["meta"]) == ([0.8, 1.0], [0.675, 0.775], ["puma", "none"])
    assert line["line"]["color"] == styles["none"].colour == styles["puma"].colour
    alone = strategies | {"puma": Strategy(score="margin", keep=0.8, budget="scaled")}
    assert rule_lines(runs, styles, "robust", alone) == []
    assert rule_lines([replace(runs[0], seed=seed) for seed in (0, 1)], styles, "robust", strategies) == []
