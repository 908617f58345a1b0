"""Contact sheets: the samples at the ends of the margins, and the test images that a strategy's models get wrong."""

import io
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.artifacts import MARGINS_SCHEMA, SOURCES, scan_table, source_codes
from pipeline.images import ImageStore
from pipeline.params import InputError
from pipeline.reporting.runs import Run

LARGEST_SIDE = 96  # pixels of an embedded picture; larger images are reduced
SAMPLE = np.dtype([("key", "f8"), ("source", "i1"), ("row", "i8"), ("label", "i2"), ("predicted", "i2"), ("margin", "f8")])
Samples = np.ndarray[tuple[int], np.dtype[np.void]]  # of dtype SAMPLE
Kept = Mapping[str, NDArray[np.bool_]]


@dataclass(frozen=True)
class Picture:
    """A PNG as a data URI, and what to say below it."""

    uri: str
    caption: str
    note: str


@dataclass(frozen=True)
class Sheet:
    title: str
    pictures: list[Picture]


def extreme_samples(margins: Path, count: int, kept: Kept) -> tuple[Samples, Samples]:
    """The pruned samples of highest margin and the kept samples of lowest margin, count each at most."""
    pruned, low = empty(), empty()
    for batch in margin_batches(margins):
        chosen = np.zeros(len(batch), bool)
        for code, source in enumerate(SOURCES):
            mine = batch["source"] == code
            chosen[mine] = kept[source][batch["row"][mine]]
        pruned = lowest(pruned, batch[~chosen], -batch["margin"][~chosen], count)
        low = lowest(low, batch[chosen], batch["margin"][chosen], count)
    return pruned, low


def misclassified_samples(margins: Path, count: int) -> Samples:
    """The samples that the margin model gets wrong by the most, count at most."""
    found = empty()
    for batch in margin_batches(margins):
        wrong = batch[batch["label"] != batch["predicted"]]
        found = lowest(found, wrong, wrong["margin"], count)
    return found


def margin_batches(margins: Path) -> Iterator[Samples]:
    """Rows that have a margin."""
    columns = ["row", "label", "predicted", "margin"]
    for batch in scan_table(margins, MARGINS_SCHEMA, ["source", *columns]):
        samples = np.zeros(len(batch), SAMPLE)
        samples["source"] = source_codes(batch)
        for name in columns:
            samples[name] = batch.column(name).to_numpy(zero_copy_only=False)
        yield samples[~np.isnan(samples["margin"])]


def empty() -> Samples:
    return np.zeros(0, SAMPLE)


def lowest(best: Samples, candidates: Samples, key: NDArray[np.float64], count: int) -> Samples:
    """The count samples of lowest key among best and candidates, sorted; ties by source and row."""
    if len(best) == count and count:
        near = key <= best["key"][-1]
        candidates, key = candidates[near], key[near]
    joined = np.concatenate([best, candidates])
    joined["key"][len(best) :] = key
    return joined[np.lexsort((joined["row"], joined["source"], joined["key"]))[:count]]


def margin_sheet(
    title: str, samples: Samples, stores: Mapping[str, ImageStore], scale: float, names: Mapping[str, str]
) -> Sheet:
    """Pictures with label (and prediction where it differs) and the margin, multiplied by scale; names: of the sources."""
    pictures = []
    for sample in samples:
        source = SOURCES[sample["source"]]
        store = stores[source]
        caption = name_classes(store, int(sample["label"]), int(sample["predicted"]))
        note = f"{names[source]} {sample['row']}: {scale * sample['margin']:.2f}".replace("-", "−")
        pictures.append(Picture(encode(store, int(sample["row"])), caption, note))
    return Sheet(title, pictures)


def failures_sheet(title: str, runs: Sequence[Run], store: ImageStore, count: int) -> Sheet:
    """Test images that most of the runs of a strategy get wrong even without an attack, count at most."""
    if len(store) != runs[0].num_examples:
        raise InputError(f"{store.path}: {len(store)} test images, but {runs[0].num_examples} were evaluated; run `dvc repro`")
    wrong = np.sum([~run.clean_outcomes for run in runs], axis=0)
    rows = [int(row) for row in np.argsort(-wrong, kind="stable")[:count] if wrong[row]]
    pictures = []
    for row in rows:
        label = store.classes[int(store.labels[row])]
        pictures.append(Picture(encode(store, row), label, f"test {row}: {wrong[row]} of {len(runs)} runs"))
    return Sheet(title, pictures)


def name_classes(store: ImageStore, label: int, predicted: int) -> str:
    named = store.classes[label]
    return named if label == predicted else f"{named} → {store.classes[predicted]}"


def encode(store: ImageStore, row: int) -> str:
    """One image as a PNG data URI, its longer side at most `LARGEST_SIDE` pixels."""
    pixels = store.batch(np.array([row]))[0]
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{b64encode(buffer.getvalue()).decode('ascii')}"
