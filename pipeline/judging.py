"""The quality of the synthetic images, and of held-out real ones as what is to be reached."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from pipeline.batches import to_tensor
from pipeline.features import FeatureParams, MarginFeatures
from pipeline.fidelity import Nearest, density_and_coverage, frechet_distance, nearest_images
from pipeline.images import Images, ImageStore
from pipeline.params import Section
from pipeline.randomness import numpy_stream

MEASURED = ("synthetic", "test")


class JudgeSection(Section):
    """At most `max_images` of each store are judged, drawn from `seed`; copies are looked for among all training images.
    `neighbours` is the k of density and coverage; the `closest` pairs of a synthetic and a training image are listed."""

    features: FeatureParams = MarginFeatures(kind="margin_model")
    max_images: int = Field(default=10_000, ge=2)
    neighbours: PositiveInt = 5
    closest: NonNegativeInt = 12
    batch_size: PositiveInt = 250
    seed: NonNegativeInt = 0


def judge(
    stores: dict[str, ImageStore], margin_model: nn.Module, features: nn.Module, settings: JudgeSection, device: torch.device
) -> dict[str, Any]:
    """Content of quality.json from the stores `train`, `test` and `synthetic`; models are on device, in eval mode.

    As many test as synthetic images are measured, so that their figures can be compared: frechet_distance, density,
    coverage and copies against the training images, class_agreement with the margin model. Copies are looked for among
    mirrored training images too, unless the store says that its generator was trained without (`mirrored`). All of these
    reward images that stay near the training images; `nearest_distance`, the median L2 distance to the nearest of them, shows
    it where it is below that of the test images. Without two images of each kind, or with too few training images for
    `neighbours`, only their numbers are given.

    Class agreement is circular where the margin model was trained on the synthetic images, with their labels: it then says
    that the model learnt them, not that they show their class. `judged_by` tells what a model was trained on.
    """
    count = min(settings.max_images, *(len(stores[name]) for name in MEASURED))
    reference = draw(stores["train"], settings.max_images, settings.seed, 1)
    found: dict[str, Any] = {"num_reference": len(reference)}
    if count < 2 or len(reference) <= settings.neighbours:
        return found | {name: {"num_images": count} for name in MEASURED}
    found["mirrored"] = mirrored = bool(stores["synthetic"].origin.get("flip", True))
    real, _ = forward(stores["train"], reference, margin_model, features, settings.batch_size, device)
    found["dimension"] = real.shape[1]
    for position, name in enumerate(MEASURED, start=2):
        store = stores[name]
        rows = draw(store, count, settings.seed, position)
        fake, predicted = forward(store, rows, margin_model, features, settings.batch_size, device)
        density, coverage = density_and_coverage(real, fake, settings.neighbours)
        nearest = nearest_images(store.batch(rows), stores["train"], device, mirrored=mirrored)
        agrees = predicted == store.labels[rows]
        found[name] = {
            "num_images": count,
            "frechet_distance": frechet_distance(real, fake),
            "density": density,
            "coverage": coverage,
            "class_agreement": float(agrees.mean()),
            "copies": float(nearest.copied.mean()),
            "nearest_distance": float(np.median(nearest.distance)),
        }
        if name == "synthetic":
            found["class_agreement_by_class"] = by_class(store, rows, agrees)
            found["closest"] = closest_pairs(rows, nearest, settings.closest)
    return found


def judged_by(description: dict[str, Any]) -> dict[str, Any]:
    """The model that sees the labels, for the record: its digest, and what it was trained on, or null where an imported model
    does not say."""
    inputs = description.get("inputs")
    return {"digest": description["digest"], "trained_on": sorted(inputs) if inputs else None}


def draw(store: ImageStore, count: int, seed: int, position: int) -> NDArray[np.int64]:
    """At most count rows (n,), ascending."""
    rng = numpy_stream(seed, position, "quality")
    return np.sort(rng.choice(len(store), min(count, len(store)), replace=False))


def forward(
    store: ImageStore, rows: NDArray[np.int64], margin_model: nn.Module, features: nn.Module, size: int, device: torch.device
) -> tuple[Tensor, NDArray[np.int64]]:
    """Features (n, d) of the rows and the classes (n,) that the margin model sees in them."""
    found, predicted = [], []
    for first in range(0, len(rows), size):
        images: Images = store.batch(rows[first : first + size])
        x = to_tensor(images, device)
        with torch.inference_mode():
            found.append(features(x).float())
            predicted.append(margin_model(x).argmax(dim=1).cpu().numpy())
    return torch.cat(found), np.concatenate(predicted)


def by_class(store: ImageStore, rows: NDArray[np.int64], agrees: NDArray[np.bool_]) -> dict[str, float]:
    """Class -> share of its rows that agree, for the classes that have rows."""
    labels = store.labels[rows]
    return {store.classes[k]: float(agrees[labels == k].mean()) for k in np.unique(labels)}


def closest_pairs(rows: NDArray[np.int64], nearest: Nearest, count: int) -> list[dict[str, Any]]:
    """The count rows that are the nearest to one training image as against the next, nearest first."""
    order = np.lexsort((rows, nearest.distance, nearest.ratio))[:count]
    return [
        {
            "row": int(rows[i]),
            "train_row": int(nearest.row[i]),
            "mirrored": bool(nearest.mirrored[i]),
            "distance": float(nearest.distance[i]),
            "ratio": float(nearest.ratio[i]),
        }
        for i in order
    ]
