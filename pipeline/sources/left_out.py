"""Real training images that ingest left out, as a stand-in for synthetic ones."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import NonNegativeInt, PositiveInt

from pipeline.artifacts import read_json
from pipeline.images import Chunk, ImageStore, load_map
from pipeline.params import InputError, Section
from pipeline.sources import Rows, SourceParams, open_source, stratified
from pipeline.sources.corrupt import Corrupt


class LeftOutParams(Section):
    """`num_images` (null: all) of the training images that `ingest.max_train` left out of `source`, which is that of ingest;
    drawn from `seed`, classes as frequent as there. Up to `max_corrupt` of them may be unreadable: they are left out and listed
    in corrupt.json. No generator's images are as good: every result must name them."""

    kind: Literal["left_out"]
    source: SourceParams
    num_images: PositiveInt | None = None
    seed: NonNegativeInt = 0
    max_corrupt: NonNegativeInt = 0


@dataclass(frozen=True)
class Given:
    """Images that exist already. `source_rows` gives, after the last chunk, the row of each in its source, and `corrupt` then
    holds those that could not be read."""

    origin: dict[str, Any]
    chunks: Iterator[Chunk]
    source_rows: Callable[[], Rows] | None = None
    corrupt: Corrupt | None = None


def left_out(params: LeftOutParams, train: ImageStore) -> Given:
    """The rows that the store train does not have, without those that ingest could not read.

    Raises:
        InputError: the source is not that of the store, or fewer images are left than wanted.
    """
    source = open_source(params.source)
    origin = json.loads(json.dumps(source.origin))
    if source.classes != train.classes or train.origin | origin != train.origin:
        raise InputError("synthesize.source.source: wanted the source that ingest read, got another; make the two equal")
    split = source.splits["train"]
    used = load_map(train.path / "source_rows.npy", (len(train),), np.int64)
    unreadable = [entry["source_row"] for entry in read_json(train.path / "corrupt.json")]
    free = np.flatnonzero(~np.isin(split.source_rows(None, Corrupt()), np.append(used, np.array(unreadable, np.int64))))
    wanted = len(free) if params.num_images is None else params.num_images
    if not 0 < wanted <= len(free):
        raise InputError(f"synthesize.source: wanted {wanted} images, ingest left {len(free)} out; lower ingest.max_train")
    rows = free[stratified(split.labels[free], wanted, params.seed)]
    corrupt = Corrupt(limit=params.max_corrupt)
    origin = {"kind": "left_out", "of": origin, "seed": params.seed}
    return Given(origin, split(rows, corrupt), lambda: split.source_rows(rows, corrupt), corrupt)
