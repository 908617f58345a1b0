"""The rows that a training may draw from, 8 bytes each."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.artifacts import MANIFEST_SCHEMA, SOURCES, scan_table
from pipeline.images import ImageStore
from pipeline.params import InputError
from pipeline.randomness import numpy_stream
from pipeline.training.sampler import permuted


@dataclass(frozen=True)
class Pool:
    """The kept rows of one store, 8 bytes each: row numbers (n,) and attack radii (n,) in pixel range."""

    store: ImageStore
    rows: NDArray[np.uint32]
    eps: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.rows)


def full_pool(store: ImageStore, eps: float) -> Pool:
    """All rows of a store with the same radius."""
    return Pool(store, np.arange(len(store), dtype=np.uint32), np.full(len(store), eps, np.float32))


def read_pools(manifest: Path, stores: dict[str, ImageStore]) -> dict[str, Pool]:
    """The kept rows of each source. Memory holds them and one piece of the table.

    Raises:
        InputError: there is no manifest, or it names rows that a store does not have.
    """
    kept = dict.fromkeys(SOURCES, 0)
    for batch in scan_table(manifest, MANIFEST_SCHEMA, ["source", "kept"]):
        for source in SOURCES:
            kept[source] += pc.sum(chosen(batch, source)).as_py() or 0
    pools = {
        source: Pool(stores[source], np.empty(count, np.uint32), np.empty(count, np.float32)) for source, count in kept.items()
    }
    filled = dict.fromkeys(SOURCES, 0)
    for batch in scan_table(manifest, MANIFEST_SCHEMA, ["source", "row", "kept", "eps"]):
        for source, pool in pools.items():
            part = batch.filter(chosen(batch, source))
            rows = part["row"].to_numpy()
            if len(rows) and rows.max() >= len(pool.store):
                raise InputError(
                    f"manifest: wanted rows of {source} below {len(pool.store)}, got {rows.max()}; "
                    "it was made for other images: run `dvc repro`"
                )
            here = slice(filled[source], filled[source] + len(rows))
            pool.rows[here], pool.eps[here] = rows, part["eps"].to_numpy()
            filled[source] = here.stop
    return pools


def chosen(batch: pa.RecordBatch, source: str) -> pa.Array:
    return pc.and_(pc.equal(batch["source"], source), batch["kept"])


def split_holdout(pool: Pool, count: int, seed: int) -> tuple[Pool, NDArray[np.int64]]:
    """Take count rows of the store out of the pool: (pool without them, held-out rows (count,)). They depend on the
    store and the seed alone, so every strategy holds out the same images.

    Raises:
        InputError: the store is too small.
    """
    if count >= len(pool.store):
        raise InputError(f"training.holdout: wanted fewer than the {len(pool.store)} real training images, got {count}")
    held_out = np.sort(permuted(np.arange(count), len(pool.store), numpy_stream(seed, 0, "holdout")))
    stays = np.ones(len(pool.store), bool)
    stays[held_out] = False
    stays = stays[pool.rows]
    return Pool(pool.store, pool.rows[stays], pool.eps[stays]), held_out
