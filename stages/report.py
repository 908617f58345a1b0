"""Collect every stage's results in one report."""

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, NonNegativeInt, ValidationInfo, field_validator

from pipeline.execution import guarded_publish
from pipeline.params import StageParams, distinct
from pipeline.reporting.contrasts import check_pairs
from pipeline.reporting.headline import TABLE_FOLLOWS, print_headline
from pipeline.reporting.inputs import Artifacts
from pipeline.reporting.report import ReportSection, write_report
from pipeline.stage import run


class ReportParams(StageParams):
    """Everything but `execution`: what the report has no use for it still shows as the numbers' origin."""

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
    report: ReportSection

    @field_validator("report")
    @classmethod
    def _contrasts_are_of_strategies(cls, report: ReportSection, others: ValidationInfo) -> ReportSection:
        check_pairs(report.contrasts or (), list(others.data.get("strategies", {})))
        return report


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
    with guarded_publish("report", params, list(vars(artifacts).values()), report_path) as work:
        write_report(work, artifacts, params=params.model_dump(), seeds=params.seeds, **settings)
    if TABLE_FOLLOWS not in os.environ:
        print_headline(report_path)


if __name__ == "__main__":
    run(main)
