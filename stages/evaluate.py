"""Clean and AutoAttack accuracy of one trained model on the whole test split."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts import write_table
from pipeline.evaluation import EvaluateSection, evaluate, evaluate_other, shards, write_metrics
from pipeline.execution import Task, device, stage_run
from pipeline.images import ImageStore
from pipeline.models.checkpoint import describe, load_model
from pipeline.params import StageParams
from pipeline.stage import run
from pipeline.threat import ThreatParams

PART = "samples.parquet"


class EvaluateParams(StageParams):
    threat: ThreatParams
    evaluate: EvaluateSection


def attack(task: Task, test_path: Path, model_path: Path, start: int, stop: int) -> None:
    """All attacks on one shard of the test images; of the other checkpoint the reference attacks alone."""
    params = EvaluateParams.model_validate_json(task.params)
    section = params.evaluate
    store = ImageStore.open(test_path)
    model, _ = load_model(model_path / section.checkpoint, device())
    samples = evaluate(
        model, store, start=start, stop=stop, threat=params.threat, attacks=section.attacks_for(len(store.classes)),
        batch_size=section.batch_size, seed=section.seed, device=device(), progress=task.report,
        reference_attacks=section.reference_attacks, checkpoint=task.checkpoint,
    )  # fmt: skip
    other, _ = load_model(model_path / section.other_checkpoint, device())
    outcomes = evaluate_other(
        other, store, start=start, stop=stop, threat=params.threat, reference_attacks=section.reference_attacks,
        batch_size=section.batch_size, seed=section.seed, device=device(),
    )  # fmt: skip
    for name, outcome in outcomes.items():
        samples = samples.append_column(name, pa.array(outcome))
    write_table(task.output / PART, samples)


def main(test_path: Path, model_path: Path, evaluation_path: Path, strategy: str, seed: int) -> None:
    params = EvaluateParams.load()
    section = params.evaluate
    with stage_run("evaluate", params, [test_path, model_path], evaluation_path, item=True) as this:
        parts = this.run(attack, shards(len(ImageStore.open(test_path)), section.shard_rows))
        samples = pa.concat_tables([pq.read_table(part / PART) for part in parts])
        with this.publish() as work:
            write_table(work / "samples.parquet", samples)
            described = describe(model_path / section.checkpoint)
            other = describe(model_path / section.other_checkpoint)["digest"]
            write_metrics(work / "metrics.json", samples, section, params.threat, strategy, seed, described, other)


if __name__ == "__main__":
    run(main)
