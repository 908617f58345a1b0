"""Measure the signed DeepFool margin of every training image, real and synthetic."""

from pathlib import Path

from pipeline.artifacts import place_all
from pipeline.execution import Task, device, stage_run
from pipeline.images import ImageStore
from pipeline.margin_quality import write_quality
from pipeline.margins import MarginsSection, foretold_norms, place_parts, shards, write_shard
from pipeline.models.checkpoint import load_model
from pipeline.params import StageParams
from pipeline.stage import run
from pipeline.threat import ThreatParams

PART = "part.parquet"


class MarginsParams(StageParams):
    threat: ThreatParams
    margins: MarginsSection


def measure(task: Task, train_path: Path, synthetic_path: Path, model_path: Path, source: str, start: int, stop: int) -> None:
    """The margins of one shard."""
    params = MarginsParams.model_validate_json(task.params)
    stores = {"real": ImageStore.open(train_path), "synthetic": ImageStore.open(synthetic_path)}
    model, description = load_model(model_path / "best", device())
    ball = params.margins.ball(params.threat)
    scale = foretold_norms(model, stores["real"], ball, params.margins, device())
    write_shard(
        task.output / PART, model, stores[source], source=source, start=start, stop=stop, ball=ball, settings=params.margins,
        scale=scale, model_digest=description["digest"], device=device(), progress=task.report,
    )  # fmt: skip


def judge(task: Task, train_path: Path, synthetic_path: Path, model_path: Path, parts: list[str]) -> None:
    """All shards together, and how good they are."""
    params = MarginsParams.model_validate_json(task.params)
    stores = {"real": ImageStore.open(train_path), "synthetic": ImageStore.open(synthetic_path)}
    model, _ = load_model(model_path / "best", device())
    place_parts(task.output, [Path(part) for part in parts])
    ball = params.margins.ball(params.threat)
    write_quality(task.output, model, stores, ball=ball, settings=params.margins, device=device())


def main(train_path: Path, synthetic_path: Path, model_path: Path, margins_path: Path) -> None:
    params = MarginsParams.load()
    stores = {"real": ImageStore.open(train_path), "synthetic": ImageStore.open(synthetic_path)}
    with stage_run("margins", params, [train_path, synthetic_path, model_path], margins_path) as this:
        parts = this.run(measure, shards(stores, params.margins.shard_rows))
        (judged,) = this.run(judge, {"quality": {"parts": [str(part / PART) for part in parts]}})
        with this.publish() as work:
            place_all(judged, work)


if __name__ == "__main__":
    run(main)
