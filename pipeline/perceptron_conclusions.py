"""What the perceptron's numbers say: rules compared over paired seeds, sentences, and the files of the artifact.

alpha counts the samples that are kept: rules that prune chose theirs from a larger pool than `none` saw. What they gain may
cost samples, not training. Only against `none` on the whole pool do both start from the same samples.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

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
CONFIDENCE = 0.95  # of all comparisons together
SMALLEST_DIFFERENCE = 1e-3  # accuracies are printed with three digits: what they do not show is no difference
RIVALS = ("none", "random", "prune_easy")  # what the claim of PUMA is about

Outcome = Literal["wins", "loses", "is level", "collapses"]
Case = tuple[float, float]  # fraction pruned, alpha


def count_comparisons(points: Sequence[Point]) -> int:
    """Every pair of settings at every alpha in every metric, for the winners are chosen by what is compared, and `puma`
    against `none` on its whole pool."""
    per_alpha = [len(list(group)) for _, group in groupby(sorted(point.alpha for point in points))]
    pairs = sum(count * (count - 1) // 2 for count in per_alpha) + len(whole_pools(points))
    return max(1, pairs * len(METRICS))


def tail_of(points: Sequence[Point]) -> float:
    """Level of one comparison at which all hold together with `CONFIDENCE` (Bonferroni)."""
    return (1 - CONFIDENCE) / count_comparisons(points)


def compare(ours: Floats, theirs: Floats, tail: float) -> int:
    """1, 0 or -1: higher, not told apart, lower; a two-sided paired t-test over the seeds (num_seeds,) at level tail tells."""
    difference = ours - theirs
    error = stdtrit(len(difference) - 1, 1 - tail / 2) * difference.std(ddof=1) / np.sqrt(len(difference))
    return int(np.sign(difference.mean())) if abs(difference.mean()) > max(error, SMALLEST_DIFFERENCE) else 0


def collapsed(point: Point) -> bool:
    """Whether half of the students or more say one class always."""
    return 2 * point.num_collapsed >= len(point.clean)


def outcome(ours: Point, theirs: Point, metric: str, tail: float) -> Outcome:
    if collapsed(ours):
        return "collapses"
    outcomes: dict[int, Outcome] = {1: "wins", 0: "is level", -1: "loses"}
    return outcomes[compare(getattr(ours, metric), getattr(theirs, metric), tail)]


def whole_pools(points: Sequence[Point]) -> list[tuple[Point, Point]]:
    """Each point of `puma` with that of `none` on all samples of its pool, where there is one."""
    none = {point.num_kept: point for point in points if point.rule == "none"}
    return [(point, none[point.num_pool]) for point in points if point.rule == "puma" and point.num_pool in none]


def with_rival(points: Sequence[Point], rule: str, rival: str) -> list[tuple[Point, Point]]:
    """Each point of rule with that of rival that keeps as many samples, of the same fraction where rival prunes."""
    known = {(point.fraction, point.alpha): point for point in points if point.rule == rival}
    pairs = [(point, known.get((point.fraction, point.alpha), known.get((0.0, point.alpha)))) for point in points]
    return [(point, other) for point, other in pairs if point.rule == rule and other is not None]


def find_winners(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Per metric and alpha: the setting with the highest mean, and those that are not told apart from it."""
    winners = []
    tail = tail_of(points)
    for metric in METRICS:
        for alpha, group in groupby(sorted(points, key=lambda point: point.alpha), key=lambda point: point.alpha):
            values = {point.setting: (point, getattr(point, metric)) for point in group}
            best = max(values, key=lambda setting: float(values[setting][1].mean()))
            tied = [rival for rival in values if rival != best and compare(values[best][1], values[rival][1], tail) < 1]
            means = {key: round(float(values[setting][1].mean()), 6) for key, setting in (("value", best), ("none", "none"))}
            winners.append(
                {"metric": metric, "alpha": alpha, "rule": values[best][0].rule, "setting": best, "tied": tied, **means}
            )
    return winners


def conclude(points: Sequence[Point]) -> list[str]:
    """What the students show: the claim of PUMA, every rule against none, the winners, and how differences are told."""
    rules = [rule for rule in RULES if rule != "none" and any(point.rule == rule for point in points)]
    told = [describe_claim(points)] if "puma" in rules else []
    told += [describe_rule(points, rule) for rule in rules]
    winners, grid = find_winners(points), alphas_of(points)
    told += [describe_winners(metric, [best for best in winners if best["metric"] == metric], grid) for metric in METRICS]
    told.append(
        f"A difference is named where a paired t test over the {len(points[0].clean)} seeds tells it and it exceeds "
        f"{100 * SMALLEST_DIFFERENCE:g} points; all {count_comparisons(points):,} comparisons hold together with "
        f"{CONFIDENCE:.0%} confidence (Bonferroni)."
    )
    return told


def describe_claim(points: Sequence[Point]) -> str:
    """Where `puma` has higher clean accuracy than its rivals and no lower robust accuracy, as far as the seeds tell."""
    tail = tail_of(points)
    against = {rival: with_rival(points, "puma", rival) for rival in RIVALS}
    against["none on the whole pool of which puma keeps a part"] = whole_pools(points)
    held = {name: [claim_holds(*pair, tail) for pair in pairs] for name, pairs in against.items() if pairs}
    judged = [holds for found in held.values() for holds in found]
    verdict = "everywhere" if all(judged) else "in part" if any(judged) else "nowhere"
    alike: dict[str, list[str]] = {}
    for name, found in held.items():
        alike.setdefault(count_cases([ours for ours, _ in against[name]], found), []).append(name)
    parts = [f"against {enumerate_words(names)} {text}" for text, names in alike.items()]
    return (
        "The claim of PUMA, more clean accuracy and no less robustness with as many samples kept, holds "
        f"{verdict}: {'; '.join(parts)}."
    )


def claim_holds(ours: Point, theirs: Point, tail: float) -> bool:
    robust, clean = (outcome(ours, theirs, metric, tail) for metric in METRICS)
    return clean == "wins" and robust in ("wins", "is level")


def count_cases(points: Sequence[Point], held: Sequence[bool]) -> str:
    if len(set(held)) == 1:
        return f"in {'all' if held[0] else '0 of'} {len(held)} cases"
    cases = [(point.fraction, point.alpha) for point, holds in zip(points, held, strict=True) if holds]
    return f"in {len(cases)} of {len(held)} cases, {where(cases, alphas_of(points))}"


def describe_rule(points: Sequence[Point], rule: str) -> str:
    """Where a rule wins over none with as many samples kept, loses, is level with it, or collapses."""
    pairs, grid, tail = with_rival(points, rule, "none"), alphas_of(points), tail_of(points)
    lost = [(ours.fraction, ours.alpha) for ours, _ in pairs if collapsed(ours)]
    if len(lost) == len(pairs):
        return f"{rule} against none: its students collapse to one class throughout."
    told = f"its students collapse to one class {where(lost, grid)}; otherwise " if lost else ""
    parts = []
    for metric in METRICS:
        gaps: dict[Outcome, dict[Case, float]] = {}
        for ours, none in pairs:
            gap = float((getattr(ours, metric) - getattr(none, metric)).mean())
            gaps.setdefault(outcome(ours, none, metric, tail), {})[ours.fraction, ours.alpha] = gap
        parts.append(describe_outcomes(gaps, grid))
    robust, clean = parts
    both = f"in robust and clean accuracy it {robust}"
    each = f"in robust accuracy it {robust}; in clean accuracy it {clean}"
    return f"{rule} against none: {told}{both if robust == clean else each}."


def describe_outcomes(gaps: Mapping[Outcome, Mapping[Case, float]], grid: Sequence[float]) -> str:
    """Of the cases that did not collapse, with the largest difference from none; where a rule is level is what remains."""
    known: tuple[Outcome, ...] = ("wins", "loses")
    decided = [name for name in known if name in gaps]
    alone = len(decided) == 1 and "is level" not in gaps
    parts = []
    for name in decided:
        largest = max(abs(gap) for gap in gaps[name].values())
        parts.append(f"{name} by up to {100 * largest:.1f} points {'throughout' if alone else where(gaps[name], grid)}")
    if "is level" in gaps:
        parts.append(f"is level {'elsewhere' if parts else 'throughout'}")
    return enumerate_words(parts)


def where(cases: Iterable[Case], grid: Sequence[float]) -> str:
    """Such as "at alpha 2 to 8 (20% pruned) and 4 (50% and 80% pruned)"."""
    texts: dict[str, list[str]] = {}
    for fraction, group in groupby(sorted(cases), key=lambda case: case[0]):
        texts.setdefault(ranges([alpha for _, alpha in group], grid), []).extend([f"{fraction:.0%}"] if fraction else [])
    pruned = [f" ({enumerate_words(shares)} pruned)" if shares else "" for shares in texts.values()]
    return f"at alpha {enumerate_words(map(str.__add__, texts, pruned))}"


def ranges(chosen: Sequence[float], grid: Sequence[float]) -> str:
    """Such as "2 to 8, 32": neighbours in the grid are joined."""
    runs: list[list[float]] = []
    for alpha in chosen:
        if runs and grid.index(alpha) == grid.index(runs[-1][-1]) + 1:
            runs[-1].append(alpha)
        else:
            runs.append([alpha])
    return ", ".join(f"{run[0]:g}" if len(run) == 1 else f"{run[0]:g} to {run[-1]:g}" for run in runs)


def enumerate_words(words: Iterable[str]) -> str:
    """Such as "a, b and c"."""
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last


def alphas_of(points: Iterable[Point]) -> list[float]:
    return sorted({point.alpha for point in points})


def describe_winners(metric: str, winners: Sequence[dict[str, Any]], grid: Sequence[float]) -> str:
    """Per winner the alphas at which it wins, the values there, and where others are level with it; where none is unbeaten."""
    above = [best for best in winners if best["setting"] != "none" and "none" not in best["tied"]]
    parts = []
    for setting, group in groupby(above, key=lambda best: str(best["setting"])):
        won = list(group)
        values = f"{span([best['value'] for best in won])}; without pruning {span([best['none'] for best in won])}"
        level = [best["alpha"] for best in won if best["tied"]]
        level_at = f"; level with others at alpha {ranges(level, grid)}" if level else ""
        parts.append(f"{setting} at alpha {ranges([best['alpha'] for best in won], grid)} ({values}{level_at})")
    rest = [best["alpha"] for best in winners if best not in above]
    parts += [f"no rule beats none at alpha {ranges(rest, grid)}"] if rest else []
    return f"Highest {metric} accuracy: {'; '.join(parts)}."


def span(values: Sequence[float]) -> str:
    low, high = f"{values[0]:.3f}", f"{values[-1]:.3f}"
    return low if low == high else f"{low} to {high}"


def describe_shares(shares: Sequence[Share], *, eps: float, probe_angle_deg: float) -> list[str]:
    """What holds exactly, whatever a student learns."""
    none = next(share for share in shares if share.rule == "none")
    off = max((abs(s.monte_carlo - s.exact) / s.standard_error for s in shares if s.standard_error), default=0.0)
    told = [
        f"An attack of radius {eps:g} can push {none.exact:.1%} of all samples over the true boundary: no student is more "
        f"robust than {1 - none.exact:.3f}. {none.num_kept:,} drawn samples agree with all exact shares to {off:.1f} standard "
        "errors.",
        f"Samples are pruned by {margins_from(probe_angle_deg)}.",
    ]
    for rule, how in RULES.items():
        parts = [f"{share.exact:.1%} with {share.fraction:.0%} pruned" for share in shares if share.rule == rule]
        if parts and how.prunes in ("easy", "hard") and not how.lowers_eps:
            told.append(f"Share of the kept samples within reach of the true boundary after {rule}: {', '.join(parts)}.")
    return told


def margins_from(probe_angle_deg: float) -> str:
    if probe_angle_deg == 0:
        return "the true margins, those of the teacher"
    return f"the margins of a probe perceptron at {probe_angle_deg:g} degrees from the teacher"


def compare_with_none(points: Sequence[Point]) -> list[str]:
    """One sentence per setting: where it is above and below `none` with as many kept samples."""
    others = dict.fromkeys((point.rule, point.fraction) for point in points if point.rule != "none")
    return [against_none(points, rule, fraction) for rule, fraction in others]


def against_none(points: Sequence[Point], rule: str, fraction: float) -> str:
    pairs = [pair for pair in with_rival(points, rule, "none") if pair[0].fraction == fraction]
    grid, tail, parts = alphas_of(points), tail_of(points), []
    for metric in METRICS:
        signs = {ours.alpha: compare(getattr(ours, metric), getattr(none, metric), tail) for ours, none in pairs}
        for wanted, word in ((1, "higher"), (-1, "lower")):
            alphas = [alpha for alpha, sign in signs.items() if sign == wanted]
            if alphas:
                parts.append(f"{word} {metric} accuracy at alpha {ranges(alphas, grid)}")
    num_collapsed = sum(ours.num_collapsed for ours, _ in pairs)
    if num_collapsed:
        parts.append(f"{num_collapsed} of {sum(len(ours.clean) for ours, _ in pairs)} students collapsed to one class")
    return f"{pairs[0][0].setting} against none: {'; '.join(parts) or 'no difference that the seeds tell apart'}."


def write_perceptron(target: Path, params: dict[str, Any], shares: Sequence[Share], points: Sequence[Point]) -> None:
    """Write perceptron.json, shares.csv and curves.csv (means and standard deviations over the seeds)."""
    content = {
        "params": params,
        "margins_from": margins_from(params["probe_angle_deg"]),
        "winners": find_winners(points),
        "conclusions": conclude(points),
        "exact": describe_shares(shares, eps=params["eps"], probe_angle_deg=params["probe_angle_deg"]),
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
