"""Manifests: the margin table in, what a strategy keeps of it out, in batches from the first column to the last."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.artifacts import MANIFEST_SCHEMA, MARGINS_SCHEMA, SOURCES, scan_table, table_parts, write_json
from pipeline.params import InputError
from pipeline.pruning import KEPT, Choice, Mask, Read, Strategy, choose, eps_function, load_columns, reasons
from pipeline.selection import CHUNK_ROWS
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
        return scan_table(margins, MARGINS_SCHEMA, names, CHUNK_ROWS)

    summary = Summary(eps, num_rows, strategy.budget)
    encodings = {"row": "DELTA_BINARY_PACKED", "eps": "BYTE_STREAM_SPLIT"}
    with (
        pq.ParquetWriter(
            folder / "manifest.parquet",
            MANIFEST_SCHEMA,
            compression="zstd",
            use_dictionary=["source", "label", "reason"],
            column_encoding=encodings,
            write_statistics=False,  # a quarter of the time of writing, for bounds that nobody asks for
        ) as writer,
        ThreadPoolExecutor(1) as behind,  # one batch is compressed while the next is made
    ):
        written = behind.submit(int)
        for batch in manifest_batches(read, num_rows, strategy, eps, summary):
            written.result()
            written = behind.submit(writer.write_batch, batch)
        written.result()
    write_json(folder / "summary.json", summary.content())


def check_norm(margins: Path, strategy: Strategy, norm: NormName) -> None:
    """Refuse an eps rule that compares margins of one norm with radii of another.

    Raises:
        InputError: the rule does, or there is no margin table.
    """
    found = (pq.read_schema(table_parts(margins, MARGINS_SCHEMA)[0]).metadata or {}).get(b"norm", norm.encode()).decode()
    if found != norm and strategy.eps.compares_norms:
        raise InputError(
            f"eps rule {strategy.eps.rule}: wanted margins in {norm}, the norm of the threat, to compare with its radius, got "
            f"{found}; use the rule rank or constant, or set margins.norm to null"
        )


def prune(margins: pa.Table, strategy: Strategy, eps: float) -> tuple[pa.Table, dict[str, Any]]:
    """As `write_manifest`, in memory: the manifest and its summary."""
    summary = Summary(eps, len(margins), strategy.budget)

    def read(names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        return iter(margins.select(list(names)).combine_chunks().to_batches(CHUNK_ROWS))

    batches = list(manifest_batches(read, len(margins), strategy, eps, summary))
    return pa.Table.from_batches(batches, MANIFEST_SCHEMA), summary.content()


def manifest_batches(read: Read, num_rows: int, strategy: Strategy, eps: float, summary: "Summary") -> Iterator[pa.RecordBatch]:
    """The manifest of the margin table that read gives, batch by batch, and its counts into summary."""
    columns = load_columns(read, num_rows, strategy)
    choice = choose(columns, strategy)
    names = reasons(strategy)
    summary.begin(choice, names, int(columns.label.max(initial=0)) + 1)
    radius = eps_function(strategy.eps, lambda: columns.margin[(choice.reason == KEPT) & choice.lowered], eps)
    dictionary = pa.array(names)
    start = 0
    for batch in read(["source", "row"]):
        part = slice(start, start + len(batch))
        start = part.stop
        kept = choice.reason[part] == KEPT
        eps_i = np.full(len(batch), eps, np.float32)
        if strategy.uses_margin:
            eps_i = np.where(choice.lowered[part], radius(columns.margin[part]), eps_i)
        label = columns.label[part]
        codes = source_codes(batch)
        summary.add(codes, label, kept, eps_i)
        yield pa.RecordBatch.from_arrays(
            [
                pa.DictionaryArray.from_arrays(codes, list(SOURCES)),
                batch["row"],
                label,
                kept,
                pa.array(eps_i, mask=~kept),
                pa.DictionaryArray.from_arrays(choice.reason[part], dictionary),
            ],
            schema=MANIFEST_SCHEMA,
        )


def source_codes(batch: pa.RecordBatch) -> NDArray[np.int8]:
    """Index in `SOURCES` of each row (n,); files may number their sources differently."""
    names, indices = tuple(batch["source"].dictionary.to_pylist()), batch["source"].indices.to_numpy()
    if names == SOURCES:
        return indices.astype(np.int8, copy=False)
    return np.array([SOURCES.index(name) for name in names], np.int8)[indices]


@dataclass
class Summary:
    """Counts by reason, source and class, the thresholds of the score, quantiles of eps (pixel range), batch by batch."""

    eps: float
    total: int
    budget: Literal["fixed", "scaled"]
    thresholds: dict[str, dict[str, float]] = field(default_factory=dict)
    by_reason: dict[str, int] = field(default_factory=dict)
    by_class: NDArray[np.int64] = field(default_factory=lambda: np.zeros((2, 0), np.int64))
    by_source: NDArray[np.int64] = field(default_factory=lambda: np.zeros((2, len(SOURCES)), np.int64))
    eps_kept: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    kept: int = 0

    def begin(self, choice: Choice, names: list[str], num_classes: int) -> None:
        """Take what is known before the first batch."""
        # bincount would copy all of them, in eight bytes each.
        counts = [int(np.count_nonzero(choice.reason == code)) for code in range(len(names))]
        for name, count in zip(names, counts, strict=True):
            self.by_reason[name] = self.by_reason.get(name, 0) + count
        self.thresholds = choice.thresholds
        self.by_class = np.zeros((2, num_classes), np.int64)
        self.eps_kept = np.empty(counts[KEPT], np.float32)

    def add(self, source: NDArray[np.int8], label: NDArray[np.int16], kept: Mask, eps: NDArray[np.float32]) -> None:
        """Count one batch."""
        num_sources, num_classes = len(SOURCES), self.by_class.shape[1]
        cell = label.astype(np.int32) * (2 * num_sources) + (2 * source + kept)
        counts = np.bincount(cell, minlength=num_classes * num_sources * 2).reshape(num_classes, num_sources, 2)
        self.by_class += [counts.sum(axis=(1, 2)), counts[:, :, 1].sum(axis=1)]
        self.by_source += [counts.sum(axis=(0, 2)), counts[:, :, 1].sum(axis=0)]
        found = eps[kept]
        self.eps_kept[self.kept : self.kept + len(found)] = found
        self.kept += len(found)

    def content(self) -> dict[str, Any]:
        lowered = int(np.count_nonzero(self.eps_kept < np.float32(self.eps)))
        quantiles = np.quantile(self.eps_kept, QUANTILES, overwrite_input=True)
        return {
            "total": self.total,
            "kept": self.kept,
            "fraction_kept": self.kept / self.total,
            "steps_share": self.kept / self.total if self.budget == "scaled" else 1.0,
            "reasons": {name: count for name, count in self.by_reason.items() if count},
            "by_source": pairs(self.by_source, SOURCES),
            "by_class": pairs(self.by_class, [str(k) for k in range(self.by_class.shape[1])]),
            "thresholds": self.thresholds,
            "eps": self.eps,
            "eps_lowered": lowered,
            "eps_quantiles": {f"{q:g}": float(value) for q, value in zip(QUANTILES, quantiles, strict=True)},
        }


def pairs(counts: NDArray[np.int64], names: Sequence[str]) -> dict[str, dict[str, int]]:
    """Total and kept (2, n) by name."""
    return {name: {"total": int(total), "kept": int(kept)} for name, total, kept in zip(names, *counts, strict=True)}
