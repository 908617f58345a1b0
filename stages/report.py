"""Collect every stage's results in one report."""

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, NonNegativeInt

from pipeline.params import StageParams, distinct
from pipeline.reporting.inputs import Artifacts
from pipeline.reporting.report import ReportSection, write_report
from pipeline.reporting.tables import TABLE_FOLLOWS, print_headline
from pipeline.stage import run


class ReportParams(StageParams):
    """Everything but `execution`: what the report has no use for it still shows as the numbers' origin."""

    report: ReportSection
    threat: dict[str, Any]
    ingest: dict[str, Any]
    generator: dict[str, Any]
    guide: dict[str, Any]
    synthesize: dict[str, Any]
    margin_model: dict[str, Any]
    judge: dict[str, Any]
    margins: dict[str, Any]
    strategies: dict[str, Any]
    train: dict[str, Any]
    evaluate: dict[str, Any]
    perceptron: dict[str, Any]
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1), AfterValidator(distinct)]


def main(
    real_path: Path,
    synthetic_path: Path,
    generator_path: Path,
    margin_model_path: Path,
    judge_path: Path,
    margins_path: Path,
    manifests_path: Path,
    models_path: Path,
    evaluations_path: Path,
    perceptron_path: Path,
    report_path: Path,
) -> None:
    params = ReportParams.load()
    artifacts = Artifacts(
        real_path, synthetic_path, generator_path, margin_model_path, judge_path, margins_path,
        manifests_path, models_path, evaluations_path, perceptron_path,
    )  # fmt: skip
    settings = params.report.model_dump()
    write_report(report_path, artifacts, params=params.model_dump(), seeds=params.seeds, **settings)
    if TABLE_FOLLOWS not in os.environ:
        print_headline(report_path)


if __name__ == "__main__":
    run(main)
