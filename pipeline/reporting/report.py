"""From the artifacts of all stages to the report directory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pyarrow.parquet as pq
from pydantic import Field, NonNegativeInt

from pipeline.artifacts import digest_file, publish, read_json
from pipeline.images import ImageStore
from pipeline.params import InputError, Section
from pipeline.reporting import figures, tables
from pipeline.reporting.curves import Curve, read_curve
from pipeline.reporting.distributions import eps_distribution, kept_rows, margin_histogram, parts
from pipeline.reporting.html import Page, render
from pipeline.reporting.perceptron_figures import perceptron_figures, read_perceptron
from pipeline.reporting.pictures import Sheet, extreme_samples, failures_sheet, margin_sheet, misclassified_samples
from pipeline.reporting.runs import Run, by_strategy, read_runs
from pipeline.reporting.verdict import compare_with_baselines, verdict


class ReportSection(Section):
    """`contact_sheet_images` per sheet (0: no sheets); `confidence` of all intervals."""

    title: str
    histogram_bins: Annotated[int, Field(ge=2)]
    contact_sheet_images: NonNegativeInt
    confidence: Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True)
class Artifacts:
    """The directories of the stages that the report shows."""

    real: Path
    synthetic: Path
    generator: Path
    margins: Path
    manifests: Path
    models: Path
    evaluations: Path
    perceptron: Path

    def stores(self) -> dict[str, ImageStore]:
        """Source of the training samples -> its store."""
        return {"real": ImageStore.open(self.real / "train"), "synthetic": ImageStore.open(self.synthetic)}


def write_report(
    target: Path,
    artifacts: Artifacts,
    *,
    strategies: Mapping[str, Any],
    seeds: Sequence[int],
    title: str,
    histogram_bins: int,
    contact_sheet_images: int,
    confidence: float,
) -> None:
    """Write report.html, results.csv, metrics.json and plots/*.csv; the directory is complete or absent.

    Raises:
        InputError: there are no strategies or seeds, or an artifact is missing or damaged.
    """
    if not strategies or not seeds:
        raise InputError("report: wanted at least one strategy and one seed in params.yaml, got none")
    runs = read_runs(artifacts.manifests, artifacts.evaluations, list(strategies), seeds)
    groups, manifests = by_strategy(runs), [group[0].manifest for group in by_strategy(runs).values()]
    curves = [run_curve(run, artifacts.models) for run in runs]
    histogram = margin_histogram(artifacts.margins, histogram_bins)
    perceptron = read_perceptron(artifacts.perceptron)
    styles = figures.styles_of([*strategies, *perceptron.rules])
    eps = radius(runs[0].eps)
    eps_shares = {manifest.strategy: eps_distribution(manifest.path, eps, histogram_bins) for manifest in manifests}
    page = Page(
        title=title,
        confidence=confidence,
        runs=runs,
        groups=groups,
        verdict=verdict(groups, confidence),
        comparisons=compare_with_baselines(groups, confidence),
        overview=[figures.accuracy_scatter(runs, styles), figures.kept_scatter(runs, styles)],
        data=[
            figures.margin_figure(histogram, manifests, styles, eps),
            figures.eps_figure(eps_shares, styles),
            figures.reasons_figure(manifests),
            *generator_figures(artifacts.generator),
        ],
        training=figures.training_figures(curves, styles),
        perceptron=perceptron,
        perceptron_rows=perceptron_figures(perceptron, styles),
        styles=styles,
        sheets=contact_sheets(artifacts, groups, contact_sheet_images) if contact_sheet_images else {},
        num_without_margin=histogram.num_missing,
        digests=digests(artifacts, runs),
        provenance={"strategies": dict(strategies), "seeds": list(seeds)} | provenance(artifacts),
    )
    with publish(target) as work:
        tables.write_results(work / "results.csv", runs, confidence)
        tables.write_means(work / "metrics.json", runs)
        tables.write_plots(work / "plots", runs, curves, histogram)
        (work / "report.html").write_text(render(page))


def radius(exact: str) -> float:
    """ "8/255" as a number."""
    over, _, under = exact.partition("/")
    return float(over) / float(under or 1)


def run_curve(run: Run, models: Path) -> Curve:
    columns = read_curve(models / run.name / "training.csv", f"train@{run.name}")
    return Curve(run.name, run.strategy, columns)


def generator_figures(generator: Path) -> list[figures.Figure]:
    """None where the images were not generated here."""
    path = generator / "training.csv"
    return [figures.generator_figure(read_curve(path, "generator", ("step", "loss")))] if path.is_file() else []


def contact_sheets(artifacts: Artifacts, groups: Mapping[str, Sequence[Run]], count: int) -> dict[str, list[Sheet]]:
    """Sheets by strategy; "" holds those that do not depend on one."""
    stores, test = artifacts.stores(), ImageStore.open(artifacts.real / "test")
    sizes = {source: len(store) for source, store in stores.items()}
    wrong = misclassified_samples(artifacts.margins, count)
    sheets = {"": [margin_sheet("Misclassified by the margin model: lowest margins", wrong, stores, figures.PIXEL_LEVELS)]}
    for strategy, runs in groups.items():
        pruned, low = extreme_samples(artifacts.margins, count, kept_rows(runs[0].manifest.path, sizes))
        sheets[strategy] = [
            margin_sheet("Pruned: highest margins", pruned, stores, figures.PIXEL_LEVELS),
            margin_sheet("Kept: lowest margins", low, stores, figures.PIXEL_LEVELS),
            failures_sheet("Test images misclassified without an attack", runs, test, count),
        ]
    return {strategy: [sheet for sheet in found if sheet.pictures] for strategy, found in sheets.items()}


def digests(artifacts: Artifacts, runs: Sequence[Run]) -> dict[str, str]:
    """SHA-256 of what the numbers come from, by place; store.json and summary.json hold those of the larger files."""
    files = {
        "real/train/store.json": artifacts.real / "train" / "store.json",
        "real/test/store.json": artifacts.real / "test" / "store.json",
        "synthetic/store.json": artifacts.synthetic / "store.json",
        "perceptron/perceptron.json": artifacts.perceptron / "perceptron.json",
    }
    for run in runs:
        files[f"manifests/{run.strategy}/summary.json"] = run.manifest.path.with_name("summary.json")
        files[f"evaluations/{run.name}/metrics.json"] = artifacts.evaluations / run.name / "metrics.json"
    models = {f"models/{run.name} (weights)": run.model for run in runs if run.model}
    return {place: digest_file(path) for place, path in files.items()} | models


def provenance(artifacts: Artifacts) -> dict[str, Any]:
    """Where the images come from, how the margins were measured, and the perceptron's parameters."""
    stores = {"real train": artifacts.real / "train", "real test": artifacts.real / "test", "synthetic": artifacts.synthetic}
    metadata = pq.read_schema(parts(artifacts.margins)[0]).metadata or {}
    return {
        **{name: read_json(path / "store.json").get("origin", {}) for name, path in stores.items()},
        "margins": {key.decode(): value.decode() for key, value in metadata.items() if key != b"ARROW:schema"},
        "perceptron": read_json(artifacts.perceptron / "perceptron.json").get("params", {}),
    }
