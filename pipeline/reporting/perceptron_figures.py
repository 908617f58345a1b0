"""The perceptron's shares and learning curves, from the files of its stage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.artifacts import read_json
from pipeline.csv_tables import read_csv
from pipeline.params import InputError
from pipeline.reporting.figures import Figure, Style, axis, line, numbers, percent

SHARES = ("rule", "fraction", "exact", "monte_carlo", "standard_error")
CURVES = ("rule", "fraction", "alpha", "clean_mean", "clean_std", "robust_mean", "robust_std")
Row = Mapping[str, str]
MOST_TICKS = 8  # of alpha, which three panels side by side have room for


@dataclass(frozen=True)
class Perceptron:
    """What the perceptron stage found."""

    conclusions: list[str]
    exact: list[str]
    against_none: list[str]
    shares: list[dict[str, str]]
    curves: list[dict[str, str]]

    @property
    def rules(self) -> list[str]:
        return list(dict.fromkeys(row["rule"] for row in self.shares))

    @property
    def ceiling(self) -> float:
        """The robust accuracy of the teacher: what no attack can push over the true boundary."""
        return 1 - next(float(row["exact"]) for row in self.shares if row["rule"] == "none")


def read_perceptron(path: Path) -> Perceptron:
    """Read the stage's directory.

    Raises:
        InputError: a file is missing or lacks what is drawn.
    """
    content = read_json(path / "perceptron.json")
    try:
        found = content["conclusions"], content["exact"], content["against_none"]
    except KeyError as error:
        raise InputError(f"{path}/perceptron.json: wanted the key {error}; run `dvc repro -f perceptron`") from None
    return Perceptron(*found, read_csv(path / "shares.csv", SHARES), read_csv(path / "curves.csv", CURVES))


def perceptron_figures(perceptron: Perceptron, styles: Mapping[str, Style]) -> list[list[Figure]]:
    """Rows of figures: the shares, then robust and then clean accuracy against alpha for every pruned fraction."""
    fractions = sorted({float(row["fraction"]) for row in perceptron.curves} - {0.0})
    curves = [
        [learning_figure(perceptron, styles, metric, fraction) for fraction in fractions] for metric in ("robust", "clean")
    ]
    return [[shares_figure(perceptron, styles)], *curves]


def shares_figure(perceptron: Perceptron, styles: Mapping[str, Style]) -> Figure:
    """Closed forms as lines, Monte Carlo as markers with two standard errors; no pruning is the point at 0."""
    data = []
    starts = {row["rule"]: row for row in perceptron.shares if float(row["fraction"]) == 0}
    for rule in perceptron.rules:
        rows = [row for row in perceptron.shares if row["rule"] == rule]
        if rule not in starts:
            rows.insert(0, starts["adaptive_eps" if rule == "puma" else "none"])
        x, style = column(rows, "fraction"), styles[rule]
        bars = {"type": "data", "array": numbers(2 * value for value in column(rows, "standard_error")), "color": style.colour}
        marks = {"mode": "markers", "y": numbers(column(rows, "monte_carlo")), "error_y": bars}
        hover = f"{rule}<br>pruned %{{x:.0%}}<br>%{{y:.2%}}<extra></extra>"
        exact = line(rule, style, x, column(rows, "exact"), hovertemplate=hover)
        marker = {"color": style.colour, "symbol": style.symbol, "size": 8}
        data += [exact, exact | marks | {"marker": marker}]
    layout = {
        "xaxis": percent("fraction pruned"),
        "yaxis": percent("kept samples within reach", range=[-0.03, 1.05]),
    }
    note = "What an attack can push over the true boundary. Lines join the exact values; markers: drawn samples."
    return Figure("perceptron-shares", "Perturbed samples that cross the boundary", note, data, layout)


def learning_figure(perceptron: Perceptron, styles: Mapping[str, Style], metric: str, fraction: float) -> Figure:
    """Mean accuracy over the seeds with one standard deviation, the unpruned rules in every panel."""
    data = []
    for rule in perceptron.rules:
        mine = [row for row in perceptron.curves if row["rule"] == rule]
        rows = [row for row in mine if float(row["fraction"]) in (0.0, fraction)]
        bars = {"type": "data", "array": numbers(column(rows, f"{metric}_std")), "thickness": 1, "width": 3}
        marker = {"symbol": styles[rule].symbol, "size": 7}
        hover = f"{rule}<br>alpha %{{x}}<br>{metric} %{{y:.3f}}<extra></extra>"
        values = column(rows, "alpha"), column(rows, f"{metric}_mean")
        data.append(line(rule, styles[rule], *values, mode="lines+markers", marker=marker, error_y=bars, hovertemplate=hover))
    alphas = sorted({float(row["alpha"]) for row in perceptron.curves})
    if metric == "robust":
        limit = {"x": [alphas[0], alphas[-1]], "y": [perceptron.ceiling] * 2, "line": {"dash": "dot", "width": 1.5}}
        told = "no student can be more robust<br>%{y:.3f}<extra></extra>"
        data.append({"type": "scatter", "mode": "lines", "name": "limit", "showlegend": False, "hovertemplate": told, **limit})
    lows = [float(row[f"{metric}_mean"]) - float(row[f"{metric}_std"]) for row in perceptron.curves]
    highs = [float(row[f"{metric}_mean"]) + float(row[f"{metric}_std"]) for row in perceptron.curves]
    ticks = alphas[:: 1 + len(alphas) // (MOST_TICKS + 1)]
    layout = {
        "xaxis": axis("alpha = kept samples / dimension", type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks]),
        "yaxis": percent(f"{metric} accuracy", range=[min(lows) - 0.02, max(highs) + 0.02]),
    }
    key = f"perceptron-{metric}-{100 * fraction:g}".replace(".", "-")
    return Figure(key, f"{metric.capitalize()} accuracy, {100 * fraction:g}% pruned", "", data, layout)


def column(rows: Sequence[Row], name: str) -> list[float]:
    return [float(row[name]) for row in rows]
