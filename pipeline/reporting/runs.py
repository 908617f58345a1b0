"""The evaluated runs: what each strategy kept, and how its models of every seed did on the test images."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts import read_json
from pipeline.params import InputError
from pipeline.reporting.intervals import Outcomes


@dataclass(frozen=True)
class Manifest:
    """What one strategy kept. `eps` is the radius of the threat in pixel range, `thresholds` as in summary.json."""

    strategy: str
    path: Path
    num_total: int
    num_kept: int
    reasons: dict[str, int]
    by_source: dict[str, dict[str, int]]
    thresholds: dict[str, dict[str, float]]

    @property
    def kept(self) -> float:
        """Fraction of the training samples that is kept."""
        return self.num_kept / self.num_total


@dataclass(frozen=True)
class Run:
    """One trained and evaluated model; `clean` and `robust` are accuracies, `*_outcomes` are theirs per test example;
    `reference` has the accuracies under the attacks beside AutoAttack, `flags` what AutoAttack would warn of, `other` the
    accuracies of the other checkpoint (best or last), clean and under those attacks."""

    manifest: Manifest
    seed: int
    clean: float
    robust: float
    norm: str
    eps: str
    num_examples: int
    attacks: dict[str, float]
    clean_outcomes: Outcomes = field(repr=False)
    robust_outcomes: Outcomes = field(repr=False)
    train: dict[str, Any]
    version: str = ""
    checkpoint: str = ""
    model: str = ""
    reference: dict[str, float] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)
    other: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def strategy(self) -> str:
        return self.manifest.strategy

    @property
    def name(self) -> str:
        return f"{self.strategy}-{self.seed}"


def read_runs(manifests: Path, evaluations: Path, strategies: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """Every strategy with every seed, in this order.

    Raises:
        InputError: an artifact is missing or does not agree with itself; the message names the stage to run.
    """
    runs = []
    for strategy in strategies:
        manifest = read_manifest(manifests / strategy)
        runs += [read_run(manifest, seed, evaluations / f"{strategy}-{seed}") for seed in seeds]
    check_comparable(runs)
    return runs


def check_comparable(runs: Sequence[Run]) -> None:
    """Raise an `InputError` unless all runs met as many examples in the same ball."""
    first = runs[0]
    for run in runs:
        if (run.num_examples, run.norm, run.eps) != (first.num_examples, first.norm, first.eps):
            raise InputError(
                f"evaluation {run.name}: {run.num_examples} examples in {run.norm} of {run.eps}, but {first.name} has "
                f"{first.num_examples} in {first.norm} of {first.eps}; run `dvc repro`, or compare revisions of one threat"
            )


def read_manifest(path: Path) -> Manifest:
    """As `read_summary`, of a manifest that is there as a whole."""
    need(path / "manifest.parquet", f"manifest@{path.name}")
    return read_summary(path)


def read_summary(path: Path) -> Manifest:
    """A manifest of which only summary.json is needed."""
    keys = ("total", "kept", "reasons", "by_source", "thresholds")
    summary = read_made(path / "summary.json", f"manifest@{path.name}", keys)
    return Manifest(path.name, path / "manifest.parquet", *(summary[key] for key in keys))


def read_run(manifest: Manifest, seed: int, path: Path) -> Run:
    stage = f"evaluate@{path.name}"
    wanted = ("clean", "robust", "norm", "eps", "num_examples", "attacks", "train")
    metrics = read_made(path / "metrics.json", stage, wanted)
    samples = pq.read_table(need(path / "samples.parquet", stage))
    clean, robust = read_outcomes(samples, list(metrics["attacks"]), path)
    for name, outcomes in (("clean", clean), ("robust", robust)):
        if len(outcomes) != metrics["num_examples"] or abs(outcomes.mean() - metrics[name]) * len(outcomes) > 0.5:
            raise InputError(
                f"{path}: {name} accuracy is {metrics[name]} of {metrics['num_examples']} in metrics.json but "
                f"{outcomes.mean()} of {len(outcomes)} in samples.parquet; run `dvc repro -f {stage}`"
            )
    more = {
        key: metrics[key]
        for key in ("version", "checkpoint", "model", "reference", "flags", "other", "versions")
        if key in metrics
    }
    values = {key: metrics[key] for key in wanted}
    return Run(manifest=manifest, seed=seed, clean_outcomes=clean, robust_outcomes=robust, **values, **more)


def read_outcomes(samples: pa.Table, attacks: list[str], path: Path) -> tuple[Outcomes, Outcomes]:
    """Correct without and under every attack, in the order of the rows of the test store."""
    missing = [name for name in ["row", "clean", *attacks] if name not in samples.column_names]
    if missing:
        raise InputError(f"{path}/samples.parquet: wanted the column {missing[0]}, got {samples.column_names}; run `dvc repro`")
    order = np.argsort(samples["row"].to_numpy())
    clean: Outcomes = samples["clean"].to_numpy()[order].astype(bool)
    survived = [samples[attack].to_numpy()[order].astype(bool) for attack in attacks]
    return clean, np.logical_and.reduce([clean, *survived])


def read_made(path: Path, stage: str, keys: Sequence[str]) -> dict[str, Any]:
    """A JSON artifact with at least these keys."""
    content: dict[str, Any] = read_json(need(path, stage))
    missing = [key for key in keys if key not in content]
    if missing:
        raise InputError(f"{path}: wanted the key {missing[0]!r}, got {', '.join(content)}; run `dvc repro -f {stage}`")
    return content


def need(path: Path, stage: str) -> Path:
    """path, if it is there."""
    if not path.is_file():
        raise InputError(f"{path}: not there; run `dvc repro {stage}`")
    return path


def by_strategy(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Strategy -> its runs, in the order of runs."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.strategy, []).append(run)
    return groups


def radius(exact: str) -> float:
    """ "8/255" as a number."""
    over, _, under = exact.partition("/")
    return float(over) / float(under or 1)
