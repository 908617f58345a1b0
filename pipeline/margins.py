"""The margin table: signed DeepFool margin and cheap difficulty scores of every image of a store."""

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.artifacts import MARGINS_SCHEMA, SOURCES, place, read_table, write_table
from pipeline.balls import Ball
from pipeline.batches import stream
from pipeline.deepfool import DeepFoolParams, DeepFoolResult, deepfool
from pipeline.images import ImageStore
from pipeline.losses import cross_entropy, cw_margin
from pipeline.models.inference import inference_copy
from pipeline.params import InputError, Section
from pipeline.tight import TightParams, tight

Progress = Callable[[int, int], None]  # done, total
COUNTS = ("rows", "not_converged", "misclassified")


class QualityParams(Section):
    """`sample_rows` of all rows, drawn from `seed`, are measured again for quality.json; 0: none."""

    sample_rows: NonNegativeInt = 128
    seed: NonNegativeInt = 0


class MarginsSection(Section):
    """`estimator`: DeepFool as in the paper, or `tight`, which goes on from it and is several times slower. `bf16` takes
    gradients in bfloat16. `grand` adds the GraNd score (one gradient of all weights per image, so it is optional). The
    stage fails when more than the share `max_not_converged` of the rows has no margin."""

    estimator: Literal["deepfool", "tight"] = "deepfool"
    deepfool: DeepFoolParams
    tight: TightParams = TightParams()
    bf16: bool = False
    grand: bool
    batch_size: PositiveInt
    shard_rows: PositiveInt
    max_not_converged: float = Field(ge=0, le=1)
    quality: QualityParams = QualityParams()


def shards(stores: dict[str, ImageStore], shard_rows: int) -> dict[str, dict[str, Any]]:
    """Name -> source, start and stop of each piece of at most shard_rows rows that is measured at a time; sources in the
    order of `SOURCES`, rows in that of their store."""
    return {
        f"{source}-{start // shard_rows:05d}": {"source": source, "start": start, "stop": min(start + shard_rows, len(store))}
        for source, store in ((source, stores[source]) for source in SOURCES)
        for start in range(0, len(store), shard_rows)
    }


def write_shard(
    path: Path,
    model: nn.Module,
    store: ImageStore,
    *,
    source: str,
    start: int,
    stop: int,
    ball: Ball,
    settings: MarginsSection,
    model_digest: str,
    device: torch.device,
    progress: Progress,
) -> None:
    """Measure the rows [start, stop) of a store into one Parquet file.

    Raises:
        InputError: the model gives no finite logits.
    """
    metadata = {
        "norm": ball.name,
        "deepfool": json.dumps(settings.deepfool.model_dump(), sort_keys=True),
        "margin_model": model_digest,
    }
    batches = []
    for rows, x, y in stream(store, settings.batch_size, start, stop, device):
        batches.append(measure(model, x, y, rows, source, ball, settings))
        progress(int(rows[-1]) + 1 - start, stop - start)
    write_table(path, pa.Table.from_batches(batches, schema=MARGINS_SCHEMA), metadata)


def measure(
    model: nn.Module, x: Tensor, y: Tensor, rows: np.ndarray, source: str, ball: Ball, settings: MarginsSection
) -> pa.RecordBatch:
    """All columns of the margin table for images x (B, C, H, W) in [0, 1] with labels y (B,)."""
    try:
        result = estimate(model, x, y, ball, settings)
    except ValueError as error:
        raise InputError(f"margins, {source} rows {rows[0]} to {rows[-1]}: {error}") from None
    columns: dict[str, Tensor | np.ndarray] = {
        "row": rows,
        "label": y,
        "predicted": result.logits.argmax(dim=1),
        "iterations": result.iterations,
        "converged": result.converged,
        **scores(result.logits, y),
    }
    arrays = {name: as_arrow(name, values) for name, values in columns.items()}
    unknown = ~result.converged.cpu().numpy()
    arrays["margin"] = as_arrow("margin", result.margin, unknown)
    arrays["nearest"] = as_arrow("nearest", result.nearest, unknown)
    arrays["source"] = pa.DictionaryArray.from_arrays(np.full(len(rows), SOURCES.index(source), np.int8), list(SOURCES))
    if settings.grand:
        arrays["grand"] = as_arrow("grand", grand(model, x, y))
    else:
        arrays["grand"] = pa.nulls(len(rows), pa.float32())
    return pa.RecordBatch.from_arrays([arrays[name] for name in MARGINS_SCHEMA.names], schema=MARGINS_SCHEMA)


def estimate(model: nn.Module, x: Tensor, y: Tensor, ball: Ball, settings: MarginsSection) -> DeepFoolResult:
    """Signed margins by the estimator of the settings, computed on a fast copy of the model."""
    fast = fast_copy(model, settings.bf16)
    common = settings.deepfool.model_dump()
    if settings.estimator == "tight":
        return tight(fast, x, y, ball=ball, **settings.tight.model_dump(), **common)
    return deepfool(fast, x, y, ball=ball, **common)


@lru_cache(maxsize=1)
def fast_copy(model: nn.Module, bf16: bool) -> nn.Module:
    """As `inference_copy`; kept for the next batch, so the weights of the model must not change in between."""
    return inference_copy(model, bf16=bf16)


def as_arrow(name: str, values: Tensor | np.ndarray, mask: np.ndarray | None = None) -> pa.Array:
    kind = MARGINS_SCHEMA.field(name).type
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
    return pa.array(array.astype(kind.to_pandas_dtype()), kind, mask=mask)


def scores(logits: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Difficulty scores (B,) from logits (B, K) and labels: `confidence` p_y; `entropy` of p in nats; `logit_margin`
    f_y - max other f; `el2n` ||p - one_hot(y)||_2 (Paul et al., arXiv:2107.07075)."""
    p = logits.softmax(dim=1)
    own = p.gather(1, y[:, None]).squeeze(1)
    error = p.scatter_add(1, y[:, None], torch.full_like(y[:, None], -1, dtype=p.dtype))
    return {
        "confidence": own,
        "entropy": torch.special.entr(p).sum(dim=1),
        "logit_margin": -cw_margin(logits, y),
        "el2n": error.norm(dim=1),
    }


def grand(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """GraNd (B,): L2 norm of the gradient of each sample's cross-entropy in all weights (arXiv:2107.07075, def. 2.1),
    at the margin model instead of in expectation over initialisations."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, (weights, buffers), (image[None],))
        return cross_entropy(logits, label[None])[0]

    def squared_norm(image: Tensor, label: Tensor) -> Tensor:
        gradients = torch.func.grad(loss)(weights, image, label)
        return torch.stack([g.square().sum() for g in gradients.values()]).sum()

    with sdpa_kernel(SDPBackend.MATH):  # vmap would take a transformer's fused attention apart, image by image
        return torch.func.vmap(squared_norm, chunk_size=32)(x, y).sqrt()


def place_parts(directory: Path, parts: list[Path]) -> None:
    """Make parts, Parquet files in the order of `shards`, those of the artifact: part-00000.parquet and following."""
    for index, part in enumerate(parts):
        place(part, directory / f"part-{index:05d}.parquet")


def quality(directory: Path) -> dict[str, Any]:
    """Share of rows without a margin, mean iterations, and counts by source and by its classes, from the written parts;
    one part is in memory at a time."""
    columns = ["source", "label", "predicted", "iterations", "converged"]
    counts = []
    for part in sorted(directory.glob("*.parquet")):
        frame = read_table(part, MARGINS_SCHEMA, columns).to_pandas()
        frame["rows"] = 1
        frame["not_converged"] = ~frame["converged"]
        frame["misclassified"] = frame["label"] != frame["predicted"]
        counts.append(frame.groupby(["source", "label"], observed=True)[[*COUNTS, "iterations"]].sum())
    total = pd.concat(counts).groupby(level=["source", "label"], observed=True).sum().astype(int)
    by_source = total.groupby(level="source", observed=True)
    return {
        "rows": int(total["rows"].sum()),
        "not_converged": float(total["not_converged"].sum() / total["rows"].sum()),
        "mean_iterations": float(total["iterations"].sum() / total["rows"].sum()),
        "by_source": by_source[list(COUNTS)].sum().to_dict("index"),
        "by_class": {
            source: {str(label): row for label, row in group.droplevel("source")[list(COUNTS)].to_dict("index").items()}
            for source, group in by_source
        },
    }
