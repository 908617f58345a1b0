"""Train the classifier whose decision boundary the margins are measured to, or import a checkpoint."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from pipeline.artifacts import place_all
from pipeline.execution import Task, device, guarded_publish, placement, stage_run
from pipeline.images import ImageStore
from pipeline.models.checkpoint import import_model
from pipeline.params import StageParams
from pipeline.reference_model import ImportedModel, TrainedModel, fit_reference
from pipeline.stage import run
from pipeline.threat import ThreatParams


class MarginModelParams(StageParams):
    threat: ThreatParams
    margin_model: Annotated[TrainedModel | ImportedModel, Field(discriminator="kind")]


def fit(task: Task, train_path: Path, synthetic_path: Path) -> None:
    """The whole training, on real and synthetic images."""
    params = MarginModelParams.model_validate_json(task.params)
    assert isinstance(params.margin_model, TrainedModel)
    stores = {"real": ImageStore.open(train_path), "synthetic": ImageStore.open(synthetic_path)}
    fit_reference(
        task.output, params.margin_model, params.threat, stores,
        device=device(), progress=task.report, checkpoint=task.checkpoint, placement=placement(),
    )  # fmt: skip


def main(train_path: Path, synthetic_path: Path, model_path: Path) -> None:
    params = MarginModelParams.load()
    section = params.margin_model
    if isinstance(section, ImportedModel):
        with guarded_publish("margin_model", params, [train_path, Path(section.path)], model_path) as work:
            import_model(Path(section.path), work / "best", ImageStore.open(train_path))
        return
    with stage_run("margin_model", params, [train_path, synthetic_path], model_path) as this:
        (trained,) = this.run(fit, {"train": {}})
        with this.publish() as work:
            place_all(trained, work)


if __name__ == "__main__":
    run(main)
