"""Adversarial training on the rows and radii of one strategy's manifest, with one seed."""

from pathlib import Path

from pipeline.artifacts import MANIFEST_SCHEMA, publish, read_table
from pipeline.batches import kept_fraction, pools_of_manifest
from pipeline.execution import device, progress
from pipeline.images import ImageStore
from pipeline.models import ModelParams, build_network
from pipeline.params import Section, StageParams
from pipeline.runs import save_run
from pipeline.stage import run
from pipeline.threat import ThreatParams
from pipeline.training import TrainingParams, train


class TrainSection(Section):
    model: ModelParams
    training: TrainingParams


class TrainParams(StageParams):
    threat: ThreatParams
    train: TrainSection


def main(train_path: Path, synthetic_path: Path, manifest_path: Path, model_path: Path, seed: int) -> None:
    params = TrainParams.load()
    section = params.train
    stores = {"real": ImageStore.open(train_path), "synthetic": ImageStore.open(synthetic_path)}
    manifest = read_table(manifest_path / "manifest.parquet", MANIFEST_SCHEMA)
    net = build_network(section.model, stores["real"].shape, len(stores["real"].classes), seed)
    with publish(model_path) as work, progress(f"train {model_path.name}") as report:
        result = train(
            net, pools_of_manifest(manifest, stores), section.training, threat=params.threat,
            fraction_kept=kept_fraction(manifest), seed=seed, device=device(), progress=report,
        )  # fmt: skip
        save_run(work, result, section.model, params.threat, stores, seed=seed, manifest=manifest_path)


if __name__ == "__main__":
    run(main)
