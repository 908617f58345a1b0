"""Manifests: the margin table in, what a strategy keeps of it out, in batches from the first column to the last."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.artifacts import (
    BATCH_ROWS,
    MANIFEST_SCHEMA,
    MARGINS_SCHEMA,
    SOURCES,
    scan_table,
    source_codes,
    table_parts,
    write_json,
)
from pipeline.pruning import KEPT, Mask, Read, Strategy, check_norms, choose, eps_function, load_columns, numbered, reasons
from pipeline.selection import chunks
from pipeline.threads import on_all_cores, one_behind
from pipeline.threat import NormName

QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)


def write_manifest(folder: Path, margins: Path, strategy: Strategy, eps: float) -> None:
    """manifest.parquet (`MANIFEST_SCHEMA`, rows in the order of margins) and summary.json. eps is the threat's, in pixel
    range.

    Raises:
        InputError: no margin table, the score is not in it, or nothing is kept.
    """
    parts = table_parts(margins, MARGINS_SCHEMA)
    num_rows = sum(pq.read_metadata(part).num_rows for part in parts)

    def read(names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        return scan_table(margins, MARGINS_SCHEMA, names)

    plan = make_plan(read, num_rows, strategy, eps)
    counts = Counts.of(plan)
    with (
        pq.ParquetWriter(
            folder / "manifest.parquet",
            MANIFEST_SCHEMA,
            # The others are a few bits per row as they are encoded, of which zstd would take a tenth, in as much of the time.
            compression={name: "zstd" if name == "eps" else "none" for name in MANIFEST_SCHEMA.names},
            use_dictionary=["source", "label", "reason"],
            column_encoding={"row": "DELTA_BINARY_PACKED", "eps": "BYTE_STREAM_SPLIT"},
            write_statistics=False,  # a quarter of the time of writing, for bounds that nobody asks for
        ) as writer,
        ThreadPoolExecutor(1) as aside,
    ):
        radii = aside.submit(describe_eps, plan)
        one_behind(writer.write_batch, manifest_batches(read, plan, counts))
    write_json(folder / "summary.json", summary(plan, counts, strategy) | radii.result())


def check_norm(margins: Path, strategy: Strategy, norm: NormName) -> None:
    """Refuse an eps rule that compares margins of one norm with radii of another.

    Raises:
        InputError: the rule does, or there is no margin table.
    """
    found = (pq.read_schema(table_parts(margins, MARGINS_SCHEMA)[0]).metadata or {}).get(b"norm", norm.encode()).decode()
    check_norms(strategy, found, norm)


def prune(margins: pa.Table, strategy: Strategy, eps: float) -> tuple[pa.Table, dict[str, Any]]:
    """As `write_manifest`, in memory: the manifest and its summary."""

    def read(names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        return iter(margins.select(list(names)).combine_chunks().to_batches(BATCH_ROWS))

    plan = make_plan(read, len(margins), strategy, eps)
    counts = Counts.of(plan)
    batches = list(manifest_batches(read, plan, counts))
    return pa.Table.from_batches(batches, MANIFEST_SCHEMA), summary(plan, counts, strategy) | describe_eps(plan)


@dataclass(frozen=True)
class Plan:
    """Of every row (n,): its label, the code of its reason among `names`, and the radius it has if it is kept; and the score
    at each cut, and the eps of the threat."""

    label: NDArray[np.int16]
    reason: NDArray[np.int8]
    radius: NDArray[np.float32]
    names: list[str]
    thresholds: dict[str, dict[str, float]]
    eps: float


def make_plan(read: Read, num_rows: int, strategy: Strategy, eps: float) -> Plan:
    """What the strategy makes of the margin table that read gives."""
    columns = load_columns(read, num_rows, strategy)
    choice = choose(columns, strategy)
    radius = np.full(num_rows, eps, np.float32)
    if strategy.uses_margin:
        radius_of = eps_function(strategy.eps, lambda: columns.margin[(choice.reason == KEPT) & choice.lowered], eps)

        def lower(part: slice) -> None:
            np.copyto(radius[part], radius_of(columns.margin[part]), where=choice.lowered[part])

        on_all_cores(lower, chunks(num_rows))
    return Plan(columns.label, choice.reason, radius, reasons(strategy), choice.thresholds, eps)


def manifest_batches(read: Read, plan: Plan, counts: "Counts") -> Iterator[pa.RecordBatch]:
    """The manifest, batch by batch; adds each to counts."""
    dictionary = pa.array(plan.names)
    for part, batch in numbered(read(["source", "row"])):
        label, reason, codes = plan.label[part], plan.reason[part], source_codes(batch)
        kept = reason == KEPT
        counts.add(codes, label, kept)
        yield pa.RecordBatch.from_arrays(
            [
                pa.DictionaryArray.from_arrays(codes, list(SOURCES)),
                batch["row"],
                label,
                kept,
                pa.array(plan.radius[part], mask=~kept),
                pa.DictionaryArray.from_arrays(reason, dictionary),
            ],
            schema=MANIFEST_SCHEMA,
        )


@dataclass(frozen=True)
class Counts:
    """Total and kept by class (2, K) and by source (2, S), batch by batch."""

    by_class: NDArray[np.int64]
    by_source: NDArray[np.int64]

    @classmethod
    def of(cls, plan: Plan) -> Self:
        """None yet, for the classes of plan."""
        return cls(np.zeros((2, int(plan.label.max(initial=0)) + 1), np.int64), np.zeros((2, len(SOURCES)), np.int64))

    def add(self, source: NDArray[np.int8], label: NDArray[np.int16], kept: Mask) -> None:
        """Count one batch."""
        num_sources, num_classes = len(SOURCES), self.by_class.shape[1]
        cell = label.astype(np.int32) * (2 * num_sources) + (2 * source + kept)
        counts = np.bincount(cell, minlength=num_classes * num_sources * 2).reshape(num_classes, num_sources, 2)
        self.by_class[:] += [counts.sum(axis=(1, 2)), counts[:, :, 1].sum(axis=1)]
        self.by_source[:] += [counts.sum(axis=(0, 2)), counts[:, :, 1].sum(axis=0)]


def summary(plan: Plan, counts: Counts, strategy: Strategy) -> dict[str, Any]:
    """Counts by reason, source and class, and the thresholds of the score."""
    total = len(plan.reason)
    # bincount would copy all of them, in eight bytes each.
    by_reason = [int(np.count_nonzero(plan.reason == code)) for code in range(len(plan.names))]
    found: dict[str, int] = {}
    for name, count in zip(plan.names, by_reason, strict=True):
        found[name] = found.get(name, 0) + count
    share = by_reason[KEPT] / total
    return {
        "total": total,
        "kept": by_reason[KEPT],
        "fraction_kept": share,
        "steps_share": share if strategy.budget == "scaled" else 1.0,
        "reasons": {name: count for name, count in found.items() if count},
        "by_source": pairs(counts.by_source, SOURCES),
        "by_class": pairs(counts.by_class, [str(k) for k in range(counts.by_class.shape[1])]),
        "thresholds": plan.thresholds,
        "eps": plan.eps,
    }


def describe_eps(plan: Plan) -> dict[str, Any]:
    """How many of the kept rows have less than the eps of the threat, and quantiles of theirs (pixel range)."""
    kept = plan.radius[plan.reason == KEPT]
    lowered = int(np.count_nonzero(kept < np.float32(plan.eps)))
    quantiles = np.quantile(kept, QUANTILES, overwrite_input=True)
    return {
        "eps_lowered": lowered,
        "eps_quantiles": {f"{q:g}": float(value) for q, value in zip(QUANTILES, quantiles, strict=True)},
    }


def pairs(counts: NDArray[np.int64], names: Sequence[str]) -> dict[str, dict[str, int]]:
    """Total and kept (2, n) by name."""
    return {name: {"total": int(total), "kept": int(kept)} for name, total, kept in zip(names, *counts, strict=True)}
