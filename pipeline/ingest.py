"""One split of a source into a store, with what was left out beside it."""

from pathlib import Path

from pipeline.artifacts import write_json
from pipeline.image_writing import write_store
from pipeline.images import ImageStore
from pipeline.sources import Source, stratified
from pipeline.sources.corrupt import Corrupt
from pipeline.sources.source import SplitName


def ingest_split(
    target: Path, source: Source, name: SplitName, *, max_rows: int | None, seed: int, shard_rows: int, max_corrupt: int
) -> ImageStore:
    """Write a split, or a stratified part of max_rows drawn from seed, into a store at target. Beside its images are the
    row that each had in its source (source_rows.npy), and corrupt.json: what could not be read, why, and where it was.

    Raises:
        InputError: the source cannot be read, or more than max_corrupt of its images cannot.
    """
    split = source.splits[name]
    rows = None if max_rows is None else stratified(split.labels, max_rows, seed)
    corrupt = Corrupt(limit=max_corrupt)
    store = write_store(
        target,
        split(rows, corrupt),
        classes=source.classes,
        shape=source.shape,
        shard_rows=shard_rows,
        origin=source.origin | ({} if max_rows is None else {"max_rows": max_rows, "max_rows_seed": seed}),
        source_rows=lambda: split.source_rows(rows, corrupt),
    )
    write_json(target / "corrupt.json", corrupt.listed())
    return store
