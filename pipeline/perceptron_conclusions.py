"""What the perceptron's numbers say: rules compared over paired seeds, sentences, and the files of the artifact."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

from pipeline.artifacts import publish, write_json
from pipeline.csv_tables import write_csv
from pipeline.perceptron import RULES, Floats, Point, Share

SHARE_COLUMNS = ("rule", "fraction", "exact", "monte_carlo", "standard_error", "num_kept")
CURVE_COLUMNS = (
    *("rule", "fraction", "alpha", "num_kept", "num_pool"),
    *("clean_mean", "clean_std", "robust_mean", "robust_std", "num_collapsed"),
)
METRICS = ("robust", "clean")
CONFIDENCE = 0.99  # high, for a table holds dozens of comparisons
SMALLEST_DIFFERENCE = 1e-3  # accuracies are printed with three digits: what they do not show is no difference


def compare(ours: Floats, theirs: Floats) -> int:
    """1, 0 or -1: higher, not told apart, lower; a paired t-test over the seeds (num_seeds,) at `CONFIDENCE` tells."""
    difference = ours - theirs
    error = stdtrit(len(difference) - 1, (1 + CONFIDENCE) / 2) * difference.std(ddof=1) / np.sqrt(len(difference))
    return int(np.sign(difference.mean())) if abs(difference.mean()) > max(error, SMALLEST_DIFFERENCE) else 0


def find_winners(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Per metric and alpha: the setting with the highest mean, and those that are not told apart from it."""
    winners = []
    for metric in METRICS:
        for alpha, group in groupby(sorted(points, key=lambda point: point.alpha), key=lambda point: point.alpha):
            values = {point.setting: (point, getattr(point, metric)) for point in group}
            best = max(values, key=lambda setting: float(values[setting][1].mean()))
            tied = [rival for rival in values if rival != best and compare(values[best][1], values[rival][1]) < 1]
            means = {key: round(float(values[setting][1].mean()), 6) for key, setting in (("value", best), ("none", "none"))}
            winners.append(
                {"metric": metric, "alpha": alpha, "rule": values[best][0].rule, "setting": best, "tied": tied, **means}
            )
    return winners


def conclude(shares: Sequence[Share], points: Sequence[Point], *, eps: float, probe_angle_deg: float) -> list[str]:
    """What the numbers say, in sentences."""
    none = next(share for share in shares if share.rule == "none")
    off = max((abs(s.monte_carlo - s.exact) / s.standard_error for s in shares if s.standard_error), default=0.0)
    told = [
        f"An attack of radius {eps:g} can push {none.exact:.1%} of all samples over the true boundary: no student is more "
        f"robust than {1 - none.exact:.3f}. {none.num_kept:,} drawn samples agree with all exact shares to {off:.1f} standard "
        "errors.",
        f"Samples are pruned by {margins_from(probe_angle_deg)}.",
    ]
    pruning = [rule for rule, how in RULES.items() if how.prunes in ("easy", "hard") and not how.lowers_eps]
    told += [describe_shares(rule, found) for rule in pruning if (found := [share for share in shares if share.rule == rule])]
    winners = find_winners(points)
    return told + [describe_winners(metric, [best for best in winners if best["metric"] == metric]) for metric in METRICS]


def describe_shares(rule: str, shares: Sequence[Share]) -> str:
    parts = ", ".join(f"{share.exact:.1%} with {share.fraction:.0%} pruned" for share in shares)
    return f"Share of the kept samples within reach of the true boundary after {rule}: {parts}."


def describe_winners(metric: str, winners: Sequence[dict[str, Any]]) -> str:
    """Per winner the alphas at which it wins, the values there, and who is level with it; or that none is not beaten."""
    above = [best for best in winners if best["setting"] != "none" and "none" not in best["tied"]]
    parts = []
    for setting, group in groupby(above, key=lambda best: str(best["setting"])):
        won = list(group)
        values = f"{span([best['value'] for best in won])}; without pruning {span([best['none'] for best in won])}"
        level = [f"{', '.join(best['tied'])} at alpha {best['alpha']:g}" for best in won if best["tied"]]
        alphas = ", ".join(f"{best['alpha']:g}" for best in won)
        parts.append(f"{setting} at alpha {alphas} ({values}{'; level with it ' * bool(level)}{' and '.join(level)})")
    rest = ", ".join(f"{best['alpha']:g}" for best in winners if best not in above)
    parts += [f"no rule beats none at alpha {rest}"] if rest else []
    return f"Highest {metric} accuracy: {'; '.join(parts)}."


def span(values: Sequence[float]) -> str:
    low, high = f"{values[0]:.3f}", f"{values[-1]:.3f}"
    return low if low == high else f"{low} to {high}"


def margins_from(probe_angle_deg: float) -> str:
    if probe_angle_deg == 0:
        return "the true margins, those of the teacher"
    return f"the margins of a probe perceptron at {probe_angle_deg:g} degrees from the teacher"


def compare_with_none(points: Sequence[Point]) -> list[str]:
    """One sentence per setting: where it is above and below `none` with as many kept samples."""
    others = dict.fromkeys((point.rule, point.fraction) for point in points if point.rule != "none")
    return [against_none(points, rule, fraction) for rule, fraction in others]


def against_none(points: Sequence[Point], rule: str, fraction: float) -> str:
    none = {point.alpha: point for point in points if point.rule == "none"}
    ours = [point for point in points if (point.rule, point.fraction) == (rule, fraction)]
    parts = []
    for metric in METRICS:
        signs = {point.alpha: compare(getattr(point, metric), getattr(none[point.alpha], metric)) for point in ours}
        for wanted, word in ((1, "higher"), (-1, "lower")):
            alphas = [f"{alpha:g}" for alpha, sign in signs.items() if sign == wanted]
            if alphas:
                parts.append(f"{word} {metric} accuracy at alpha {', '.join(alphas)}")
    collapsed = sum(point.num_collapsed for point in ours)
    if collapsed:
        parts.append(f"{collapsed} of {sum(len(point.clean) for point in ours)} students collapsed to one class")
    return f"{ours[0].setting} against none: {'; '.join(parts) or 'no difference that the seeds tell apart'}."


def write_perceptron(target: Path, params: dict[str, Any], shares: Sequence[Share], points: Sequence[Point]) -> None:
    """Write perceptron.json, shares.csv and curves.csv (means and standard deviations over the seeds)."""
    content = {
        "params": params,
        "margins_from": margins_from(params["probe_angle_deg"]),
        "winners": find_winners(points),
        "conclusions": conclude(shares, points, eps=params["eps"], probe_angle_deg=params["probe_angle_deg"]),
        "against_none": compare_with_none(points),
    }
    share_rows = [(s.rule, s.fraction, s.exact, s.monte_carlo, s.standard_error, s.num_kept) for s in shares]
    with publish(target) as work:
        write_json(work / "perceptron.json", content)
        write_csv(work / "shares.csv", SHARE_COLUMNS, share_rows)
        write_csv(work / "curves.csv", CURVE_COLUMNS, [curve_row(point) for point in points])


def curve_row(point: Point) -> tuple[object, ...]:
    spread = [float(f(values)) for values in (point.clean, point.robust) for f in (np.mean, lambda v: np.std(v, ddof=1))]
    return (point.rule, point.fraction, point.alpha, point.num_kept, point.num_pool, *spread, point.num_collapsed)
