"""ingest: a source of any format into the stores of real images, train and test."""

from pathlib import Path

from pydantic import NonNegativeInt, PositiveInt

from pipeline.execution import guarded_publish
from pipeline.ingest import ingest_split
from pipeline.params import Section, StageParams
from pipeline.sources import SourceParams, open_source
from pipeline.stage import run


class IngestSection(Section):
    """`max_train` and `max_test` keep a stratified part of a split, drawn from `seed` and in the order of the source. Up to
    `max_corrupt` images of a split may be unreadable: they are left out and listed in its corrupt.json."""

    source: SourceParams
    max_train: PositiveInt | None
    max_test: PositiveInt | None
    seed: NonNegativeInt
    shard_rows: PositiveInt
    max_corrupt: NonNegativeInt = 0


class IngestParams(StageParams):
    ingest: IngestSection


def main(real_path: Path) -> None:
    """Write real_path/train and real_path/test, both or neither."""
    params = IngestParams.load()
    ingest = params.ingest
    source = open_source(ingest.source)
    limits = {"train": ingest.max_train, "test": ingest.max_test}
    with guarded_publish("ingest", params, [], real_path) as work:
        for name in source.splits:
            ingest_split(
                work / name,
                source,
                name,
                max_rows=limits[name],
                seed=ingest.seed,
                shard_rows=ingest.shard_rows,
                max_corrupt=ingest.max_corrupt,
            )


if __name__ == "__main__":
    run(main)
