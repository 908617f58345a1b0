"""What the margins are worth: rows without one, agreement with a tighter estimate, and what a repetition changes."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import nn

from pipeline.artifacts import SOURCES, write_json
from pipeline.balls import Ball
from pipeline.batches import to_tensor
from pipeline.images import ImageStore
from pipeline.margins import MarginsSection, foretold_norms, measure, quality
from pipeline.params import InputError
from pipeline.randomness import numpy_stream

Rows = NDArray[np.int64]
Floats = NDArray[np.float64]


def write_quality(
    directory: Path,
    model: nn.Module,
    stores: dict[str, ImageStore],
    *,
    ball: Ball,
    settings: MarginsSection,
    device: torch.device,
) -> None:
    """Write quality.json beside the parts of a margin table that is complete: `quality` of the table, and for a seeded
    sample of its rows `tight` (agreement with the tight estimate) and `repeated` (measured again in other batches).

    Raises:
        InputError: more rows than `max_not_converged` allows have no margin.
    """
    found = quality(directory)
    if found["not_converged"] > settings.max_not_converged:
        raise InputError(
            f"margins: wanted at most {settings.max_not_converged:.2%} of the rows without a margin, got "
            f"{found['not_converged']:.2%} (most in {worst_classes(found['by_class'])}); raise "
            f"margins.deepfool.max_iterations or margins.max_not_converged"
        )
    places = sample_places(stores, settings.quality.sample_rows, settings.quality.seed)
    if len(places):
        table = margins_at(directory, places)
        closer = settings.model_copy(update={"estimator": "tight", "grand": False})
        again = settings.model_copy(update={"grand": False})
        scale = foretold_norms(model, stores["real"], ball, settings, device)
        found["tight"] = agreement(table, measure_again(model, stores, places, ball, closer, scale, device))
        halves = [measure_again(model, stores, half, ball, again, scale, device) for half in np.array_split(places[::-1], 2)]
        found["repeated"] = difference(table, np.concatenate(halves)[::-1])
    write_json(directory / "quality.json", found)


def worst_classes(by_class: dict[str, dict[str, dict[str, int]]]) -> str:
    """The three classes with the most rows without a margin, in words."""
    counts = [
        (row["not_converged"], row["rows"], f"{source} class {label}")
        for source, rows in by_class.items()
        for label, row in rows.items()
    ]
    return ", ".join(f"{name}: {lost} of {total}" for lost, total, name in sorted(counts, reverse=True)[:3] if lost)


def sample_places(stores: dict[str, ImageStore], count: int, seed: int) -> Rows:
    """Positions (n,), ascending, of at most count rows in the table, whose sources follow each other; as many of each source,
    so that a few real rows are not lost among millions of synthetic ones."""
    sizes = {source: len(stores[source]) for source in SOURCES if len(stores[source])}
    rng, start, found = numpy_stream(seed, 0, "quality"), 0, [np.empty(0, np.int64)]
    for size in sizes.values():
        found.append(start + np.sort(rng.choice(size, min(math.ceil(count / len(sizes)), size), replace=False)))
        start += size
    return np.concatenate(found)


def margins_at(directory: Path, places: Rows) -> Floats:
    """The margins (n,) of the table at ascending places (n,), NaN where there is none; one part in memory at a time."""
    found, start = [], 0
    for part in sorted(directory.glob("*.parquet")):
        stop = start + pq.read_metadata(part).num_rows
        inside = places[(places >= start) & (places < stop)] - start
        if len(inside):
            found.append(pq.read_table(part, columns=["margin"])["margin"].to_numpy()[inside])
        start = stop
    return np.concatenate(found).astype(np.float64)


def measure_again(
    model: nn.Module,
    stores: dict[str, ImageStore],
    places: Rows,
    ball: Ball,
    settings: MarginsSection,
    scale: torch.Tensor | None,
    device: torch.device,
) -> Floats:
    """The margins (n,) of the rows at places (n,), in their order, NaN where there is none."""
    margins = np.empty(len(places))
    for where, source, rows in by_source(stores, places):
        store = stores[source]
        for first in range(0, len(rows), settings.batch_size):
            now = slice(first, first + settings.batch_size)
            x, y = to_tensor(store.batch(rows[now]), device), torch.from_numpy(store.labels[rows[now]]).to(device)
            margins[where[now]] = measure(model, x, y, rows[now], source, ball, settings, scale)["margin"]
    return margins


def by_source(stores: dict[str, ImageStore], places: Rows) -> Iterator[tuple[Rows, str, Rows]]:
    """For each source: which of the places are its rows, its name, those rows."""
    start = 0
    for source in SOURCES:
        where = np.flatnonzero((places >= start) & (places < start + len(stores[source])))
        yield where, source, places[where] - start
        start += len(stores[source])


def agreement(margins: Floats, tight: Floats) -> dict[str, Any]:
    """Of the rows with both: rank correlation, medians of the distances, quantiles of margin / tight; null where there
    are too few."""
    both = np.isfinite(margins) & np.isfinite(tight) & (tight != 0)
    margins, tight = margins[both], tight[both]
    if len(tight) < 2:
        return {"rows": len(tight), "spearman": None, "median": None, "median_tight": None, "ratio_quantiles": None}
    low, middle, high = np.quantile(margins / tight, [0.05, 0.5, 0.95]).tolist()
    return {
        "rows": len(tight),
        "spearman": float(spearmanr(margins, tight).statistic) if len(set(margins)) > 1 and len(set(tight)) > 1 else None,
        "median": float(np.median(np.abs(margins))),
        "median_tight": float(np.median(np.abs(tight))),
        "ratio_quantiles": {"0.05": low, "0.5": middle, "0.95": high},
    }


def difference(margins: Floats, again: Floats) -> dict[str, Any]:
    """Rows, how many have exactly the same margin both times (or none), and the largest difference in the pixel range."""
    one, other = np.isfinite(margins), np.isfinite(again)
    gap = np.abs(margins - again)[one & other]
    return {
        "rows": len(margins),
        "equal": int((gap == 0).sum() + (~one & ~other).sum()),
        "converged_once": int((one ^ other).sum()),
        "max_difference": float(gap.max()) if len(gap) else None,
    }
