"""Train the classifier that selects images while they are generated, on real images alone; import one, or have none."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from pipeline.artifacts import place_all, write_json
from pipeline.execution import Task, device, guarded_publish, placement, stage_run
from pipeline.images import ImageStore
from pipeline.models.checkpoint import import_model
from pipeline.params import Section, StageParams
from pipeline.reference_model import ImportedModel, TrainedModel, fit_reference
from pipeline.stage import run
from pipeline.threat import ThreatParams


class NoGuide(Section):
    """Where `synthesize.select` is none."""

    kind: Literal["none"]


class GuideParams(StageParams):
    """The margin model cannot guide the generation, because it may be trained on what is generated."""

    threat: ThreatParams
    guide: Annotated[TrainedModel | ImportedModel | NoGuide, Field(discriminator="kind")]


def fit(task: Task, train_path: Path) -> None:
    """The whole training."""
    params = GuideParams.model_validate_json(task.params)
    assert isinstance(params.guide, TrainedModel)
    stores = {"real": ImageStore.open(train_path)}
    fit_reference(
        task.output, params.guide, params.threat, stores,
        device=device(), progress=task.report, checkpoint=task.checkpoint, placement=placement(),
    )  # fmt: skip


def main(train_path: Path, guide_path: Path) -> None:
    params = GuideParams.load()
    if not isinstance(params.guide, TrainedModel):
        imported = [Path(params.guide.path)] if isinstance(params.guide, ImportedModel) else []
        with guarded_publish("guide", params, [train_path, *imported], guide_path) as work:
            if isinstance(params.guide, ImportedModel):
                import_model(Path(params.guide.path), work / "best", ImageStore.open(train_path))
            write_json(work / "guide.json", {"kind": params.guide.kind})
        return
    with stage_run("guide", params, [train_path], guide_path) as this:
        (trained,) = this.run(fit, {"train": {}})
        with this.publish() as work:
            place_all(trained, work)
            write_json(work / "guide.json", {"kind": params.guide.kind})


if __name__ == "__main__":
    run(main)
