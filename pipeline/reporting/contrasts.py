"""Planned contrasts: the pairs of strategies that the report tests, chosen by what they do and not by what came out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.csv_tables import write_csv
from pipeline.params import InputError
from pipeline.pruning import Strategy
from pipeline.reporting.intervals import Difference, bonferroni
from pipeline.reporting.rules import CONSTANT, plain
from pipeline.reporting.summary import tex_name, write_tex
from pipeline.reporting.verdict import METRICS, MOST_NAMES, TOLD, Groups, Metric, difference, join

Pair = tuple[str, str]  # strategy, baseline
DETAILS = ("eps", "per_class", "applies_to", "misclassified", "not_converged")  # settings whose effect is tested one by one


@dataclass(frozen=True)
class Contrast:
    """One strategy less its baseline. `differs_in`: the settings in which they differ; `kept`: the shares of the rows."""

    strategy: str
    baseline: str
    differs_in: list[str]
    kept: float
    baseline_kept: float
    clean: Difference
    robust: Difference

    @property
    def name(self) -> str:
        return f"{self.strategy} less {self.baseline}"


def derive(strategies: Mapping[str, Strategy]) -> list[Pair]:
    """Every strategy with every other one that is its baseline, and with the first of those above it of which it is a
    variant."""
    pairs: list[Pair] = []
    for place, (name, strategy) in enumerate(strategies.items()):
        baselines = [other for other, baseline in strategies.items() if is_baseline(baseline, strategy)]
        above = [other for other in list(strategies)[:place] if is_variant(strategy, strategies[other])]
        pairs += [(name, other) for other in [*baselines, *above[:1]]]
    return pairs


def is_baseline(baseline: Strategy, strategy: Strategy) -> bool:
    """Whether baseline is what is left of strategy without one of its parts, or without all: nothing done at all; all rows
    with its radii; its rows with the radius of the threat; as many rows at random, for as many steps."""
    ours, theirs = plain(strategy), plain(baseline)
    if theirs == ours:
        return False
    if theirs.score == "random" and ours.score not in (None, "random"):
        same = all(getattr(theirs, name) == getattr(ours, name) for name in ("keep", "applies_to", "budget"))
        return same and theirs.eps in (CONSTANT, ours.eps)
    unpruned, unlowered = plain(ours.model_copy(update={"score": None})), ours.model_copy(update={"eps": CONSTANT})
    return theirs in (Strategy(), unpruned, unlowered)


def is_variant(strategy: Strategy, reference: Strategy) -> bool:
    """Whether it differs in one of the `DETAILS` alone, both having radii of their own where that is eps."""
    ours, theirs = plain(strategy), plain(reference)
    found = differing(ours, theirs)
    return len(found) == 1 and found[0] in DETAILS and ("eps" not in found or CONSTANT not in (ours.eps, theirs.eps))


def differing(a: Strategy, b: Strategy) -> list[str]:
    return [name for name in Strategy.model_fields if getattr(a, name) != getattr(b, name)]


def check_pairs(pairs: Sequence[Pair], names: Sequence[str]) -> None:
    """Raise an `InputError` unless each pair is of two different names."""
    for pair in pairs:
        if len(set(pair)) != 2 or not set(pair) <= set(names):
            raise InputError(f"contrasts: wanted pairs of two strategies out of {', '.join(names)}, got {list(pair)}")


def measure(pairs: Sequence[Pair], groups: Groups, strategies: Mapping[str, Strategy], confidence: float) -> list[Contrast]:
    """The intervals of one accuracy hold together with the given confidence, and the tests reject together at its level."""
    each = bonferroni(confidence, len(pairs))
    found = []
    for ours, theirs in pairs:
        differs_in = differing(strategies[ours], strategies[theirs])
        kept, baseline_kept = (groups[name][0].manifest.kept for name in (ours, theirs))
        clean, robust = (difference(groups, ours, theirs, metric, each) for metric in METRICS)
        found.append(Contrast(ours, theirs, differs_in, kept, baseline_kept, clean, robust))
    return found


def sentences(contrasts: Sequence[Contrast]) -> list[str]:
    """For each accuracy which of the contrasts are supported, or how many where a sentence has no room for them."""
    told = []
    for metric in ("robust", "clean") if contrasts else ():
        parts = [part for sign in (1, -1) for part in supported(contrasts, metric, sign)]
        count = sum(getattr(contrast, metric).sign != 0 for contrast in contrasts)
        which = f": {'; '.join(parts)}" if 0 < len(parts) <= MOST_NAMES else ", see the table below" if parts else ""
        told.append(f"Planned contrasts of {metric} accuracy: {count} of {len(contrasts)} told apart{which}.")
    return told


def supported(contrasts: Sequence[Contrast], metric: Metric, sign: int) -> list[str]:
    """One part of a sentence for each strategy that is higher (sign 1) or lower (-1) than baselines of its own."""
    baselines: dict[str, list[str]] = {}
    for contrast in contrasts:
        if getattr(contrast, metric).sign == sign:
            baselines.setdefault(contrast.strategy, []).append(contrast.baseline)
    return [f"{strategy} is {TOLD[sign]} than {join(names)}" for strategy, names in baselines.items()]


def write_differences_csv(path: Path, contrasts: Sequence[Contrast]) -> None:
    """Shares and differences as fractions; `confidence` is that of each interval alone."""
    header = ["strategy", "baseline", "differs_in", "kept", "baseline_kept", "seeds", "confidence"]
    header += [f"{metric}{end}" for metric in METRICS for end in ("", "_low", "_high", "_p", "_verdict")]
    rows: list[list[object]] = []
    for each in contrasts:
        kept = [" ".join(each.differs_in), each.kept, each.baseline_kept]
        row: list[object] = [each.strategy, each.baseline, *kept, each.clean.num_seeds, each.clean.confidence]
        for found in (each.clean, each.robust):
            row += [found.mean, found.low, found.high, f"{found.p_value:.2g}", TOLD[found.sign]]
        rows.append(row)
    write_csv(path, header, rows)


def write_differences_tex(path: Path, contrasts: Sequence[Contrast]) -> None:
    """A table for booktabs: differences in points with their intervals, the p-value, and what is supported."""
    columns = {
        "contrast": [tex_name(each.name) for each in contrasts],
        "kept (\\%)": [f"{100 * each.kept:.0f} / {100 * each.baseline_kept:.0f}" for each in contrasts],
    }
    for metric in METRICS:
        found: list[Difference] = [getattr(each, metric) for each in contrasts]
        columns[f"{metric} (points)"] = [tex_points(each) for each in found]
        columns[f"{metric} $p$"] = [f"{each.p_value:.2g}" for each in found]
        columns[f"{metric} verdict"] = [TOLD[each.sign] for each in found]
    write_tex(path, columns, "lrrrlrrl")


def tex_points(found: Difference) -> str:
    text = f"{100 * found.mean:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    return text.replace("-", "$-$")
