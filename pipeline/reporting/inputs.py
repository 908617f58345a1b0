"""The directories of the stages that the report shows, and what it reads there beside runs and figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.images import ImageStore
from pipeline.params import InputError
from pipeline.reporting.costs import NETWORK, Cost, margin_passes, network_weight, training_passes, uses_margin_model
from pipeline.reporting.runs import Run, need, read_made
from pipeline.reporting.verdict import Groups


@dataclass(frozen=True)
class Artifacts:
    """By the names of their stages."""

    real: Path
    synthetic: Path
    generator: Path
    margin_model: Path
    judge: Path
    margins: Path
    manifests: Path
    models: Path
    evaluations: Path
    perceptron: Path

    def stores(self) -> dict[str, ImageStore]:
        """Source of the training samples -> its store."""
        return {"real": ImageStore.open(self.real / "train"), "synthetic": ImageStore.open(self.synthetic)}


def margin_quality(margins: Path) -> dict[str, Any]:
    return read_made(margins / "quality.json", "margins", ("rows", "not_converged", "mean_iterations", "by_source"))


def strategy_costs(artifacts: Artifacts, params: Mapping[str, Any], groups: Groups, num_classes: int) -> dict[str, Cost]:
    """Strategy -> the mean cost of its models, and of the margins if it uses them (margin model included, unless it was
    imported)."""
    margins = margin_passes(margin_quality(artifacts.margins), params["margins"], num_classes)
    first = next(iter(groups.values()))[0]
    margin_model = read_made(artifacts.margin_model / "best" / "model.json", "margin_model", NETWORK)
    trained = read_made(artifacts.models / first.name / "best" / "model.json", f"train@{first.name}", NETWORK)
    if params["margin_model"].get("kind") == "train":
        selections = count_selections(artifacts.margin_model / "training.csv", "margin_model")
        margins += training_passes(margin_model["train"], selections, params["margin_model"]["training"])
    weight = network_weight(margin_model, trained)
    costs = {}
    for name, runs in groups.items():
        selections = count_selections(artifacts.models / runs[0].name / "training.csv", f"train@{runs[0].name}")
        cost = model_cost(runs, selections, params["train"]["training"])
        if uses_margin_model(params["strategies"][name]):
            cost = replace(cost, margins=round(margins * weight), margin_weight=weight)
        costs[name] = cost
    return costs


def count_selections(path: Path, stage: str) -> int:
    """Rows of a training.csv: one for each time that the checkpoint was selected on held-out images."""
    with need(path, stage).open() as file:
        return sum(1 for _ in file) - 1


def model_cost(runs: Sequence[Run], num_selections: int, training: Mapping[str, Any]) -> Cost:
    """Means over the runs, which differ at most in how many of their images are attacked."""
    for run in runs:
        if missing := {"images_seen", "images_attacked"} - set(run.train):
            raise InputError(f"evaluation {run.name}: wanted {missing} of its training; run `dvc repro -f evaluate@{run.name}`")
    counted = {key: round(sum(run.train[key] for run in runs) / len(runs)) for key in ("images_seen", "images_attacked")}
    return Cost(**counted, training=training_passes(counted, num_selections, training), margins=0)
