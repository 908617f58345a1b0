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
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.artifacts import MARGINS_SCHEMA, SOURCES, place, read_table, write_table
from pipeline.balls import BALLS, Ball
from pipeline.batches import stream, to_tensor
from pipeline.deepfool import DeepFoolParams, DeepFoolResult, deepfool
from pipeline.hyperplanes import MOST_CALIBRATED, gradient_scale
from pipeline.images import ImageStore
from pipeline.losses import cross_entropy, cw_margin
from pipeline.models.inference import convolutions, inference_copy
from pipeline.params import InputError, Section
from pipeline.randomness import numpy_stream
from pipeline.threat import NormName, ThreatParams
from pipeline.tight import TightParams, tight

Progress = Callable[[int, int], None]  # done, total
COUNTS = ("rows", "not_converged", "misclassified")
MEASURED = [name for name in MARGINS_SCHEMA.names if name not in ("source", "row")]


class QualityParams(Section):
    """`sample_rows` of all rows, drawn from `seed`, are measured again for quality.json; 0: none."""

    sample_rows: NonNegativeInt = 128
    seed: NonNegativeInt = 0


class MarginsSection(Section):
    """`estimator`: DeepFool as in the paper, or `tight`, which goes on from it and is several times slower. `norm` is that
    of the distances (null: the threat's; an eps rule that compares distances with radii needs that). `bf16` takes gradients
    in bfloat16, and DeepFool the logits of the images and so their scores too, but where the prediction is in doubt or
    classes are few; whether a perturbed image is across is judged in float32, by DeepFool on a GPU in TensorFloat-32. All
    gradients at `calibration_rows` real images foretell which classes are near (0: the weights of the last layer do).
    `grand` adds the GraNd score (one gradient of all weights per image, so it is optional). The stage fails when more than
    the share `max_not_converged` of the rows has no margin."""

    estimator: Literal["deepfool", "tight"] = "deepfool"
    deepfool: DeepFoolParams
    tight: TightParams = TightParams()
    norm: NormName | None = None
    bf16: bool = False
    calibration_rows: NonNegativeInt = 128
    grand: bool
    batch_size: PositiveInt
    shard_rows: PositiveInt
    max_not_converged: float = Field(ge=0, le=1)
    quality: QualityParams = QualityParams()

    def ball(self, threat: ThreatParams) -> Ball:
        """The geometry in which margins are measured under threat."""
        return BALLS[self.norm or threat.norm]


def shards(stores: dict[str, ImageStore], shard_rows: int) -> dict[str, dict[str, Any]]:
    """Name -> source, start and stop of each piece of at most shard_rows rows that is measured at a time; sources in the
    order of `SOURCES`, rows in that of their store."""
    return {
        f"{source}-{start // shard_rows:05d}": {"source": source, "start": start, "stop": min(start + shard_rows, len(store))}
        for source, store in ((source, stores[source]) for source in SOURCES)
        for start in range(0, len(store), shard_rows)
    }


def foretold_norms(
    model: nn.Module, real: ImageStore, ball: Ball, settings: MarginsSection, device: torch.device
) -> Tensor | None:
    """By which DeepFool chooses its candidates: `gradient_scale` at the same real images for every shard, so that the margin
    of a row does not depend on the shards. None, which leaves it to the weights of the last layer, where there are many
    classes."""
    count = min(settings.calibration_rows, len(real))
    if not count or len(real.classes) > MOST_CALIBRATED:
        return None
    rows = np.sort(numpy_stream(0, 0, "calibration").choice(len(real), count, replace=False))
    return gradient_scale(fast_copy(model, False), to_tensor(real.batch(rows), device), ball)


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
    scale: Tensor | None,
    model_digest: str,
    device: torch.device,
    progress: Progress,
) -> None:
    """Measure the rows [start, stop) of a store into one Parquet file. `scale` is that of `foretold_norms`.

    Raises:
        InputError: the model gives no finite logits.
    """
    metadata = {
        "norm": ball.name,
        "deepfool": json.dumps(settings.deepfool.model_dump(), sort_keys=True),
        "margin_model": model_digest,
    }
    # One array a column for the whole shard: the small arrays of single batches would keep freed memory in pieces.
    columns = {name: np.empty(stop - start, MARGINS_SCHEMA.field(name).type.to_pandas_dtype()) for name in MEASURED}
    for rows, x, y in stream(store, settings.batch_size, start, stop, device):
        found = measure(model, x, y, rows, source, ball, settings, scale)
        for name, values in columns.items():
            values[rows[0] - start : rows[-1] + 1 - start] = found[name]
        progress(int(rows[-1]) + 1 - start, stop - start)
    write_table(path, as_table(columns, source, start), metadata)


def measure(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    rows: NDArray[np.int64],
    source: str,
    ball: Ball,
    settings: MarginsSection,
    scale: Tensor | None,
) -> dict[str, NDArray[np.generic]]:
    """The `MEASURED` columns (B,) for images x (B, C, H, W) in [0, 1] with labels y (B,): NaN and -1 where there is none."""
    try:
        result = estimate(model, x, y, ball, settings, scale)
    except ValueError as error:
        raise InputError(f"margins, {source} rows {rows[0]} to {rows[-1]}: {error}") from None
    grands = grand(model, x, y) if settings.grand else torch.full_like(result.margin, torch.nan)
    floats = {"margin": result.margin, **scores(result.logits, y), "grand": grands}
    integers = {"label": y, "predicted": result.logits.argmax(dim=1), "nearest": result.nearest}
    integers |= {"iterations": result.iterations, "converged": result.converged.long()}
    # One transfer from the device for each kind.
    return {
        name: values
        for group in (floats, integers)
        for name, values in zip(group, torch.stack(list(group.values())).cpu().numpy(), strict=True)
    }


def as_table(columns: dict[str, NDArray[np.generic]], source: str, start: int) -> pa.Table:
    """The margin table of the rows from start on, null where there is no number."""
    count = len(columns["margin"])
    unknown = ~columns["converged"].astype(bool)
    masks = {"margin": unknown, "nearest": unknown, "grand": np.isnan(columns["grand"])}
    arrays = {name: pa.array(values, MARGINS_SCHEMA.field(name).type, mask=masks.get(name)) for name, values in columns.items()}
    arrays["row"] = pa.array(np.arange(start, start + count))
    arrays["source"] = pa.DictionaryArray.from_arrays(np.full(count, SOURCES.index(source), np.int8), list(SOURCES))
    return pa.table([arrays[name] for name in MARGINS_SCHEMA.names], schema=MARGINS_SCHEMA)


def estimate(
    model: nn.Module, x: Tensor, y: Tensor, ball: Ball, settings: MarginsSection, scale: Tensor | None
) -> DeepFoolResult:
    """Signed margins by the estimator of the settings, computed on a fast copy of the model; in true float32 on a GPU too,
    unless `bf16` allows less."""
    fast = fast_copy(model, settings.bf16)
    common = settings.deepfool.model_dump()
    with convolutions(tf32=settings.bf16 and settings.estimator == "deepfool"):
        if settings.estimator == "tight":
            return tight(fast, x, y, ball=ball, **settings.tight.model_dump(), **common)
        return deepfool(fast, x, y, ball=ball, scale=scale, **common)


@lru_cache(maxsize=2)  # in float32, and in bfloat16 where that is asked for
def fast_copy(model: nn.Module, bf16: bool) -> nn.Module:
    """As `inference_copy`; kept for the next batch, so the weights of the model must not change in between."""
    return inference_copy(model, bf16=bf16)


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
