"""Artifacts for people: what is in a store, a margin table or a manifest, as lines of text and a contact sheet."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pipeline.artifacts import MANIFEST_SCHEMA, MARGINS_SCHEMA, SOURCES, read_json, scan_table, source_codes, table_parts
from pipeline.images import ImageStore, StoreHeader
from pipeline.params import InputError

QUANTILES = (0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1)
SAMPLE_IMAGES = 2000  # of a store, for the quantiles of its pixels
TITLES = ("lowest margins", "middle margins", "highest margins")
TILE, GAP, LINE = 48, 4, 12  # pixels of a picture, between pictures, and of a line of text
NAME_WIDTH = 110


@dataclass(frozen=True)
class Cell:
    """One picture of a sheet, and what is written below it."""

    image: NDArray[np.uint8]
    note: str


Row = tuple[str, list[list[Cell]]]  # the class, and its pictures by group


def describe(path: Path) -> list[str]:
    """Schema, counts and quantiles of the artifact at path, line by line; of a store those of the pixels of a sample.

    Raises:
        InputError: it is none that can be shown, or it is damaged.
    """
    if (path / "store.json").is_file():
        return describe_store(path)
    if (path / "manifest.parquet").is_file():
        summary = read_json(path / "summary.json")
        lines = [f"{path}: manifest", *schema_lines(MANIFEST_SCHEMA, {}), ""]
        lines += [f"kept {summary['kept']} of {summary['total']} ({summary['fraction_kept']:.1%})"]
        lines += counts("reason", summary["reasons"])
        by_class = sorted(summary["by_class"].items(), key=lambda item: int(item[0]))
        for name, values in (("source", summary["by_source"].items()), ("class", by_class)):
            lines += counts(name, {key: f"{value['kept']} of {value['total']}" for key, value in values})
        return lines + quantile_lines({"eps": column(path / "manifest.parquet", MANIFEST_SCHEMA, "eps")})
    if path.is_dir() and list(path.glob("part-*.parquet")):
        return describe_margins(path)
    raise InputError(f"{path}: wanted an image store, a margin table or a manifest, such as data/real/train or data/margins")


def describe_store(path: Path) -> list[str]:
    header, store = StoreHeader.read(path), ImageStore.open(path)
    size = " x ".join(map(str, store.shape))
    lines = [f"{path}: image store, {len(store)} images of {size} uint8 in {len(header.shards)} shards"]
    files = {"images-*.npy": f"uint8 (n, {', '.join(map(str, store.shape))})", "labels.npy": "int64 (n,)"}
    if header.source_rows_sha256 is not None:
        files["source_rows.npy"] = "int64 (n,), the row of each image in its source"
    lines += counts("schema", files)
    lines += counts("class", dict(zip(header.classes, header.class_counts, strict=True)))
    lines += counts("origin", header.origin)
    rows = np.arange(0, len(store), max(1, len(store) // SAMPLE_IMAGES))
    lines += [f"images per class, and the channels of {len(rows)} images from end to end"]
    return lines + quantile_lines({"per class": np.array(header.class_counts, np.float32), **channels(store, rows)})


def channels(store: ImageStore, rows: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
    """The pixel values of the images of rows (B,), channel by channel."""
    values = store.batch(rows).reshape(-1, store.shape[2]).T.astype(np.float32)
    names = {1: ["grey"], 3: ["red", "green", "blue"]}.get(len(values), [f"channel {c}" for c in range(len(values))])
    return dict(zip(names, values, strict=True))


def describe_margins(path: Path) -> list[str]:
    found = pq.read_schema(table_parts(path, MARGINS_SCHEMA)[0]).metadata or {}
    metadata = {key.decode(): value.decode() for key, value in found.items()}
    lines = [f"{path}: margin table", *schema_lines(MARGINS_SCHEMA, metadata), ""]
    rows = dict.fromkeys(SOURCES, 0)
    wrong = missing = 0
    for batch in scan_table(path, MARGINS_SCHEMA, ["source", "label", "predicted", "converged"]):
        for code, count in zip(*np.unique(source_codes(batch), return_counts=True), strict=True):
            rows[SOURCES[code]] += int(count)
        wrong += int(np.count_nonzero(batch["label"].to_numpy() != batch["predicted"].to_numpy()))
        missing += len(batch) - batch["converged"].true_count
    lines += counts("source", rows) + counts("rows that are", {"misclassified": wrong, "not converged": missing})
    names = [field.name for field in MARGINS_SCHEMA if pa.types.is_floating(field.type)]
    return lines + quantile_lines({name: column(path, MARGINS_SCHEMA, name) for name in names})


def schema_lines(schema: pa.Schema, metadata: dict[str, str]) -> list[str]:
    lines = [f"  {field.name:14} {field.type}{'' if field.nullable else ', never null'}" for field in schema]
    return lines + [f"  {key}: {value}" for key, value in sorted(metadata.items())]


def counts(title: str, values: dict[str, Any]) -> list[str]:
    return [title, *(f"  {name:24} {value}" for name, value in values.items())]


def column(path: Path, schema: pa.Schema, name: str) -> NDArray[np.float32]:
    """All values of a column that are not null."""
    batches = [batch.column(0).drop_null().to_numpy() for batch in scan_table(path, schema, [name])]
    return np.concatenate(batches) if batches else np.empty(0, np.float32)


def quantile_lines(columns: dict[str, NDArray[np.float32]]) -> list[str]:
    lines = ["quantiles", "  " + " " * 14 + "".join(f"{q:>10g}" for q in QUANTILES)]
    for name, values in columns.items():
        found = np.quantile(values, QUANTILES).tolist() if len(values) else []
        lines.append(f"  {name:14}" + ("".join(f"{value:10.4g}" for value in found) or "  no value"))
    return lines


def sheet(path: Path, data: Path, *, per_group: int, max_classes: int) -> Image.Image:
    """The contact sheet of a store, a margin table or a manifest: the images of lowest, middle and highest margin of each
    class, of a manifest the kept ones. Stores and margins are looked for below data; a store without margins shows the
    first images of each class.

    Raises:
        InputError: an artifact that it needs is missing or was made for other images.
    """
    places = {"real": data / "real" / "train", "synthetic": data / "synthetic"}
    source = next((name for name, place in places.items() if path.resolve() == place.resolve()), None)
    is_store = (path / "store.json").is_file()
    measured = list((data / "margins").glob("part-*.parquet"))
    if is_store and (source is None or not measured):
        return draw(store_rows(ImageStore.open(path), per_group, max_classes), ["first images"])
    stores = {name: ImageStore.open(place) for name, place in places.items()}
    if is_store and sum(map(len, stores.values())) != sum(pq.read_metadata(part).num_rows for part in measured):
        return draw(store_rows(ImageStore.open(path), per_group, max_classes), ["first images (the margins are of others)"])
    if is_store:
        part = np.repeat([name == source for name in stores], [len(store) for store in stores.values()])
        return draw(margin_rows(data / "margins", part, stores, per_group, max_classes), TITLES)
    manifest = path / "manifest.parquet"
    kept = None
    if manifest.is_file():
        kept = np.concatenate(
            [b["kept"].to_numpy(zero_copy_only=False) for b in scan_table(manifest, MANIFEST_SCHEMA, ["kept"])]
        )
    margins = data / "margins" if kept is not None else path
    return draw(margin_rows(margins, kept, stores, per_group, max_classes), TITLES)


def store_rows(store: ImageStore, count: int, max_classes: int) -> Iterator[Row]:
    for label, name in enumerate(store.classes[:max_classes]):
        rows = np.flatnonzero(store.labels == label)[:count]
        yield name, [[Cell(image, str(row)) for row, image in zip(rows, store.batch(rows), strict=True)]]


def margin_rows(
    margins: Path, chosen: NDArray[np.bool_] | None, stores: dict[str, ImageStore], count: int, max_classes: int
) -> Iterator[Row]:
    batches = list(scan_table(margins, MARGINS_SCHEMA, ["label", "margin"]))
    label = np.concatenate([batch["label"].to_numpy() for batch in batches])
    margin = np.concatenate([batch["margin"].to_numpy(zero_copy_only=False) for batch in batches])
    del batches
    num_real = len(stores["real"])
    if len(label) != num_real + len(stores["synthetic"]) or (chosen is not None and len(chosen) != len(label)):
        raise InputError(f"{margins}: its {len(label)} rows are not those of the stores or of the manifest; run `dvc repro`")
    shown = ~np.isnan(margin) if chosen is None else ~np.isnan(margin) & chosen
    for index, name in enumerate(stores["real"].classes[:max_classes]):
        rows = np.flatnonzero(shown & (label == index))
        rows = rows[np.argsort(margin[rows], kind="stable")]
        groups = []
        for group in thirds(rows, count):
            cells = []
            for row in group:
                source, local = ("real", row) if row < num_real else ("synthetic", row - num_real)
                cells.append(Cell(stores[source].batch(np.array([local]))[0], f"{margin[row]:.3g}"))
            groups.append(cells)
        yield name, groups


def thirds(ordered: NDArray[np.int64], count: int) -> list[NDArray[np.int64]]:
    """The first, the middle and the last count of ordered (n,), or of each third where n is small; none is in two."""
    count = min(count, len(ordered) // 3)
    middle = (len(ordered) - count) // 2
    return [ordered[:count], ordered[middle : middle + count], ordered[len(ordered) - count :]]


def draw(rows: Iterator[Row], titles: Sequence[str]) -> Image.Image:
    """One row of pictures per class."""
    table = list(rows)
    width = max((len(group) for _, groups in table for group in groups), default=0) * (TILE + GAP) + 3 * GAP
    height = TILE + LINE + GAP
    canvas = Image.new("RGB", (NAME_WIDTH + max(width, 90) * len(titles), LINE + GAP + height * len(table)), "white")
    pen = ImageDraw.Draw(canvas)
    for index, title in enumerate(titles):
        pen.text((NAME_WIDTH + index * max(width, 90), 0), title, fill="black")
    for line, (name, groups) in enumerate(table):
        top = LINE + GAP + line * height
        pen.text((2, top + TILE // 2 - LINE // 2), name[:17], fill="black")
        for index, group in enumerate(groups):
            for place, cell in enumerate(group):
                left = NAME_WIDTH + index * max(width, 90) + place * (TILE + GAP)
                canvas.paste(picture(cell.image), (left, top))
                pen.text((left, top + TILE), cell.note, fill="black")
    return canvas


def picture(pixels: NDArray[np.uint8]) -> Image.Image:
    """uint8 (H, W, C) in a square of TILE pixels."""
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).convert("RGB")
    smooth = max(image.size) > TILE
    return image.resize((TILE, TILE), Image.Resampling.BOX if smooth else Image.Resampling.NEAREST)
