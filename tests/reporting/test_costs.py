"""Costs against counts of actual calls and hand-worked cases."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.artifacts import write_json
from pipeline.attacks import PGDParams
from pipeline.balls import BALLS
from pipeline.deepfool import DeepFoolParams, deepfool
from pipeline.images import ImageStore
from pipeline.models import register
from pipeline.params import InputError
from pipeline.reporting.arithmetic import count_flops
from pipeline.reporting.costs import hours, margin_passes, network_weight, training_passes, uses_margin_model
from pipeline.reporting.inputs import model_cost, strategy_costs
from pipeline.reporting.runs import by_strategy, read_runs
from pipeline.tight import TightParams, tight
from pipeline.training.heldout import Selector
from tests.reporting.artifacts import NETWORK, PARAMS, TRAIN
from tests.reporting.conftest import SEEDS, STRATEGIES, artifacts_at

COUNTED = {"images_seen": 1000, "images_attacked": 600}
SELECTION = {"holdout": 50, "selection_attack": {"num_steps": 20}}


@pytest.mark.parametrize(("loss", "wanted"), [("standard", 1000), ("pgd_at", 7000), ("trades", 8000), ("mart", 8000)])
def test_training_counts_updates_attack_steps_and_selections(loss: str, wanted: int) -> None:
    counted = COUNTED | {"images_attacked": 0 if loss == "standard" else 600}
    training = {"loss": loss, "attack": {"num_steps": 10}, **SELECTION}
    assert training_passes(counted, 0, training) == wanted
    assert training_passes(counted, 3, training) == wanted + 3 * 50 * (20 + 0.5 + 0.5)


def test_a_selection_costs_what_it_does_to_the_held_out_images(stores: dict[str, ImageStore]) -> None:
    linear, ball = Counting(64, 10), BALLS["linf"]
    attack, device = PGDParams(num_steps=7, step_size_255=1), torch.device("cpu")
    Selector(stores["real"], np.arange(30), attack, ball, eps=0.1, at_once=20, device=device).score(linear)
    training = {"loss": "standard", "attack": {"num_steps": 1}, "holdout": 30, "selection_attack": {"num_steps": 7}}
    assert training_passes({"images_seen": 0, "images_attacked": 0}, 1, training) == linear.passes


class Counting(nn.Module):
    """A linear model that counts the images that go forward and those whose gradient comes back, half a pass each."""

    def __init__(self, pixels: int = 6, classes: int = 5) -> None:
        super().__init__()
        self.w = torch.randn(pixels, classes, generator=torch.Generator().manual_seed(0))
        self.passes = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += len(x) / 2
        logits = x.flatten(1) @ self.w
        if logits.requires_grad:
            logits.register_hook(self.count)
        return logits

    def count(self, grad: Tensor) -> None:
        self.passes += len(grad) / 2


def images() -> tuple[Counting, Tensor, Tensor]:
    model, x = Counting().eval(), torch.rand(30, 6, 1, 1, generator=torch.Generator().manual_seed(1))
    y = (x.flatten(1) @ model.w).argmax(dim=1)
    return model, x, y


@pytest.mark.parametrize(("first", "candidates"), [(None, 3), (2, 3), (2, None), (9, 1)])
def test_margins_cost_what_deepfool_does_and_at_most_the_refinement_of_every_image(
    first: int | None, candidates: int | None
) -> None:
    model, x, y = images()
    settings: dict[str, Any] = {"first_candidates": first, "candidates": candidates, "max_iterations": 20}
    for steps in (None, 2):
        model.passes = 0
        result = deepfool(model, x, y, ball=BALLS["l2"], refine_steps=steps, **settings)
        quality = {"rows": 30, "mean_iterations": float(result.iterations.double().mean())}
        margins = {"deepfool": settings | {"refine_steps": steps}}
        found = margin_passes(quality, margins, num_classes=5)
        assert model.passes <= found <= model.passes + 30 * (steps or 0) / 2
        assert margin_passes(quality, margins | {"grand": True}, num_classes=5) == found + 30


def test_tight_margins_cost_what_they_do_beyond_deepfool_and_at_most_a_pass_more() -> None:
    model, x, y = images()
    result = tight(model, x, y, ball=BALLS["l2"], refine_steps=None, num_steps=4, search_steps=3)
    assert bool(result.converged.all())
    quality = {"rows": 30, "mean_iterations": float(result.iterations.double().mean())}
    margins = {"estimator": "tight", "deepfool": {"refine_steps": None, "first_candidates": 1}}
    margins |= {"tight": {"num_steps": 4, "search_steps": 3}}
    assert model.passes <= margin_passes(quality, margins, num_classes=5) <= model.passes + 30


def test_the_passes_of_margins_are_as_worked_by_hand_and_what_params_leave_out_has_its_defaults() -> None:
    quality, settings = {"rows": 1000, "mean_iterations": 2.0}, {"first_candidates": 3, "candidates": 1, "refine_steps": 2}
    # forward and 3 backward, then forward and 1 backward; a look after each; two steps of refinement
    assert margin_passes(quality, {"deepfool": settings}, num_classes=10) == 1000 * ((1 + 3) + (1 + 1) + 2 + 2) / 2
    # all 9, then 3; the ends of the first segment and its search; five planes of three ways and a search each
    wanted = 1000 * ((1 + 9) + (1 + 3) + 2 + 2 + (2 + 3) + 5 * (3 + 3)) / 2
    tight_settings = {"estimator": "tight", "deepfool": settings, "tight": {"num_steps": 5, "search_steps": 3}}
    assert margin_passes(quality, tight_settings, num_classes=10) == wanted
    for estimator in ("deepfool", "tight"):
        written = {"deepfool": DeepFoolParams().model_dump(), "tight": TightParams().model_dump(), "estimator": estimator}
        left_out: dict[str, Any] = {"deepfool": {}, "estimator": estimator}
        assert margin_passes(quality, left_out, num_classes=10) == margin_passes(quality, written, num_classes=10)


@register
def cnn(shape: tuple[int, int, int], num_classes: int, *, width: int) -> nn.Module:
    height, columns, channels = shape
    body = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.Flatten())
    return nn.Sequential(body, nn.Linear(width * height * columns, num_classes))


class OffMeta(nn.Module):
    """Reads a number, which the meta device has none of."""

    def forward(self, x: Tensor) -> Tensor:
        return x * float(x.sum() + 1)


@register
def stubborn(shape: tuple[int, int, int], num_classes: int, *, width: int) -> nn.Module:
    return nn.Sequential(OffMeta(), cnn(shape, num_classes, width=width))


def described(name: str, width: int) -> dict[str, Any]:
    return NETWORK | {"architecture": f"{__name__}.{name}", "arguments": {"width": width}}


@pytest.mark.parametrize("name", ["cnn", "stubborn"])
def test_the_weight_of_a_network_is_its_multiplications_over_those_of_the_other(name: str) -> None:
    multiplications = {width: 16 * 9 * width + 16 * width * 3 for width in (2, 6)}  # 4 x 4 pixels, 3 classes
    model = described(name, 6)
    assert count_flops(*model.values()) == 2 * multiplications[6]
    assert network_weight(model, described("cnn", 2)) == 3
    assert network_weight(described("cnn", 2), described("cnn", 4)) == 0.5
    assert network_weight(model, model) == 1


def test_the_count_is_that_of_the_literature() -> None:
    shape, classes = (32, 32, 3), [str(k) for k in range(10)]
    assert count_flops("wideresnet", {"depth": 28, "width": 10}, shape, classes) == pytest.approx(2 * 5.25e9, rel=0.005)
    tokens, side = 65, 192  # of the ViT: projections and perceptron, then the attention, in each of 12 layers
    layers = 12 * (12 * tokens * side**2 + 2 * tokens**2 * side)
    assert count_flops("vit", {}, shape, classes) == pytest.approx(2 * layers, rel=0.01)


def test_equal_networks_are_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.reporting.arithmetic.count_flops", lambda *_: pytest.fail("built"))
    assert network_weight(NETWORK | {"train": {}}, NETWORK) == 1


def test_only_strategies_that_use_the_margin_model_pay_for_it(made: Path, tmp_path: Path) -> None:
    assert not uses_margin_model({})
    assert not uses_margin_model({"score": "random", "keep": 0.5})
    assert uses_margin_model({"score": "entropy"})
    assert uses_margin_model({"eps": {"rule": "margin"}})
    groups = by_strategy(read_runs(made / "manifests", made / "evaluations", STRATEGIES, SEEDS))
    strategies = {"none": {}, "random": {"score": "random"}, "puma": {"score": "margin"}}
    costs = strategy_costs(artifacts_at(made), PARAMS | {"strategies": strategies}, groups, num_classes=3)
    training = 5000 * 2 + 4000 * 10 + 5 * 4 * (20 + 1)  # selected five times on four images
    assert {name: cost.training for name, cost in costs.items()} == dict.fromkeys(STRATEGIES, training)
    # 2 candidates and half an iteration with 1; a look after each; the refinement; GraNd
    deepfool_and_grand = 100 * (((1 + 2) + 0.5 * (1 + 1) + 1.5 + 2) / 2 + 1)
    assert [cost.margins for cost in costs.values()] == [0, 0, training + deepfool_and_grand]
    imported = PARAMS | {"strategies": strategies, "margin_model": {"kind": "import", "path": "x"}}
    assert strategy_costs(artifacts_at(made), imported, groups, num_classes=3)["puma"].margins == deepfool_and_grand
    shutil.copytree(made, tmp_path / "larger")
    for place, width in (("margin_model", 6), ("models/none-0", 2)):
        write_json(tmp_path / "larger" / place / "best" / "model.json", described("cnn", width) | {"train": TRAIN})
    larger = strategy_costs(artifacts_at(tmp_path / "larger"), PARAMS | {"strategies": strategies}, groups, num_classes=3)
    assert [cost.margins for cost in larger.values()] == [0, 0, 3 * (training + deepfool_and_grand)]
    assert [cost.margin_weight for cost in larger.values()] == [1, 1, 3]
    assert larger["puma"].training == training


def test_an_evaluation_without_its_training_cost_is_an_input_error(made: Path) -> None:
    runs = read_runs(made / "manifests", made / "evaluations", ["none"], SEEDS)
    runs[1].train.pop("images_attacked")
    with pytest.raises(InputError, match=r"none-1: wanted \{'images_attacked'\} of its training"):
        model_cost(runs, 5, PARAMS["train"]["training"])


def test_hours_are_passes_over_the_given_rate() -> None:
    assert hours(7_200_000, 1000.0) == 2
