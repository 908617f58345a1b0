"""What the report says and shows of the synthetic images: where they come from, how good they are, pictures of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.images import ImageStore
from pipeline.reporting.pictures import Picture, Sheet, encode
from pipeline.reporting.runs import read_made

MAX_CLASSES = 20
STAND_IN = "stand-in (left-out real)"
METRICS = {  # key in quality.json -> (name, whether it is a share)
    "frechet_distance": ("Fréchet distance to the training images, lower is better", False),
    "density": ("density, about 1 for real images", False),
    "coverage": ("coverage, %", True),
    "class_agreement": ("margin model sees the label, %", True),
    "copies": ("copies of a training image, %", True),
    "nearest_distance": ("median distance to the nearest training image, L2", False),
}


@dataclass(frozen=True)
class Measure:
    """One line of the table: the figure of the synthetic images and of as many test images."""

    name: str
    synthetic: float
    test: float
    share: bool


@dataclass(frozen=True)
class Quality:
    """`measures` is empty where there are no synthetic images to judge; `circular`: the model that sees the labels was trained
    on these images with theirs."""

    measures: list[Measure]
    num_images: int
    features: str
    by_class: dict[str, float]
    closest: list[dict[str, Any]]
    circular: bool


def read_quality(judge: Path) -> Quality:
    """The figures of the stage `judge`.

    Raises:
        InputError: the file is missing or not of that stage.
    """
    found = read_made(judge / "quality.json", "judge", ("features", "num_reference", "synthetic", "test"))
    synthetic, test = found["synthetic"], found["test"]
    measures = [Measure(name, synthetic[key], test[key], share) for key, (name, share) in METRICS.items() if key in synthetic]
    by_class, closest = found.get("class_agreement_by_class", {}), found.get("closest", [])
    features = found["features"]["model"].replace("_", " ")
    circular = "synthetic" in (found.get("judged_by", {}).get("trained_on") or [])
    return Quality(measures, synthetic["num_images"], features, by_class, closest, circular)


def names_of_sources(origin: Mapping[str, Any]) -> dict[str, str]:
    """Source of training samples -> what it is called wherever it is shown; origin: of the synthetic store."""
    return {"real": "real", "synthetic": STAND_IN if origin.get("kind") == "left_out" else "synthetic"}


def short(name: str) -> str:
    """For below a picture."""
    return name.partition(" (")[0]


def notices(origin: Mapping[str, Any]) -> list[str]:
    """What nobody who reads the results may miss about where the synthetic images come from."""
    told = []
    if origin.get("kind") == "left_out":
        told.append(
            "Stand-in: no image here was generated. Real training images that ingest left out stand in the place of the "
            "synthetic ones; no generator's images are as good, so these results are no results on synthetic data."
        )
    if licence := origin.get("licence"):
        told.append(f"The synthetic images come from a network under the licence {licence}, which binds their use too.")
    return told


def selection_sentence(origin: Mapping[str, Any]) -> str:
    """What was selected while the images were drawn, and what that cost; empty where nothing was."""
    found = origin.get("selection")
    if not found:
        return ""
    worst, share = min(found["acceptance_by_class"].items(), key=lambda item: item[1])
    return (
        f"Selected while drawn ({found['rule']['kind'].replace('_', ' ')}): {found['drawn']:,} images were drawn for the "
        f"{found['kept']:,} that are kept, {found['acceptance']:.1%} (least in {worst}: {share:.1%}), and "
        f"{found['drawn_for_pilot']:,} for the threshold: {found['network_evaluations']:,} evaluations of the "
        "generator's network."
    )


def synthetic_sheets(stores: Mapping[str, ImageStore], quality: Quality, count: int, name: str) -> list[Sheet]:
    """The first synthetic images of every class (of the first `MAX_CLASSES`), a third of count each, and the pairs of a
    synthetic image and its nearest training image that are closest to copies; name: what they are called."""
    store = stores["synthetic"]
    sheets = []
    for label, of_class in enumerate(store.classes[:MAX_CLASSES]):
        rows = np.flatnonzero(np.asarray(store.labels) == label)[: max(1, count // 3)]
        pictures = [picture(store, int(row), f"{short(name)} {row}") for row in rows]
        sheets.append(Sheet(f"{name.capitalize()}: {of_class}", pictures))
    pairs = [part for pair in quality.closest[: count // 2] for part in pair_of(stores, pair, name)]
    sheets.append(Sheet(f"{name.capitalize()} images beside their nearest training images, nearest to a copy first", pairs))
    return [sheet for sheet in sheets if sheet.pictures]


def pair_of(stores: Mapping[str, ImageStore], pair: Mapping[str, Any], name: str) -> list[Picture]:
    synthetic = picture(stores["synthetic"], pair["row"], f"{short(name)} {pair['row']}: ratio {pair['ratio']:.2f}")
    how = ", mirrored" if pair.get("mirrored") else ""
    return [synthetic, picture(stores["real"], pair["train_row"], f"real {pair['train_row']}{how}")]


def picture(store: ImageStore, row: int, note: str) -> Picture:
    return Picture(encode(store, row), store.classes[int(store.labels[row])], note)
