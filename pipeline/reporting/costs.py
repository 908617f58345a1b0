"""What the strategies cost, in images and in passes: counts, because hours would differ from run to run.

A pass is one image forward and backward through the network that the strategies train; a forward or a backward pass alone is
half of one, and those of another network count by its arithmetic (`network_weight`). Counted are the updates of the weights,
the steps of the attack and, on the held-out images, those of the attack that selects the checkpoint; where a strategy uses
margins, also their estimation (DeepFool or tight, and GraNd) and the training of the margin model, unless it was imported.
Not counted is what all strategies share or what only measures: the synthetic images and their generator, the sample of rows
that judges the margins, the evaluation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

HALF = 0.5
NETWORK = ("architecture", "arguments", "shape", "classes")  # what a model.json says of a network itself
# Passes of one image in one update of the weights.
UPDATE_PASSES = {"standard": 1, "pgd_at": 1, "trades": 2, "mart": 2}


@dataclass(frozen=True)
class Cost:
    """Of one model of a strategy. `margins` is paid once whatever the number of seeds; 0 where no margin is used. A pass of
    the margin model is `margin_weight` passes."""

    images_seen: int
    images_attacked: int
    training: int
    margins: int
    margin_weight: float = 1.0

    @property
    def passes(self) -> int:
        return self.training + self.margins


def training_passes(counted: Mapping[str, int], num_selections: int, training: Mapping[str, Any]) -> int:
    """Passes of one training; counted: `images_seen` and `images_attacked`. A selection is the attack on the held-out images
    and two looks at them, clean and attacked."""
    updates = counted["images_seen"] * UPDATE_PASSES[training["loss"]]
    attack = counted["images_attacked"] * int(training["attack"]["num_steps"])
    selection = int(training["holdout"]) * (int(training["selection_attack"]["num_steps"]) + 2 * HALF)
    return round(updates + attack + num_selections * selection)


def margin_passes(quality: Mapping[str, Any], margins: Mapping[str, Any], num_classes: int) -> int:
    """Passes of the margins of all training images through the margin model, in its own passes."""
    from pipeline.deepfool import DeepFoolParams  # for the defaults, at the price of importing torch
    from pipeline.tight import TightParams

    settings, iterations = DeepFoolParams.model_validate(margins["deepfool"]), float(quality["mean_iterations"])
    if margins.get("estimator") == "tight":
        settings = settings.model_copy(update={"first_candidates": None, "candidates": 3})
        closer = TightParams.model_validate(margins.get("tight", {}))
        each = deepfool_passes(settings.model_dump(), iterations, num_classes) + tight_passes(**closer.model_dump())
    else:
        each = deepfool_passes(settings.model_dump(), iterations, num_classes)
    return round(quality["rows"] * (each + bool(margins.get("grand"))))


def deepfool_passes(settings: Mapping[str, Any], iterations: float, num_classes: int) -> float:
    """Of one image: each iteration goes forward, backward for every candidate, and forward to see whether it has crossed;
    then the refinement, as if every image needed it."""
    first, later = (min(settings[name] or num_classes, num_classes - 1) for name in ("first_candidates", "candidates"))
    halves = 1 + first + max(0.0, iterations - 1) * (1 + later) + iterations + (settings["refine_steps"] or 0)
    return HALF * halves


def tight_passes(num_steps: int, search_steps: int) -> float:
    """Of one image after DeepFool: both ends of the first segment and the search on it; then for every tangent plane forward,
    backward, forward at the projection, and the search."""
    return HALF * (2 + search_steps + num_steps * (3 + search_steps))


def network_weight(model: Mapping[str, Any], unit: Mapping[str, Any]) -> float:
    """The arithmetic of one image through a network over that through another, both described as in model.json."""
    if all(model[key] == unit[key] for key in NETWORK):
        return 1.0
    from pipeline.reporting.arithmetic import count_flops

    return count_flops(*(model[key] for key in NETWORK)) / count_flops(*(unit[key] for key in NETWORK))


def uses_margin_model(strategy: Mapping[str, Any]) -> bool:
    """Whether a strategy's score or eps rule comes from the margin model."""
    by_score = strategy.get("score", "random") not in (None, "random")
    return by_score or strategy.get("eps", {}).get("rule", "constant") != "constant"


def hours(passes: int, passes_per_second: float) -> float:
    return passes / passes_per_second / 3600
