"""Distributions of margins and eps over data sets that do not fit in memory: Parquet read batch by batch."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.artifacts import MANIFEST_SCHEMA, MARGINS_SCHEMA, SOURCES, scan_table, source_codes, table_parts
from pipeline.params import InputError

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

SAMPLE_STRIDE = 64  # of the rows that set the range of a histogram, once there are more than SAMPLE_ALL
SAMPLE_ALL = 1_000_000
TAIL = 0.001  # share of the margins, at each end, that the end bins take in whatever their distance


@dataclass(frozen=True)
class MarginHistogram:
    """`counts` (bins,) by source and `by_class` (classes, bins) between `edges` (bins + 1,); the end bins hold all that
    lies beyond."""

    edges: Floats
    counts: dict[str, Counts]
    by_class: Counts
    num_missing: int
    norm: str

    @property
    def centres(self) -> Floats:
        return (self.edges[1:] + self.edges[:-1]) / 2


def margin_histogram(path: Path, bins: int, num_classes: int) -> MarginHistogram:
    """Histogram of the margins by source and by label; rows without a margin are counted apart."""
    edges = margin_edges(path, bins)
    counts = {source: np.zeros(len(edges) - 1, np.int64) for source in SOURCES}
    by_class = np.zeros((num_classes, len(edges) - 1), np.int64)
    label_edges = np.arange(num_classes + 1) - 0.5
    num_missing = 0
    for batch in scan_table(path, MARGINS_SCHEMA, ["source", "label", "margin"]):
        margin, codes = batch.column("margin").to_numpy(zero_copy_only=False), source_codes(batch)
        label = batch.column("label").to_numpy()
        known = ~np.isnan(margin)
        num_missing += int((~known).sum())
        inside = np.clip(margin, edges[0], edges[-1])
        for code, source in enumerate(SOURCES):
            counts[source] += np.histogram(inside[known & (codes == code)], edges)[0]
        by_class += np.histogram2d(label[known], inside[known], (label_edges, edges))[0].astype(np.int64)
    metadata = pq.read_schema(table_parts(path, MARGINS_SCHEMA)[0]).metadata or {}
    counts = {source: count for source, count in counts.items() if count.any()}
    return MarginHistogram(edges, counts, by_class, num_missing, metadata.get(b"norm", b"").decode())


def margin_edges(path: Path, bins: int) -> Floats:
    """Edges of about bins equal bins, one edge at zero, over all but the outermost `TAIL` of the margins."""
    num_rows = sum(pq.read_metadata(part).num_rows for part in table_parts(path, MARGINS_SCHEMA))
    stride = SAMPLE_STRIDE if num_rows > SAMPLE_ALL else 1
    batches = scan_table(path, MARGINS_SCHEMA, ["margin"])
    sample = np.concatenate([batch.column("margin").to_numpy(zero_copy_only=False)[::stride] for batch in batches])
    sample = sample[~np.isnan(sample)].astype(np.float64)
    low, high = np.quantile(sample, [TAIL, 1 - TAIL]) if len(sample) else (0.0, 0.0)
    low, high = min(low, 0.0), max(high, 0.0)
    width = (high - low) / bins or 1.0 / bins
    return width * np.arange(np.floor(low / width), max(np.ceil(high / width), np.floor(low / width) + 1) + 1)


def eps_distribution(path: Path, eps: float, bins: int) -> tuple[Floats, Floats]:
    """Grid (bins + 1,) from 0 to eps, and the share of the kept samples whose eps is at most that: exact on the grid."""
    width = eps / bins
    counts = np.zeros(bins + 1, np.int64)
    for batch in scan_table(path, MANIFEST_SCHEMA, ["eps"]):
        values = batch.column("eps").drop_null().to_numpy().astype(np.float64)
        index = np.ceil(values / width - 1e-4)  # eps is float32: the last digits must not lift it over its grid point
        counts += np.bincount(np.clip(index, 0, bins).astype(np.int64), minlength=bins + 1)
    return np.linspace(0, eps, bins + 1), np.cumsum(counts) / max(1, int(counts.sum()))


def kept_rows(path: Path, sizes: dict[str, int]) -> dict[str, NDArray[np.bool_]]:
    """Which rows of each store (sizes: source -> rows) a manifest keeps: one byte per row."""
    kept = {source: np.zeros(size, bool) for source, size in sizes.items()}
    for batch in scan_table(path, MANIFEST_SCHEMA, ["source", "row", "kept"]):
        codes, rows = source_codes(batch), batch.column("row").to_numpy()
        chosen = batch.column("kept").to_numpy(zero_copy_only=False)
        for code, source in enumerate(SOURCES):
            mine = rows[chosen & (codes == code)]
            if len(mine) and mine.max() >= sizes[source]:
                raise InputError(f"{path}: row {mine.max()} of {source}, whose store has {sizes[source]}; run `dvc repro`")
            kept[source][mine] = True
    return kept
