"""What an artifact holds is said in numbers and shown in pictures."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.artifacts import MARGINS_SCHEMA, write_table
from pipeline.image_writing import write_store
from pipeline.images import ImageStore
from pipeline.manifest import write_manifest
from pipeline.params import InputError
from pipeline.pruning import Strategy
from pipeline.show import GAP, LINE, NAME_WIDTH, QUANTILES, TILE, describe, sheet, thirds
from tests.conftest import ROOT
from tests.test_pruning import margin_table

EPS = 8 / 255


def grey_store(path: Path, values: np.ndarray, labels: np.ndarray) -> ImageStore:
    """Images of one grey level each, so that a picture on the sheet says which row it is."""
    images = np.broadcast_to(values.astype(np.uint8)[:, None, None, None], (len(values), 4, 4, 1))
    classes = ("ant", "bee", "cat", "dog")
    return write_store(path, [(images, labels)], classes=classes, shape=(4, 4, 1), shard_rows=50, origin={"kind": "test"})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """240 rows, 80 real: the grey level of each image is its place in the order of the margins."""
    table = margin_table(240, ties=False)
    margin = np.nan_to_num(table["margin"].to_numpy(), nan=9.0)
    rank = np.argsort(np.argsort(margin))
    label = table["label"].to_numpy().astype(np.int64)
    grey_store(tmp_path / "real" / "train", rank[:80], label[:80])
    grey_store(tmp_path / "synthetic", rank[80:], label[80:])
    (tmp_path / "margins").mkdir()
    for part, start in enumerate(range(0, 240, 100)):
        write_table(tmp_path / "margins" / f"part-{part:05d}.parquet", table.slice(start, 100), {"norm": "linf"})
    (tmp_path / "manifests" / "puma").mkdir(parents=True)
    strategy = Strategy.model_validate({"score": "margin", "keep": 0.5, "eps": {"rule": "margin"}})
    write_manifest(tmp_path / "manifests" / "puma", tmp_path / "margins", strategy, EPS)
    return tmp_path


def grey_levels(image: Image.Image, groups: int, count: int, classes: int) -> np.ndarray:
    """The grey level at the centre of each picture: (classes, groups, count)."""
    width = max(count * (TILE + GAP) + 3 * GAP, 90)
    pixels = np.asarray(image)[:, :, 0]
    tops = LINE + GAP + np.arange(classes) * (TILE + LINE + GAP)
    lefts = NAME_WIDTH + np.arange(groups)[:, None] * width + np.arange(count) * (TILE + GAP)
    return pixels[tops[:, None, None] + TILE // 2, lefts + TILE // 2]


def test_the_sheet_of_margins_shows_the_lowest_the_middle_and_the_highest_of_each_class(data: Path) -> None:
    table = margin_table(240, ties=False)
    margin, label = table["margin"].to_numpy(), table["label"].to_numpy()
    levels = grey_levels(sheet(data / "margins", data, per_group=3, max_classes=4), 3, 3, 4)
    rank = np.argsort(np.argsort(np.nan_to_num(margin, nan=9.0)))
    for c in range(4):
        ordered = np.sort(rank[(label == c) & ~np.isnan(margin)])
        middle = (len(ordered) - 3) // 2
        assert levels[c].tolist() == [ordered[:3].tolist(), ordered[middle : middle + 3].tolist(), ordered[-3:].tolist()]


def test_the_sheet_of_a_manifest_shows_kept_images_only(data: Path) -> None:
    levels = grey_levels(sheet(data / "manifests" / "puma", data, per_group=2, max_classes=4), 3, 2, 4)
    assert levels.max() < 120  # half of 240 are kept, those of lowest margin
    assert levels[:, 2].min() > 60


@pytest.mark.parametrize(("source", "part"), [("real/train", slice(0, 80)), ("synthetic", slice(80, 240))])
def test_the_sheet_of_a_store_shows_its_own_images_by_margin(data: Path, source: str, part: slice) -> None:
    table = margin_table(240, ties=False)
    margin, label = table["margin"].to_numpy(), table["label"].to_numpy()
    rank = np.argsort(np.argsort(np.nan_to_num(margin, nan=9.0)))
    levels = grey_levels(sheet(data / source, data, per_group=2, max_classes=4), 3, 2, 4)
    here = np.isin(np.arange(240), np.arange(240)[part]) & ~np.isnan(margin)
    for c in range(4):
        ordered = np.sort(rank[(label == c) & here])
        middle = (len(ordered) - 2) // 2
        assert levels[c].tolist() == [ordered[:2].tolist(), ordered[middle : middle + 2].tolist(), ordered[-2:].tolist()]


def test_the_sheet_of_a_store_without_margins_shows_the_first_images_of_each_class(data: Path) -> None:
    (data / "margins").rename(data / "no-margins")
    store = ImageStore.open(data / "synthetic")
    levels = grey_levels(sheet(data / "synthetic", data, per_group=4, max_classes=2), 1, 4, 2)
    for c in range(2):
        rows = np.flatnonzero(store.labels == c)[:4]
        assert levels[c, 0].tolist() == store.batch(rows)[:, 0, 0, 0].tolist()


def test_thirds_of_a_short_list_do_not_overlap() -> None:
    parts = [part.tolist() for part in thirds(np.arange(7), 5)]
    assert parts == [[0, 1], [2, 3], [5, 6]]
    assert [len(part) for part in thirds(np.arange(2), 5)] == [0, 0, 0]


def test_the_text_gives_schema_counts_and_quantiles(data: Path) -> None:
    table = margin_table(240, ties=False)
    margin = table["margin"].to_numpy()
    text = describe(data / "margins")
    assert f"  real{' ' * 20} 80" in text
    assert f"  not converged{' ' * 11} {np.isnan(margin).sum()}" in text
    assert "  norm: linf" in text
    assert all(any(line.startswith(f"  {name} ") for line in text) for name in MARGINS_SCHEMA.names)
    (line,) = [line for line in text[text.index("quantiles") :] if line.startswith("  margin ")]
    np.testing.assert_allclose([float(v) for v in line.split()[1:]][4], np.nanmedian(margin), rtol=1e-3)
    manifest = describe(data / "manifests" / "puma")
    assert "kept 120 of 240 (50.0%)" in manifest
    store = describe(data / "real" / "train")
    assert store[0].endswith("80 images of 4 x 4 x 1 uint8 in 2 shards")
    assert "  labels.npy               int64 (n,)" in store
    assert "  images-*.npy             uint8 (n, 4, 4, 1)" in store
    start = store.index("class") + 1
    per_class = np.bincount(table["label"].to_numpy()[:80])
    assert [int(line.split()[1]) for line in store[start : start + 4]] == per_class.tolist()
    rank = np.argsort(np.argsort(np.nan_to_num(margin, nan=9.0)))[:80]
    for name, values in (("per class", per_class), ("grey", np.repeat(rank, 16))):
        (line,) = [line for line in store[store.index("quantiles") :] if line.startswith(f"  {name:14}")]
        found = [float(value) for value in line[16:].split()]
        np.testing.assert_allclose(found, np.quantile(values, QUANTILES), rtol=1e-3)


def test_what_cannot_be_shown_says_so_in_one_line(data: Path) -> None:
    with pytest.raises(InputError, match="wanted an image store, a margin table or a manifest"):
        describe(data / "manifests")
    (data / "margins" / "part-00001.parquet").write_bytes(b"PAR1 no table")
    with pytest.raises(InputError, match=r"part-00001\.parquet: not a readable Parquet file"):
        describe(data / "margins")
    (data / "margins" / "part-00001.parquet").unlink()
    with pytest.raises(InputError, match="its 140 rows are not those of the stores"):
        sheet(data / "margins", data, per_group=2, max_classes=2)


def test_the_command_prints_and_writes_the_sheet(data: Path) -> None:
    command = [sys.executable, "-m", "pipeline", "show", str(data / "manifests" / "puma"), "--data", str(data)]
    run = subprocess.run([*command, "--sheet", str(data / "s.png")], cwd=ROOT, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "kept 120 of 240" in run.stdout
    with Image.open(data / "s.png") as image:
        assert image.format == "PNG"
