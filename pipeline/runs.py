"""A training run on disk: the checkpoints best/ and last/, and the curves training.csv and steps.csv."""

from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.artifacts import digest_file
from pipeline.images import ImageStore
from pipeline.models import ModelParams
from pipeline.models.checkpoint import save_model
from pipeline.threat import ThreatParams
from pipeline.training import TrainingResult


def save_run(
    directory: Path,
    result: TrainingResult,
    model: ModelParams,
    threat: ThreatParams,
    stores: dict[str, ImageStore],
    *,
    seed: int,
    manifest: Path | None = None,
) -> None:
    """Write both checkpoints with the digests of what they were trained on, and the curves: training.csv has a row for every
    selection, steps.csv for every step."""
    inputs = {source: store.digest for source, store in stores.items()}
    if manifest is not None:
        inputs["manifest"] = digest_file(manifest / "manifest.parquet")
    description: dict[str, Any] = {
        "architecture": model.architecture,
        "arguments": model.arguments,
        "shape": list(stores["real"].shape),
        "classes": list(stores["real"].classes),
        "threat": {"norm": threat.norm, "eps": threat.exact},
        "seed": seed,
        "train": result.cost,
        "inputs": inputs,
    }
    save_model(directory / "best", result.best, description)
    save_model(directory / "last", result.last, description)
    pd.DataFrame(result.history).to_csv(directory / "training.csv", index=False)
    pd.DataFrame(result.curve).to_csv(directory / "steps.csv", index=False)
