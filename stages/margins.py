"""Measure the signed DeepFool margin of every training image, real and synthetic."""

from pathlib import Path

from pipeline.artifacts import publish
from pipeline.execution import device, progress
from pipeline.images import ImageStore
from pipeline.margins import MarginsSection, write_margins
from pipeline.models.checkpoint import load_model
from pipeline.params import StageParams
from pipeline.stage import run
from pipeline.threat import BALLS, ThreatParams


class MarginsParams(StageParams):
    threat: ThreatParams
    margins: MarginsSection


def main(train_path: Path, synthetic_path: Path, model_path: Path, margins_path: Path) -> None:
    params = MarginsParams.load()
    stores = {"real": ImageStore.open(train_path), "synthetic": ImageStore.open(synthetic_path)}
    model, description = load_model(model_path / "best", device())
    with publish(margins_path) as work, progress("margins") as report:
        write_margins(
            work, model, stores, ball=BALLS[params.threat.norm], settings=params.margins,
            model_digest=description["digest"], device=device(), progress=report,
        )  # fmt: skip


if __name__ == "__main__":
    run(main)
