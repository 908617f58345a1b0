"""Adversarial training on the rows and radii of one strategy's manifest, with one seed."""

from pathlib import Path

from pipeline.artifacts import place_all, read_json
from pipeline.execution import Task, device, placement, stage_run
from pipeline.images import ImageStore
from pipeline.models import ModelParams, build_network
from pipeline.params import Section, StageParams
from pipeline.runs import save_run
from pipeline.stage import run
from pipeline.threat import ThreatParams
from pipeline.training import TrainingParams, train
from pipeline.training.pools import read_pools


class TrainSection(Section):
    model: ModelParams
    training: TrainingParams


class TrainParams(StageParams):
    threat: ThreatParams
    train: TrainSection


def fit(task: Task, train_path: Path, synthetic_path: Path, manifest_path: Path, seed: int) -> None:
    """The whole training."""
    params = TrainParams.model_validate_json(task.params)
    section = params.train
    stores = {"real": ImageStore.open(train_path), "synthetic": ImageStore.open(synthetic_path)}
    pools = read_pools(manifest_path / "manifest.parquet", stores)
    net = build_network(section.model, stores["real"].shape, len(stores["real"].classes), seed)
    result = train(
        net, pools, section.training, threat=params.threat, seed=seed, device=device(),
        steps_share=read_json(manifest_path / "summary.json")["steps_share"], progress=task.report, checkpoint=task.checkpoint,
        placement=placement(),
    )  # fmt: skip
    save_run(task.output, result, section.model, params.threat, stores, seed=seed, manifest=manifest_path)


def main(train_path: Path, synthetic_path: Path, manifest_path: Path, model_path: Path, seed: int) -> None:
    params = TrainParams.load()
    with stage_run("train", params, [train_path, synthetic_path, manifest_path], model_path, item=True) as this:
        (trained,) = this.run(fit, {"train": {"seed": seed}})
        with this.publish() as work:
            place_all(trained, work)


if __name__ == "__main__":
    run(main)
