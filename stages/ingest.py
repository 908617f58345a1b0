"""ingest: a source of any format into the stores of real images, train and test."""

from pathlib import Path

from pydantic import NonNegativeInt, PositiveInt

from pipeline.artifacts import publish
from pipeline.images import write_store
from pipeline.params import Section, StageParams
from pipeline.sources import SourceParams, open_source, stratified
from pipeline.stage import run


class IngestSection(Section):
    """`max_train` and `max_test` keep a stratified part of a split, drawn from `seed` and in the order of the source."""

    source: SourceParams
    max_train: PositiveInt | None
    max_test: PositiveInt | None
    seed: NonNegativeInt
    shard_rows: PositiveInt


class IngestParams(StageParams):
    ingest: IngestSection


def main(real_path: Path) -> None:
    """Write real_path/train and real_path/test, both or neither."""
    ingest = IngestParams.load().ingest
    source = open_source(ingest.source)
    limits = {"train": ingest.max_train, "test": ingest.max_test}
    with publish(real_path) as work:
        for name, split in source.splits.items():
            limit = limits[name]
            rows = None if limit is None else stratified(split.labels, limit, ingest.seed)
            origin = source.origin | ({} if limit is None else {"max_rows": limit, "max_rows_seed": ingest.seed})
            write_store(
                work / name,
                split(rows),
                classes=source.classes,
                shape=source.shape,
                shard_rows=ingest.shard_rows,
                origin=origin,
            )


if __name__ == "__main__":
    run(main)
