"""The margin table: signed DeepFool margin and cheap difficulty scores of every image of a store."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from pipeline.artifacts import MARGINS_SCHEMA, SOURCES, read_table, write_json, write_table
from pipeline.batches import to_tensor
from pipeline.deepfool import DeepFoolParams, deepfool
from pipeline.images import ImageStore
from pipeline.losses import cross_entropy, cw_margin
from pipeline.params import InputError, Section
from pipeline.threat import Ball

Progress = Callable[[int, int], None]  # done, total


class MarginsSection(Section):
    """`grand` adds the GraNd score (one gradient of all weights per image, so it is optional). The stage fails when
    more than the share `max_not_converged` of the rows has no margin."""

    deepfool: DeepFoolParams
    grand: bool
    batch_size: PositiveInt
    shard_rows: PositiveInt
    max_not_converged: float = Field(ge=0, le=1)


def margin_tables(
    model: nn.Module,
    stores: dict[str, ImageStore],
    *,
    ball: Ball,
    settings: MarginsSection,
    device: torch.device,
    progress: Progress,
) -> Iterator[pa.Table]:
    """One table of at most shard_rows rows at a time, sources in the order of `SOURCES`, rows in that of their store."""
    total = sum(len(store) for store in stores.values())
    done = 0
    for source in SOURCES:
        store = stores[source]
        for start in range(0, len(store), settings.shard_rows):
            batches = []
            stop = min(start + settings.shard_rows, len(store))
            for rows, images, labels in store.chunks(settings.batch_size, start, stop):
                x, y = to_tensor(images, device), torch.from_numpy(labels).to(device)
                batches.append(measure(model, x, y, rows, source, ball, settings))
                done += len(rows)
                progress(done, total)
            yield pa.Table.from_batches(batches, schema=MARGINS_SCHEMA)


def measure(
    model: nn.Module, x: Tensor, y: Tensor, rows: np.ndarray, source: str, ball: Ball, settings: MarginsSection
) -> pa.RecordBatch:
    """All columns of the margin table for images x (B, C, H, W) in [0, 1] with labels y (B,)."""
    try:
        result = deepfool(model, x, y, ball=ball, **settings.deepfool.model_dump())
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

    return torch.func.vmap(squared_norm, chunk_size=32)(x, y).sqrt()


def write_margins(
    directory: Path,
    model: nn.Module,
    stores: dict[str, ImageStore],
    *,
    ball: Ball,
    settings: MarginsSection,
    model_digest: str,
    device: torch.device,
    progress: Progress,
) -> None:
    """Write part-00000.parquet and following, and quality.json.

    Raises:
        InputError: more rows than `max_not_converged` allows have no margin, or the model gives no finite logits.
    """
    metadata = {
        "norm": ball.name,
        "deepfool": json.dumps(settings.deepfool.model_dump(), sort_keys=True),
        "margin_model": model_digest,
    }
    tables = margin_tables(model, stores, ball=ball, settings=settings, device=device, progress=progress)
    for index, table in enumerate(tables):
        write_table(directory / f"part-{index:05d}.parquet", table, metadata)
    found = quality(directory)
    if found["not_converged"] > settings.max_not_converged:
        raise InputError(
            f"margins: wanted at most {settings.max_not_converged:.2%} of the rows without a margin, got "
            f"{found['not_converged']:.2%}; raise margins.deepfool.max_iterations or margins.max_not_converged"
        )
    write_json(directory / "quality.json", found)


def quality(directory: Path) -> dict[str, Any]:
    """Share of rows without a margin, mean iterations, and counts by source, from the written parts."""
    columns = ["source", "label", "predicted", "iterations", "converged"]
    frame = read_table(directory, MARGINS_SCHEMA, columns).to_pandas()
    frame["misclassified"] = frame["label"] != frame["predicted"]
    by_source = {
        name: {
            "rows": len(group),
            "not_converged": int((~group["converged"]).sum()),
            "misclassified": int(group["misclassified"].sum()),
        }
        for name, group in frame.groupby("source", observed=True)
    }
    return {
        "rows": len(frame),
        "not_converged": float((~frame["converged"]).mean()),
        "mean_iterations": float(frame["iterations"].mean()),
        "by_source": by_source,
    }
