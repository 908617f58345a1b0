"""Clean and AutoAttack accuracy of one trained model on the whole test split."""

from pathlib import Path

from pipeline.artifacts import write_table
from pipeline.evaluation import (
    AttackName,
    EvaluateSection,
    attack_tasks,
    evaluate,
    read_parts,
    shards,
    surviving,
    with_outcome,
    write_metrics,
)
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


def examine(task: Task, test_path: Path, model_path: Path, start: int, stop: int) -> None:
    """All but AutoAttack for the test images in [start, stop), of both checkpoints."""
    params = EvaluateParams.model_validate_json(task.params)
    section = params.evaluate
    model, _ = load_model(model_path / section.checkpoint, device())
    other, _ = load_model(model_path / section.other_checkpoint, device())
    samples = evaluate(
        model, other, ImageStore.open(test_path), start=start, stop=stop, threat=params.threat,
        reference_attacks=section.reference_attacks, batch_size=section.batch_size, seed=section.seed, device=device(),
        progress=task.report,
    )  # fmt: skip
    write_table(task.output / PART, samples)


def attack_rows(task: Task, test_path: Path, model_path: Path, attack: AttackName, rows: list[int]) -> None:
    """One attack of AutoAttack on some of the rows that survived those before it; writes those that survive it too."""
    params = EvaluateParams.model_validate_json(task.params)
    section = params.evaluate
    model, _ = load_model(model_path / section.checkpoint, device())
    survivors = surviving(
        model, ImageStore.open(test_path), rows, attack, threat=params.threat, batch_size=section.batch_size,
        seed=section.seed, device=device(), progress=task.report,
    )  # fmt: skip
    write_table(task.output / PART, survivors)


def main(test_path: Path, model_path: Path, evaluation_path: Path, strategy: str, seed: int) -> None:
    params = EvaluateParams.load()
    section, store = params.evaluate, ImageStore.open(test_path)
    attacks = section.attacks_for(len(store.classes))
    with stage_run("evaluate", params, [test_path, model_path], evaluation_path, item=True) as this:
        parts = this.run(examine, shards(store, section.task_rows))
        samples = read_parts([part / PART for part in parts])
        for attack in attacks:
            parts = this.run(attack_rows, attack_tasks(attack, samples, section.task_rows))
            samples = with_outcome(samples, attack, [part / PART for part in parts])
        with this.publish() as work:
            write_table(work / PART, samples)
            described = describe(model_path / section.checkpoint)
            other = describe(model_path / section.other_checkpoint)["digest"]
            write_metrics(work / "metrics.json", samples, section, params.threat, strategy, seed, described, other)


if __name__ == "__main__":
    run(main)
