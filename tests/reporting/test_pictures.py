"""Contact sheets against a sort of the whole table."""

import io
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import artifacts
from pipeline.artifacts import SOURCES
from pipeline.image_writing import write_store
from pipeline.images import ImageStore
from pipeline.params import InputError
from pipeline.reporting.distributions import kept_rows
from pipeline.reporting.pictures import (
    LARGEST_SIDE,
    encode,
    extreme_samples,
    failures_sheet,
    margin_sheet,
    misclassified_samples,
)
from pipeline.reporting.runs import read_runs
from tests.reporting.artifacts import Sizes, draw_margins

SIZES = Sizes()


def decode(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(b64decode(uri.removeprefix("data:image/png;base64,"))))


@pytest.mark.parametrize("batch_rows", [3, 1 << 20])
def test_extremes_are_the_ends_of_the_sorted_margins_whatever_the_batches(
    made: Path, monkeypatch: pytest.MonkeyPatch, batch_rows: int
) -> None:
    monkeypatch.setattr(artifacts, "BATCH_ROWS", batch_rows)
    sizes = {source: SIZES.of(source) for source in SOURCES}
    kept = kept_rows(made / "manifests" / "puma" / "manifest.parquet", sizes)
    pruned, low = extreme_samples(made / "margins", 6, kept)
    margins = draw_margins(SIZES)
    known = [(float(margins[s][r]), s, r) for s in SOURCES for r in range(sizes[s]) if not np.isnan(margins[s][r])]
    wanted = sorted((x for x in known if not kept[x[1]][x[2]]), reverse=True)[:6]
    assert [(float(x["margin"]), SOURCES[x["source"]], x["row"]) for x in pruned] == wanted
    wanted = sorted(x for x in known if kept[x[1]][x[2]])[:6]
    assert [(float(x["margin"]), SOURCES[x["source"]], x["row"]) for x in low] == wanted


def test_misclassified_samples_are_wrong_and_lowest_first(made: Path) -> None:
    found = misclassified_samples(made / "margins", 50)
    margins = np.concatenate(list(draw_margins(SIZES).values()))
    assert len(found) == (margins < 0).sum() > 0
    assert (found["label"] != found["predicted"]).all()
    assert (np.diff(found["margin"]) >= 0).all()


def test_a_sheet_shows_the_pixels_and_says_what_they_are(made: Path) -> None:
    stores = {"real": ImageStore.open(made / "real" / "train"), "synthetic": ImageStore.open(made / "synthetic")}
    found = misclassified_samples(made / "margins", 1)
    (picture,) = margin_sheet("wrong", found, stores, 255, dict(zip(SOURCES, SOURCES, strict=True))).pictures
    source, row = SOURCES[found["source"][0]], int(found["row"][0])
    np.testing.assert_array_equal(np.asarray(decode(picture.uri)), stores[source].batch(np.array([row]))[0, :, :, 0])
    assert picture.note == f"{source} {row}: −{255 * -found['margin'][0]:.2f}"
    assert "→" in picture.caption


def test_large_colour_images_are_reduced(tmp_path: Path) -> None:
    images = np.full((1, 200, 100, 3), 7, np.uint8)
    chunk = [(images, np.zeros(1, np.int64))]
    store = write_store(tmp_path / "s", chunk, classes=("a",), shape=(200, 100, 3), shard_rows=1, origin={})
    picture = decode(encode(store, 0))
    assert picture.size == (LARGEST_SIDE // 2, LARGEST_SIDE)
    assert picture.getpixel((3, 3)) == (7, 7, 7)


def test_failures_are_the_images_most_runs_get_wrong(made: Path) -> None:
    runs = read_runs(made / "manifests", made / "evaluations", ["puma"], [0, 1])  # wrong: the first 2 and the first 3 images
    sheet = failures_sheet("t", runs, ImageStore.open(made / "real" / "test"), 10)
    assert [picture.note for picture in sheet.pictures] == ["test 0: 2 of 2 runs", "test 1: 2 of 2 runs", "test 2: 1 of 2 runs"]


def test_another_test_set_than_the_evaluated_one_is_an_input_error(made: Path) -> None:
    runs = read_runs(made / "manifests", made / "evaluations", ["puma"], [0])
    with pytest.raises(InputError, match="40 test images, but 20 were evaluated"):
        failures_sheet("t", runs, ImageStore.open(made / "real" / "train"), 10)
