"""Collect every stage's results in one report."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, NonNegativeInt

from pipeline.params import StageParams, distinct
from pipeline.reporting.report import Artifacts, ReportSection, write_report
from pipeline.reporting.tables import print_headline
from pipeline.stage import run


class ReportParams(StageParams):
    report: ReportSection
    strategies: dict[str, Any]
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1), AfterValidator(distinct)]


def main(
    real_path: Path,
    synthetic_path: Path,
    generator_path: Path,
    margins_path: Path,
    manifests_path: Path,
    models_path: Path,
    evaluations_path: Path,
    perceptron_path: Path,
    report_path: Path,
) -> None:
    params = ReportParams.load()
    artifacts = Artifacts(
        real_path, synthetic_path, generator_path, margins_path,
        manifests_path, models_path, evaluations_path, perceptron_path,
    )  # fmt: skip
    write_report(report_path, artifacts, strategies=params.strategies, seeds=params.seeds, **params.report.model_dump())
    print_headline(report_path)


if __name__ == "__main__":
    run(main)
