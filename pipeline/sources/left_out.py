"""Real training images that ingest left out, as a stand-in for synthetic ones."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from pydantic import NonNegativeInt, PositiveInt

from pipeline.images import Chunk, ImageStore
from pipeline.params import InputError, Section
from pipeline.sources import SourceParams, open_source, stratified
from pipeline.sources.corrupt import Corrupt


class LeftOutParams(Section):
    """`num_images` (null: all) of the training images that `ingest.max_train` left out of `source`, which is that of ingest;
    drawn from `seed`, classes as frequent as there. No generator's images are as good: every result must name them."""

    kind: Literal["left_out"]
    source: SourceParams
    num_images: PositiveInt | None = None
    seed: NonNegativeInt = 0


def left_out(params: LeftOutParams, train: ImageStore) -> tuple[dict[str, Any], Iterator[Chunk]]:
    """Origin and images of the rows that the store train does not have.

    Raises:
        InputError: the source is not that of the store, or fewer images are left than wanted.
    """
    source = open_source(params.source)
    origin = json.loads(json.dumps(source.origin))
    if source.classes != train.classes or train.origin | origin != train.origin:
        raise InputError("synthesize.source.source: wanted the source that ingest read, got another; make the two equal")
    split = source.splits["train"]
    used = np.load(train.path / "source_rows.npy", allow_pickle=False)
    free = np.flatnonzero(~np.isin(split.source_rows(None, Corrupt()), used))
    wanted = len(free) if params.num_images is None else params.num_images
    if not 0 < wanted <= len(free):
        raise InputError(f"synthesize.source: wanted {wanted} images, ingest left {len(free)} out; lower ingest.max_train")
    rows = free[stratified(split.labels[free], wanted, params.seed)]
    return {"kind": "left_out", "of": origin, "seed": params.seed}, split(rows)
