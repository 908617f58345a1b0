"""From the artifacts of all stages to the report directory."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, PositiveFloat

from pipeline.artifacts import publish
from pipeline.images import ImageStore
from pipeline.params import InputError, Section
from pipeline.pruning import Strategy
from pipeline.reporting import figures, tables
from pipeline.reporting.contrasts import Pair, derive, measure, sentences, write_differences_csv, write_differences_tex
from pipeline.reporting.curves import COLUMNS, STEP_COLUMNS, Curve, read_curve
from pipeline.reporting.distributions import eps_distribution, kept_rows, margin_histogram
from pipeline.reporting.flags import flag_sentences
from pipeline.reporting.html import Page, render
from pipeline.reporting.inputs import Artifacts, margin_quality, strategy_costs
from pipeline.reporting.perceptron_figures import perceptron_figures, read_perceptron
from pipeline.reporting.pictures import Sheet, extreme_samples, failures_sheet, margin_sheet, misclassified_samples
from pipeline.reporting.provenance import digests, provenance
from pipeline.reporting.quality import quality_sentences
from pipeline.reporting.runs import Run, by_strategy, radius, read_runs
from pipeline.reporting.summary import summarise, write_summary_csv, write_summary_tex
from pipeline.reporting.synthetic import names_of_sources, notices, read_quality, selection_sentence, short, synthetic_sheets
from pipeline.reporting.verdict import verdict


class ReportSection(Section):
    """`contact_sheet_images` per sheet (0: no sheets); `confidence` of all intervals; `passes_per_second`, of one image
    forward and backward through the trained network as your machine does them in training, turns the cost into hours;
    `contrasts` are the pairs [strategy, baseline] to test (null: those of `contrasts.derive`)."""

    title: str
    histogram_bins: Annotated[int, Field(ge=2)]
    contact_sheet_images: NonNegativeInt
    confidence: Annotated[float, Field(gt=0, lt=1)]
    passes_per_second: PositiveFloat | None = None
    contrasts: tuple[Pair, ...] | None = None


def write_report(
    target: Path,
    artifacts: Artifacts,
    *,
    params: Mapping[str, Any],
    seeds: Sequence[int],
    title: str,
    histogram_bins: int,
    contact_sheet_images: int,
    confidence: float,
    passes_per_second: float | None = None,
    contrasts: Sequence[Pair] | None = None,
) -> None:
    """Write report.html, {summary,differences}.{csv,tex}, results.csv, metrics.json and plots/*.csv; the directory is
    complete or absent. `params` are the sections of params.yaml that the artifacts come from.

    Raises:
        InputError: there are no strategies or seeds, or an artifact is missing or damaged.
    """
    strategies = {name: Strategy.model_validate(strategy) for name, strategy in params["strategies"].items()}
    if not strategies or not seeds:
        raise InputError("report: wanted at least one strategy and one seed in params.yaml, got none")
    runs = read_runs(artifacts.manifests, artifacts.evaluations, list(strategies), seeds)
    groups, manifests = by_strategy(runs), [group[0].manifest for group in by_strategy(runs).values()]
    curves = [run_curve(run, artifacts.models, "training.csv", COLUMNS) for run in runs]
    steps = [run_curve(run, artifacts.models, "steps.csv", STEP_COLUMNS) for run in runs]
    stores, quality = artifacts.stores(), read_quality(artifacts.judge)
    names = names_of_sources(stores["synthetic"].origin)
    classes = stores["real"].classes
    histogram = margin_histogram(artifacts.margins, histogram_bins, len(classes))
    costs = strategy_costs(artifacts, params, groups, len(classes))
    summary = summarise(groups, costs, confidence, passes_per_second)
    differences = measure(derive(strategies) if contrasts is None else contrasts, groups, strategies, confidence)
    perceptron = read_perceptron(artifacts.perceptron)
    styles = figures.styles_of(strategies, perceptron.rules)
    eps = radius(runs[0].eps)
    eps_shares = {manifest.strategy: eps_distribution(manifest.path, eps, histogram_bins) for manifest in manifests}
    page = Page(
        title=title,
        confidence=confidence,
        runs=runs,
        groups=groups,
        summary=summary,
        passes_per_second=passes_per_second,
        source_names=names,
        notices=notices(stores["synthetic"].origin),
        verdict=[*verdict(groups, confidence), *sentences(differences)],
        flags=flag_sentences(runs),
        contrasts=differences,
        overview=[
            figures.accuracy_scatter(runs, styles),
            *(figures.kept_scatter(runs, styles, metric, strategies) for metric in ("robust", "clean")),
        ],
        data=[
            figures.margin_figure(histogram, manifests, styles, eps if histogram.norm == runs[0].norm else None, names),
            figures.class_figure(histogram, classes, manifests, styles, names),
            figures.eps_figure(eps_shares, styles),
            figures.reasons_figure(manifests),
            *generator_figures(artifacts.generator),
        ],
        training=figures.training_figures(curves, styles),
        perceptron=perceptron,
        perceptron_rows=perceptron_figures(perceptron, styles),
        styles=styles,
        sheets=contact_sheets(artifacts, groups, contact_sheet_images, names) if contact_sheet_images else {},
        num_without_margin=histogram.num_missing,
        margin_quality=margin_quality(artifacts.margins),
        margin_sentences=quality_sentences(artifacts.margins, names),
        synthetic_quality=quality,
        selection=selection_sentence(stores["synthetic"].origin),
        synthetic_sheets=synthetic_sheets(stores, quality, contact_sheet_images, names["synthetic"])
        if contact_sheet_images
        else [],
        digests=digests(artifacts, runs),
        provenance=provenance(artifacts, params, runs, names),
    )
    with publish(target) as work:
        write_summary_csv(work / "summary.csv", summary)
        write_summary_tex(work / "summary.tex", summary)
        write_differences_csv(work / "differences.csv", differences)
        write_differences_tex(work / "differences.tex", differences)
        tables.write_results(work / "results.csv", runs, confidence)
        tables.write_means(work / "metrics.json", runs)
        tables.write_plots(work / "plots", runs, curves, steps, histogram, names)
        (work / "report.html").write_text(render(page))


def run_curve(run: Run, models: Path, file: str, columns: tuple[str, ...]) -> Curve:
    return Curve(run.name, run.strategy, read_curve(models / run.name / file, f"train@{run.name}", columns))


def generator_figures(generator: Path) -> list[figures.Figure]:
    """None where the images were not generated here."""
    path = generator / "training.csv"
    return [figures.generator_figure(read_curve(path, "generator", ("step", "loss")))] if path.is_file() else []


def contact_sheets(
    artifacts: Artifacts, groups: Mapping[str, Sequence[Run]], count: int, names: Mapping[str, str]
) -> dict[str, list[Sheet]]:
    """Sheets by strategy; "" holds those that do not depend on one. names: what the sources are called."""
    stores, test = artifacts.stores(), ImageStore.open(artifacts.real / "test")
    sizes = {source: len(store) for source, store in stores.items()}
    wrong = misclassified_samples(artifacts.margins, count)
    sheet_of = partial(margin_sheet, stores=stores, scale=figures.PIXEL_LEVELS, names={k: short(n) for k, n in names.items()})
    sheets = {"": [sheet_of("Misclassified by the margin model: lowest margins", wrong)]}
    for strategy, runs in groups.items():
        pruned, low = extreme_samples(artifacts.margins, count, kept_rows(runs[0].manifest.path, sizes))
        sheets[strategy] = [
            sheet_of("Pruned: highest margins", pruned),
            sheet_of("Kept: lowest margins", low),
            failures_sheet("Test images misclassified without an attack", runs, test, count),
        ]
    return {strategy: [sheet for sheet in found if sheet.pictures] for strategy, found in sheets.items()}
