"""A classifier whose boundary and scores others are held to: trained on all images with one radius, or imported."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import NonNegativeInt

from pipeline.checkpoints import Checkpoint
from pipeline.images import ImageStore
from pipeline.models import ModelParams, build_network
from pipeline.params import Section
from pipeline.runs import save_run
from pipeline.threat import ThreatParams
from pipeline.training import TrainingParams, train
from pipeline.training.feed import Placement
from pipeline.training.loop import Progress
from pipeline.training.pools import Pool, full_pool


class TrainedModel(Section):
    """Train on all images with the eps of the threat; `training.loss: standard` for a plain model."""

    kind: Literal["train"]
    model: ModelParams
    training: TrainingParams
    seed: NonNegativeInt


class ImportedModel(Section):
    """A directory with model.safetensors and model.json."""

    kind: Literal["import"]
    path: str


def fit_reference(
    directory: Path,
    section: TrainedModel,
    threat: ThreatParams,
    stores: dict[str, ImageStore],
    *,
    device: torch.device,
    progress: Progress,
    checkpoint: Checkpoint | None,
    placement: Placement,
) -> None:
    """Train on all images of the stores, `real` and, where it is given, `synthetic`; `save_run` writes into directory."""
    real = stores["real"]
    net = build_network(section.model, real.shape, len(real.classes), section.seed)
    pools = {"synthetic": Pool(real, np.empty(0, np.uint32), np.empty(0, np.float32))}
    pools |= {source: full_pool(store, threat.eps) for source, store in stores.items()}
    result = train(
        net, pools, section.training, threat=threat, seed=section.seed,
        device=device, progress=progress, checkpoint=checkpoint, placement=placement,
    )  # fmt: skip
    save_run(directory, result, section.model, threat, stores, seed=section.seed)
