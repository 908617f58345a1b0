"""Two experiments side by side: git revisions, dvc experiments or the workspace, paired on the same test images."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dvc.api import DVCFileSystem
from dvc.exceptions import DvcException
from dvc.scm import RevError, SCMError

from pipeline.artifacts import read_json
from pipeline.params import InputError, read_yaml
from pipeline.reporting.intervals import Difference, bonferroni, paired_difference, pooled_variance
from pipeline.reporting.runs import Run, by_strategy, check_comparable, read_run, read_summary
from pipeline.reporting.verdict import METRICS, TOLD, Metric, mean_of

WORKSPACE = "workspace"
PARAMS, TEST_STORE = "params.yaml", "data/real/test/store.json"


@dataclass(frozen=True)
class Experiment:
    """`test` identifies the test images and their labels."""

    name: str
    params: dict[str, Any]
    test: Any
    runs: list[Run]


@dataclass(frozen=True)
class Change:
    """One strategy's accuracy in the two experiments, over the seeds that both have, and the second less the first."""

    strategy: str
    metric: Metric
    first: float
    second: float
    difference: Difference


def read_experiment(name: str) -> Experiment:
    """The runs of a git revision, a dvc experiment or the workspace, from DVC's cache.

    Raises:
        InputError: there is no such experiment, or its results are not in the cache.
    """
    if not name:
        raise InputError("compare: wanted a git revision, a dvc experiment or workspace, got an empty name")
    with TemporaryDirectory() as folder:
        try:
            fetch = Fetch(DVCFileSystem(rev=None if name == WORKSPACE else name), Path(folder))
            params = read_yaml(fetch(PARAMS))
            runs = [run for strategy in params["strategies"] for run in read_strategy(fetch, strategy, params["seeds"])]
            store = read_json(fetch(TEST_STORE))
        except (RevError, SCMError) as error:
            raise InputError(f"compare: no revision or experiment {name!r} ({error}); `dvc exp list` shows them") from None
        except (OSError, DvcException) as error:
            raise InputError(f"compare: {name} has no results to read ({error}); check it out and run `dvc repro`") from None
    test = (store["labels_sha256"], [shard["sha256"] for shard in store["shards"]])
    return Experiment(name, params, test, runs)


@dataclass(frozen=True)
class Fetch:
    """Brings single files of an experiment into a folder, and nothing large."""

    files: DVCFileSystem
    folder: Path

    def __call__(self, place: str) -> Path:
        target = self.folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        self.files.get_file(place, str(target))
        return target


def read_strategy(fetch: Fetch, strategy: str, seeds: Sequence[int]) -> list[Run]:
    manifest = read_summary(fetch(f"data/manifests/{strategy}/summary.json").parent)
    runs = []
    for seed in seeds:
        place = f"data/evaluations/{strategy}-{seed}"
        fetch(f"{place}/samples.parquet")
        runs.append(read_run(manifest, seed, fetch(f"{place}/metrics.json").parent))
    return runs


def compare(first: Experiment, second: Experiment, confidence: float) -> list[Change]:
    """Every strategy that both have and whose models differ, in the order of the first; all intervals of one metric hold
    together.

    Raises:
        InputError: the two were not measured on the same images by the same attacks, or share no strategy and seed.
    """
    check_comparable([*first.runs, *second.runs])
    if first.test != second.test:
        raise InputError(f"compare: {first.name} and {second.name} were evaluated on different test images")
    if (attacks := list(first.runs[0].attacks)) != (others := list(second.runs[0].attacks)):
        raise InputError(f"compare: {first.name} was attacked by {attacks}, {second.name} by {others}")
    pairs = pair_up(first, second)
    if not pairs:
        raise InputError(f"compare: {first.name} and {second.name} share no strategy and seed")
    changed = {name: pair for name, pair in pairs.items() if not are_same(*pair)}
    distinct = [*(before for before, _ in pairs.values()), *(after for _, after in changed.values())]
    together = bonferroni(confidence, len(changed))
    changes = []
    for metric in METRICS:
        seeds = pooled_variance([getattr(run, metric) for run in group] for group in distinct)
        for name, (before, after) in changed.items():
            was, now = ([getattr(run, f"{metric}_outcomes") for run in group] for group in (before, after))
            found = paired_difference(now, was, together, seeds)
            changes.append(Change(name, metric, mean_of(before, metric), mean_of(after, metric), found))
    return changes


def pair_up(first: Experiment, second: Experiment) -> dict[str, tuple[list[Run], list[Run]]]:
    """Strategy -> its runs in both, with the seeds that both have in the same order; at least one."""
    ours, theirs = by_strategy(first.runs), by_strategy(second.runs)
    pairs = {name: shared_seeds(ours[name], theirs[name]) for name in ours if name in theirs}
    return {name: pair for name, pair in pairs.items() if pair[0]}


def are_same(before: Sequence[Run], after: Sequence[Run]) -> bool:
    """Whether the models are, byte for byte: nothing to compare."""
    return [run.model for run in before] == [run.model for run in after]


def shared_seeds(first: Sequence[Run], second: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """The runs of the seeds that both have, in the same order."""
    others = {run.seed: run for run in second}
    mine = [run for run in first if run.seed in others]
    return mine, [others[run.seed] for run in mine]


def changed_params(first: Experiment, second: Experiment) -> list[tuple[str, Any, Any]]:
    """(key, first, second) of every parameter that differs, "-" where one has none; where a job ran is none, and neither are
    those of a strategy that only one has."""
    old, new = (dict(flatten(each.params)) for each in (first, second))
    apart = tuple(f"strategies.{name}." for name in [*only_in(first, second), *only_in(second, first)])
    keys = [key for key in dict.fromkeys([*old, *new]) if not f"{key}.".startswith(("execution.", *apart))]
    return [(key, old.get(key, "-"), new.get(key, "-")) for key in keys if old.get(key, "-") != new.get(key, "-")]


def only_in(one: Experiment, other: Experiment) -> list[str]:
    """The strategies of one that the other lacks."""
    return [name for name in one.params["strategies"] if name not in other.params["strategies"]]


def flatten(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every leaf; lists are leaves."""
    for key, value in params.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def report_lines(first: Experiment, second: Experiment, changes: Sequence[Change], confidence: float) -> Iterator[str]:
    """What the command prints."""
    yield f"{first.name} -> {second.name}, {first.runs[0].num_examples} test images, {first.runs[0].norm} {first.runs[0].eps}"
    for key, old, new in changed_params(first, second):
        yield f"  {key}: {old} -> {new}"
    for one, other in ((first, second), (second, first)):
        if alone := only_in(one, other):
            yield f"  only in {one.name}: {', '.join(alone)}"
    if same := [name for name, pair in pair_up(first, second).items() if are_same(*pair)]:
        yield f"  the same models in both: {', '.join(same)}"
    if not changes:
        return
    header = ["strategy", "accuracy", first.name, second.name, "points", f"{100 * confidence:g}% interval", "McNemar p", ""]
    rows = [header, *(row_of(change) for change in changes)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    for row in rows:
        names = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        numbers = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        yield "  ".join([*names, *numbers]).rstrip()
    seeds = sorted({change.difference.num_seeds for change in changes})
    yield f"Paired on the same test images, seeds: {' to '.join(map(str, seeds))}. The intervals of one accuracy hold together."
    if seeds[0] < 2:
        yield "One seed compares models, not experiments: no difference is called real."


def row_of(change: Change) -> list[str]:
    found = change.difference
    accuracies = [f"{100 * value:.2f}%" for value in (change.first, change.second)]
    points = [f"{100 * found.mean:+.2f}", f"[{100 * found.low:+.2f}, {100 * found.high:+.2f}]"]
    return [change.strategy, change.metric, *accuracies, *points, f"{found.p_value:.2g}", TOLD[found.sign]]
