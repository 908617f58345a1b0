"""What the strategies cost, in images and in passes: counts, because hours would differ from run to run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# A pass is one image forward and backward. These are the passes of one image in one update of the weights.
UPDATE_PASSES = {"standard": 1, "pgd_at": 1, "trades": 2, "mart": 2}


@dataclass(frozen=True)
class Cost:
    """Of one model of a strategy. `margins` is paid once whatever the number of seeds; 0 where no margin is used."""

    images_seen: int
    images_attacked: int
    training: int
    margins: int

    @property
    def passes(self) -> int:
        return self.training + self.margins


def training_passes(counted: Mapping[str, int], training: Mapping[str, Any]) -> int:
    """Passes of the updates and of the attack's steps; counted: `images_seen` and `images_attacked`."""
    updates = counted["images_seen"] * UPDATE_PASSES[training["loss"]]
    return updates + counted["images_attacked"] * int(training["attack"]["num_steps"])


def margin_passes(quality: Mapping[str, Any], margins: Mapping[str, Any], num_classes: int) -> int:
    """Passes of DeepFool over all training images, one per candidate class and iteration, and of GraNd."""
    settings = margins["deepfool"]
    first = min(settings.get("first_candidates") or num_classes - 1, num_classes - 1)
    later = (quality["mean_iterations"] - 1) * min(settings["candidates"] or first, first)
    return round(quality["rows"] * (first + max(0, later) + bool(margins.get("grand"))))


def uses_margin_model(strategy: Mapping[str, Any]) -> bool:
    """Whether a strategy's score or eps rule comes from the margin model."""
    by_score = strategy.get("score", "random") not in (None, "random")
    return by_score or strategy.get("eps", {}).get("rule", "constant") != "constant"


def hours(passes: int, passes_per_second: float) -> float:
    return passes / passes_per_second / 3600
