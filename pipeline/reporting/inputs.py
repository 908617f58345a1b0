"""The directories of the stages that the report shows, and what it reads there beside runs and figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.images import ImageStore
from pipeline.params import InputError
from pipeline.reporting.costs import Cost, margin_passes, training_passes, uses_margin_model
from pipeline.reporting.runs import Run, read_made
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
    if params["margin_model"].get("kind") == "train":
        description = read_made(artifacts.margin_model / "best" / "model.json", "margin_model", ("train",))
        margins += training_passes(description["train"], params["margin_model"]["training"])
    return {
        name: model_cost(runs, params["train"]["training"], margins if uses_margin_model(params["strategies"][name]) else 0)
        for name, runs in groups.items()
    }


def model_cost(runs: Sequence[Run], training: Mapping[str, Any], margins: int) -> Cost:
    """Means over the runs, which differ at most in how many of their images are attacked."""
    for run in runs:
        if missing := {"images_seen", "images_attacked"} - set(run.train):
            raise InputError(f"evaluation {run.name}: wanted {missing} of its training; run `dvc repro -f evaluate@{run.name}`")
    seen, attacked = (round(sum(run.train[key] for run in runs) / len(runs)) for key in ("images_seen", "images_attacked"))
    return Cost(seen, attacked, training_passes({"images_seen": seen, "images_attacked": attacked}, training), margins)
