"""Costs against counts of actual calls and hand-worked cases."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.balls import BALLS
from pipeline.deepfool import deepfool
from pipeline.params import InputError
from pipeline.reporting.costs import hours, margin_passes, training_passes, uses_margin_model
from pipeline.reporting.inputs import model_cost, strategy_costs
from pipeline.reporting.runs import by_strategy, read_runs
from tests.reporting.artifacts import PARAMS
from tests.reporting.conftest import SEEDS, STRATEGIES, artifacts_at

COUNTED = {"images_seen": 1000, "images_attacked": 600}


@pytest.mark.parametrize(("loss", "wanted"), [("standard", 1000), ("pgd_at", 7000), ("trades", 8000), ("mart", 8000)])
def test_training_counts_updates_and_attack_steps(loss: str, wanted: int) -> None:
    attacked = 0 if loss == "standard" else 600
    assert training_passes(COUNTED | {"images_attacked": attacked}, {"loss": loss, "attack": {"num_steps": 10}}) == wanted


class Counting(nn.Module):
    """A linear model of 5 classes that counts the images whose gradient is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
        self.num_passes = 0

    def forward(self, x: Tensor) -> Tensor:
        logits = x.flatten(1) @ self.w
        if logits.requires_grad:
            logits.register_hook(self.count)
        return logits

    def count(self, grad: Tensor) -> None:
        self.num_passes += len(grad)


@pytest.mark.parametrize(("first", "candidates"), [(None, 3), (2, 2), (None, 1)])
def test_margins_cost_the_gradients_that_deepfool_takes(first: int | None, candidates: int) -> None:
    model, x = Counting().eval(), torch.rand(30, 6, 1, 1, generator=torch.Generator().manual_seed(1))
    settings: dict[str, Any] = {"first_candidates": first, "candidates": candidates}
    y = (x.flatten(1) @ model.w).argmax(dim=1)
    result = deepfool(model, x, y, ball=BALLS["l2"], max_iterations=20, overshoot=0.02, box=True, refine_steps=2, **settings)
    quality = {"rows": 30, "mean_iterations": float(result.iterations.double().mean())}
    assert margin_passes(quality, {"deepfool": settings}, num_classes=5) == model.num_passes
    assert margin_passes(quality, {"deepfool": settings, "grand": True}, num_classes=5) == model.num_passes + 30


def test_only_strategies_that_use_the_margin_model_pay_for_it(made: Path) -> None:
    assert not uses_margin_model({})
    assert not uses_margin_model({"score": "random", "keep": 0.5})
    assert uses_margin_model({"score": "entropy"})
    assert uses_margin_model({"eps": {"rule": "margin"}})
    groups = by_strategy(read_runs(made / "manifests", made / "evaluations", STRATEGIES, SEEDS))
    strategies = {"none": {}, "random": {"score": "random"}, "puma": {"score": "margin"}}
    costs = strategy_costs(artifacts_at(made), PARAMS | {"strategies": strategies}, groups, num_classes=3)
    training = 5000 * 2 + 4000 * 10
    assert {name: cost.training for name, cost in costs.items()} == dict.fromkeys(STRATEGIES, training)
    deepfool_and_grand = 100 * (2 + 0.5 * 1 + 1)
    assert [cost.margins for cost in costs.values()] == [0, 0, training + deepfool_and_grand]
    imported = PARAMS | {"strategies": strategies, "margin_model": {"kind": "import", "path": "x"}}
    assert strategy_costs(artifacts_at(made), imported, groups, num_classes=3)["puma"].margins == deepfool_and_grand


def test_an_evaluation_without_its_training_cost_is_an_input_error(made: Path) -> None:
    runs = read_runs(made / "manifests", made / "evaluations", ["none"], SEEDS)
    runs[1].train.pop("images_attacked")
    with pytest.raises(InputError, match=r"none-1: wanted \{'images_attacked'\} of its training"):
        model_cost(runs, PARAMS["train"]["training"], 0)


def test_hours_are_passes_over_the_given_rate() -> None:
    assert hours(7_200_000, 1000.0) == 2
