"""Train the classifier whose decision boundary the margins are measured to, or import a checkpoint."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt

from pipeline.artifacts import publish
from pipeline.batches import full_pool
from pipeline.execution import device, progress
from pipeline.images import ImageStore
from pipeline.models import ModelParams, build_network
from pipeline.models.checkpoint import import_model
from pipeline.params import Section, StageParams
from pipeline.runs import save_run
from pipeline.stage import run
from pipeline.threat import ThreatParams
from pipeline.training import TrainingParams, train


class TrainedModel(Section):
    """Train on all real and synthetic images with the eps of the threat; `training.loss: standard` for a plain model."""

    kind: Literal["train"]
    model: ModelParams
    training: TrainingParams
    seed: NonNegativeInt


class ImportedModel(Section):
    """A directory with model.safetensors and model.json."""

    kind: Literal["import"]
    path: str


class MarginModelParams(StageParams):
    threat: ThreatParams
    margin_model: Annotated[TrainedModel | ImportedModel, Field(discriminator="kind")]


def main(train_path: Path, synthetic_path: Path, model_path: Path) -> None:
    params = MarginModelParams.load()
    section = params.margin_model
    stores = {"real": ImageStore.open(train_path), "synthetic": ImageStore.open(synthetic_path)}
    with publish(model_path) as work:
        if isinstance(section, ImportedModel):
            import_model(Path(section.path), work / "best", stores["real"])
            return
        net = build_network(section.model, stores["real"].shape, len(stores["real"].classes), section.seed)
        pools = {source: full_pool(store, params.threat.eps) for source, store in stores.items()}
        with progress("margin_model") as report:
            result = train(
                net, pools, section.training, threat=params.threat, fraction_kept=1.0, seed=section.seed,
                device=device(), progress=report,
            )  # fmt: skip
        save_run(work, result, section.model, params.threat, stores, seed=section.seed)


if __name__ == "__main__":
    run(main)
