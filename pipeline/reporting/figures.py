"""Plotly figures as plain dicts: the page adds what depends on its theme (fonts, grid, background)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np

from pipeline.pruning import Strategy
from pipeline.reporting.curves import Curve, Floats
from pipeline.reporting.distributions import MarginHistogram
from pipeline.reporting.rules import PERCEPTRON, rule_of
from pipeline.reporting.runs import Manifest, Run, by_strategy

MAX_CLASS_TICKS = 50  # more class names than this cannot be read
PIXEL_LEVELS = 255  # margins and eps are drawn in 1/255 of the pixel range

# All with a contrast of at least 3 on the light and on the dark page.
GREYS = {PERCEPTRON["none"]: "#7b8794", PERCEPTRON["random"]: "#a67c52"}
COLOURS = ("#2f7de1", "#e0622b", "#12998a", "#d13d6f", "#8b5fd3", "#8c8a1c", "#3f9b3f", "#c053b8", "#1b93c4", "#b5493a")
SYMBOLS = {"circle": "●", "square": "■", "diamond": "◆", "triangle-up": "▲", "triangle-down": "▼", "star": "★"}
DASHES = ("solid", "dash", "dot", "dashdot")
SOURCE_COLOURS = {"real": "#5b7083", "synthetic": "#d0a215"}


@dataclass(frozen=True)
class Style:
    """How one strategy looks in every figure."""

    colour: str
    symbol: str
    dash: str

    @property
    def glyph(self) -> str:
        return SYMBOLS[self.symbol]


@dataclass(frozen=True)
class Figure:
    """`key` is the id of its place in the page, `data` and `layout` are Plotly's."""

    key: str
    title: str
    note: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]


def styles_of(strategies: Mapping[str, Strategy], others: Iterable[str]) -> dict[str, Style]:
    """Name -> style. A rule has one colour, the baselines their greys, and symbol and dash tell its strategies apart. The
    others, rules of the perceptron, look like the first strategy of their rule where there is one."""
    members: dict[Strategy, list[str]] = {}
    for name, strategy in strategies.items():
        members.setdefault(rule_of(strategy), []).append(name)
    for name in others:
        members.setdefault(PERCEPTRON[name], [name])
    coloured = [rule for rule in members if rule not in GREYS]
    styles = {}
    for order, (rule, names) in enumerate(members.items()):
        turn, colour = divmod(coloured.index(rule), len(COLOURS)) if rule in coloured else (0, 0)
        for place, name in enumerate(names):
            symbol, dash = list(SYMBOLS)[(order + place) % len(SYMBOLS)], DASHES[(turn + place) % len(DASHES)]
            styles[name] = Style(GREYS.get(rule, COLOURS[colour]), symbol, dash)
    return {name: styles[members[PERCEPTRON[name]][0]] for name in others if name not in styles} | styles


def numbers(values: Iterable[float]) -> list[float | None]:
    """Six digits are enough for a plot; NaN is a gap."""
    return [None if np.isnan(value) else float(f"{value:.6g}") for value in values]


def line(name: str, style: Style, x: Iterable[float], y: Iterable[float], **more: Any) -> dict[str, Any]:
    """A line that the key of the page switches on and off by its name."""
    drawn = {"color": style.colour, "dash": style.dash, "width": 2} | more.pop("line", {})
    base = {"type": "scatter", "mode": "lines", "name": name, "meta": name, "showlegend": False}
    return base | {"x": numbers(x), "y": numbers(y), "line": drawn} | more


def axis(title: str, **more: Any) -> dict[str, Any]:
    return {"title": {"text": title}, **more}


def percent(title: str, **more: Any) -> dict[str, Any]:
    return axis(title, tickformat=".0%", **more)


def accuracy_scatter(runs: Sequence[Run], styles: Mapping[str, Style]) -> Figure:
    layout = {"xaxis": percent("clean accuracy"), "yaxis": percent("robust accuracy")}
    data = scatter(runs, styles, "clean", lambda run: run.clean, "robust")
    return Figure("accuracy", "Clean and robust accuracy", "Up and to the right is better. " + SCATTER_NOTE, data, layout)


def kept_scatter(runs: Sequence[Run], styles: Mapping[str, Style], metric: str, strategies: Mapping[str, Strategy]) -> Figure:
    """`metric`: clean or robust. A line joins the means of the strategies of one rule."""
    layout = {"xaxis": percent("training samples kept"), "yaxis": percent(f"{metric} accuracy")}
    data = rule_lines(runs, styles, metric, strategies)
    note = "Up and to the left is better. " + SCATTER_NOTE + (" A line joins the shares that one rule keeps." if data else "")
    data += scatter(runs, styles, "kept", lambda run: run.manifest.kept, metric)
    return Figure(f"kept-{metric}", f"{metric.capitalize()} accuracy against data kept", note, data, layout)


def rule_lines(
    runs: Sequence[Run], styles: Mapping[str, Style], metric: str, strategies: Mapping[str, Strategy]
) -> list[dict[str, Any]]:
    """One line for each rule of several strategies; it is hidden when all of them are."""
    points: dict[Strategy, list[tuple[float, float, str]]] = {}
    for name, group in by_strategy(runs).items():
        mean = fmean(getattr(run, metric) for run in group)
        points.setdefault(rule_of(strategies[name]), []).append((group[0].manifest.kept, mean, name))
    lines = []
    for found in points.values():
        x, y, names = zip(*sorted(found), strict=True)
        if len(names) > 1:
            drawn = line(names[0], styles[names[0]], x, y, line={"dash": "solid", "width": 1.5}, hoverinfo="skip")
            lines.append(drawn | {"meta": list(names)})
    return lines


SCATTER_NOTE = "Large: mean over the seeds, bars of one standard deviation; small: single runs."


def scatter(runs: Sequence[Run], styles: Mapping[str, Style], x_name: str, x_of: Any, metric: str) -> list[dict[str, Any]]:
    """Per strategy its runs, small, and their mean with error bars; y is the accuracy that metric names."""
    data = []
    for name, group in by_strategy(runs).items():
        style, x, y = styles[name], [x_of(run) for run in group], [getattr(run, metric) for run in group]
        shared = {"type": "scatter", "mode": "markers", "name": name, "meta": name, "showlegend": False}
        marker = {"color": style.colour, "symbol": style.symbol}
        hover = f"{name}<br>{x_name} %{{x:.2%}}<br>{metric} %{{y:.2%}}<extra></extra>"
        dots = {"x": numbers(x), "y": numbers(y), "marker": marker | {"size": 6, "opacity": 0.45}, "hovertemplate": hover}
        mean: dict[str, Any] = {"x": numbers([fmean(x)]), "y": numbers([fmean(y)]), "marker": marker | {"size": 13}}
        if len(group) > 1:
            bars = {"type": "data", "color": style.colour, "thickness": 1.5, "width": 4}
            mean |= {"error_x": bars | {"array": numbers([stdev(x)])}}
            mean |= {"error_y": bars | {"array": numbers([stdev(y)])}}
        data += [shared | dots, shared | mean | {"hovertemplate": hover}]
    return data


def margin_figure(
    histogram: MarginHistogram,
    manifests: Sequence[Manifest],
    styles: Mapping[str, Style],
    eps: float | None,
    names: Mapping[str, str],
) -> Figure:
    """Share of each source per bin, the radius of the threat (None: of another norm) and the cuts of the strategies that
    prune by margin; names: what the sources are called."""
    shares = {source: count / max(1, count.sum()) for source, count in histogram.counts.items()}
    top = max((float(share.max()) for share in shares.values()), default=1.0)
    data: list[dict[str, Any]] = [
        {
            **{"type": "bar", "name": names[source], "x": numbers(PIXEL_LEVELS * histogram.centres), "y": numbers(share)},
            "width": float(PIXEL_LEVELS * (histogram.edges[1] - histogram.edges[0])),
            "marker": {"color": SOURCE_COLOURS[source], "opacity": 0.55, "line": {"width": 0}},
            "hovertemplate": f"{names[source]}<br>margin %{{x:.3g}}<br>%{{y:.2%}}<extra></extra>",
        }
        for source, share in shares.items()
    ]
    if eps is not None:
        x = PIXEL_LEVELS * eps
        data.append({"type": "scatter", "mode": "lines", "name": "eps", "x": [x, x], "y": [0, top], "line": {"dash": "dot"}})
        data[-1]["hovertemplate"] = f"eps {x:.3g}<extra></extra>"
    for manifest in manifests:
        for end, cut in margin_cuts(manifest):
            what = f"{manifest.strategy}: {end} margins from {PIXEL_LEVELS * cut:.3g} are pruned<extra></extra>"
            x = PIXEL_LEVELS * cut
            data.append(line(manifest.strategy, styles[manifest.strategy], [x, x], [0, top], hovertemplate=what))
    layout = {
        "barmode": "overlay",
        "xaxis": axis(f"signed margin, {histogram.norm} norm (1/255)", zeroline=True),
        "yaxis": percent("share of the source"),
    }
    note = (
        "Negative: the margin model gets the sample wrong. The end bins hold all that lies beyond. "
        "Vertical lines: where a strategy cuts."
    )
    return Figure("margins", "Margins of the training samples", note, data, layout)


def class_figure(
    histogram: MarginHistogram,
    classes: Sequence[str],
    manifests: Sequence[Manifest],
    styles: Mapping[str, Style],
    names: Mapping[str, str],
) -> Figure:
    """One row per class, the brighter the more of its samples have that margin; the cuts as in `margin_figure`."""
    counts = histogram.by_class
    share = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    rows = list(range(len(classes)))
    data: list[dict[str, Any]] = [
        {
            **{"type": "heatmap", "x": numbers(PIXEL_LEVELS * histogram.centres), "y": rows, "colorscale": "Viridis"},
            **{"z": [numbers(row) for row in share], "showscale": False, "text": [[name] * share.shape[1] for name in classes]},
            "hovertemplate": "class %{text}<br>margin %{x:.3g}<br>%{z:.2%} of the class<extra></extra>",
        }
    ]
    for manifest in manifests:
        for end, cut in margin_cuts(manifest):
            x, style = PIXEL_LEVELS * cut, styles[manifest.strategy]
            what = f"{manifest.strategy}: {end} margins from {x:.3g} are pruned<extra></extra>"
            data.append(line(manifest.strategy, style, [x, x], [-0.5, len(rows) - 0.5], hovertemplate=what))
    layout = {
        "height": max(340, min(1200, 120 + 22 * len(rows))),
        "xaxis": axis(f"signed margin, {histogram.norm} norm (1/255)"),
        "yaxis": {"tickvals": rows, "ticktext": list(classes), "autorange": "reversed"} if len(rows) <= MAX_CLASS_TICKS else {},
    }
    note = f"The samples, {' and '.join(names.values())}, by their label; each row adds up to one class."
    return Figure("margins-by-class", "Margins by class", note, data, layout)


def margin_cuts(manifest: Manifest) -> list[tuple[str, float]]:
    """(end, margin) where the strategy cuts, in the order of the ends; the extremes where each class has its own cut."""
    found = []
    for end in ("low", "high"):
        cuts = {cut[end] for cut in manifest.thresholds.values() if end in cut}
        if cuts and f"{end}_margin" in manifest.reasons:
            found += [(end, cut) for cut in sorted({min(cuts), max(cuts)})]
    return found


def eps_figure(distributions: Mapping[str, tuple[Floats, Floats]], styles: Mapping[str, Style]) -> Figure:
    data = []
    for name, (grid, share) in distributions.items():
        hover = f"{name}<br>%{{y:.1%}} of the kept samples<br>have eps ≤ %{{x:.3g}}/255<extra></extra>"
        data.append(line(name, styles[name], PIXEL_LEVELS * grid, share, line={"shape": "hv"}, hovertemplate=hover))
    limit = PIXEL_LEVELS * max(float(grid[-1]) for grid, _ in distributions.values())
    layout = {
        "xaxis": axis("eps of a kept sample (1/255)", range=[0, 1.03 * limit]),
        "yaxis": percent("share of the kept samples", range=[0, 1.02]),
    }
    note = "Cumulative: the share of the kept samples that is attacked with at most this radius in training."
    return Figure("eps", "Radius of the training attack", note, data, layout)


def reasons_figure(manifests: Sequence[Manifest]) -> Figure:
    """Stacked bars: what becomes of all training samples under each strategy."""
    reasons = sorted({reason for manifest in manifests for reason in manifest.reasons} - {"kept"})
    colours = {"kept": "#7b8794"} | {reason: COLOURS[index % len(COLOURS)] for index, reason in enumerate(reasons)}
    names = [manifest.strategy for manifest in manifests]
    data = [
        {
            **{"type": "bar", "orientation": "h", "name": reason.replace("_", " "), "y": names},
            "x": numbers(manifest.reasons.get(reason, 0) / manifest.num_total for manifest in manifests),
            "marker": {"color": colours[reason], "opacity": 0.45 if reason == "kept" else 0.9, "line": {"width": 0}},
            "hovertemplate": f"%{{y}}<br>{reason.replace('_', ' ')} %{{x:.1%}}<extra></extra>",
        }
        for reason in ["kept", *reasons]
    ]
    layout = {
        "barmode": "stack",
        "height": 150 + 28 * len(names),
        "xaxis": percent("share of all training samples", range=[0, 1.03], dtick=0.25),
        "yaxis": {"autorange": "reversed", "automargin": True},
    }
    return Figure("reasons", "What is pruned, and why", "", data, layout)


def training_figures(curves: Sequence[Curve], styles: Mapping[str, Style]) -> list[Figure]:
    """Loss and the accuracies on held-out training images, one line per run."""
    panels = (
        ("loss", "Training loss", axis("loss"), ".4g"),
        ("robust_accuracy", "Robust accuracy, held out", percent("robust accuracy"), ".2%"),
        ("clean_accuracy", "Clean accuracy, held out", percent("clean accuracy"), ".2%"),
    )
    figures = []
    for column, title, y_axis, form in panels:
        data = []
        for curve in curves:
            values = curve.columns[column]
            known = ~np.isnan(values)
            hover = f"{curve.run}<br>step %{{x}}<br>%{{y:{form}}}<extra></extra>"
            thin = {"line": {"width": 1.5}, "opacity": 0.85, "hovertemplate": hover}
            data.append(line(curve.strategy, styles[curve.strategy], curve.columns["step"][known], values[known], **thin))
        figures.append(Figure(f"training-{column}", title, "", data, {"xaxis": axis("step"), "yaxis": y_axis}))
    return figures


def generator_figure(columns: Mapping[str, Floats]) -> Figure:
    style = Style(SOURCE_COLOURS["synthetic"], "circle", "solid")
    data = [
        line("generator", style, columns["step"], columns["loss"], hovertemplate="step %{x}<br>loss %{y:.4g}<extra></extra>")
    ]
    return Figure("generator", "Loss of the generator", "", data, {"xaxis": axis("step"), "yaxis": axis("loss")})
