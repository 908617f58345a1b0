"""Clean and AutoAttack accuracy of one trained model on the whole test split."""

from pathlib import Path

from pipeline.artifacts import publish, write_table
from pipeline.evaluation import EvaluateSection, evaluate, write_metrics
from pipeline.execution import device, progress
from pipeline.images import ImageStore
from pipeline.models.checkpoint import load_model
from pipeline.params import StageParams
from pipeline.stage import run
from pipeline.threat import ThreatParams


class EvaluateParams(StageParams):
    threat: ThreatParams
    evaluate: EvaluateSection


def main(test_path: Path, model_path: Path, evaluation_path: Path, strategy: str, seed: int) -> None:
    params = EvaluateParams.load()
    section = params.evaluate
    model, description = load_model(model_path / section.checkpoint, device())
    with publish(evaluation_path) as work, progress(f"evaluate {evaluation_path.name}") as report:
        samples = evaluate(
            model, ImageStore.open(test_path), threat=params.threat, attacks=section.chosen,
            batch_size=section.batch_size, seed=section.seed, device=device(), progress=report,
        )  # fmt: skip
        write_table(work / "samples.parquet", samples)
        write_metrics(work / "metrics.json", samples, section, params.threat, strategy, seed, description)


if __name__ == "__main__":
    run(main)
