"""The data path of a training: images per second as augmented batches, and memory and start on many rows.

The rate: pools to augmented float batches on the device (crop, flip), beside a DataLoader over tensors and one over PIL images
with torchvision's transforms, in turns. Start and memory: a process of its own trains a tiny model from a sparse store of
--rows images with a manifest that keeps 70 % of them (0: left out), for --steps steps, and notes its resident set as it goes.

    python benchmarks/data_path.py
    python benchmarks/data_path.py --rows 50000000 --steps 5000
"""

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from math import ceil
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
from memory import sparse_store
from processes import finish, measure
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from pipeline.artifacts import MANIFEST_SCHEMA
from pipeline.attacks import PGDParams
from pipeline.image_writing import write_store
from pipeline.images import Images, ImageStore, Labels
from pipeline.models import ModelParams, build_network
from pipeline.threat import ThreatParams
from pipeline.training import TrainingParams, train
from pipeline.training.augmentation import AugmentationParams
from pipeline.training.batch import Plan
from pipeline.training.feed import feed, place_pools
from pipeline.training.pools import Pool, full_pool, read_pools

GOAL, GOAL_START_S, GOAL_GB = 50_000, 30.0, 2.0
SHAPE, BATCH = (32, 32, 3), 512
CHUNK = 2**20
AUGMENTATION = AugmentationParams(crop_padding=4, flip=True)
TINY = ModelParams(architecture="preactresnet", arguments={"blocks": [1], "width": 4, "stem_stride": 8})


class Items(Dataset[tuple[torch.Tensor, int]]):
    """Image after image: torchvision's transforms on tensors, or by way of PIL as its CIFAR-10 does."""

    def __init__(self, images: Images, labels: Labels, pil: bool) -> None:
        self.images, self.labels = images, labels
        shift = [v2.RandomCrop(32, 4), v2.RandomHorizontalFlip()]
        as_float = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
        self.transform = v2.Compose([v2.ToPILImage(), *shift, *as_float] if pil else [v2.ToImage(), *shift, as_float[1]])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[row]), int(self.labels[row])


def loader(images: Images, labels: Labels, pil: bool) -> Iterator[int]:
    """Sizes of the batches of a plain DataLoader."""
    return (len(x) for x, _ in DataLoader(Items(images, labels, pil), batch_size=BATCH, shuffle=True))


def ours(pools: dict[str, Pool], device: torch.device) -> Iterator[int]:
    """Sizes of our batches, on the device."""
    plan, counts = Plan(AUGMENTATION, BATCH, 10, 0), (len(pools["real"]), len(pools["synthetic"]))
    steps = feed(
        place_pools(pools, device, "auto"), plan, counts, synthetic_fraction=0.8, parts=[np.arange(BATCH)],
        steps=range(10**6), device=device,
    )  # fmt: skip
    for step in steps:
        for batch in step:
            if device.type == "cuda":
                torch.cuda.synchronize()
            yield len(batch.x)


def rate(sizes: Iterator[int], num_batches: int) -> float:
    """Images per second, the first batch left out."""
    next(sizes)
    begin = time.perf_counter()
    return sum(islice(sizes, num_batches)) / (time.perf_counter() - begin)


def rates(num_images: int, num_rounds: int, device: torch.device, folder: Path) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (num_images, *SHAPE), np.uint8), rng.integers(0, 10, num_images)
    common: dict[str, Any] = {"classes": tuple("0123456789"), "shape": SHAPE, "shard_rows": num_images // 20, "origin": {}}
    parts = {"real": slice(0, num_images // 4), "synthetic": slice(num_images // 4, None)}
    pools = {
        name: full_pool(write_store(folder / name, [(images[part], labels[part])], **common), 8 / 255)
        for name, part in parts.items()
    }
    for pool in pools.values():
        for shard in range(len(pool.store.shard_counts)):
            pool.store.shard(shard).sum()  # into the page cache, as after the first epoch
    contestants: dict[str, tuple[Callable[[], Iterator[int]], int]] = {
        "ours": (lambda: ours(pools, device), 200),
        "DataLoader": (lambda: loader(images, labels, pil=False), 4),
        "DataLoader, PIL": (lambda: loader(images, labels, pil=True), 4),
    }
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(num_rounds):
        for name, (begin, num_batches) in contestants.items():
            found[name].append(rate(begin(), num_batches))
    plain = found["DataLoader"]
    return [
        {"path": name, "images_per_s": median(values), "ratio": median(a / b for a, b in zip(values, plain, strict=True))}
        for name, values in found.items()
    ]


def write_big_manifest(path: Path, rows: int) -> None:
    """All rows synthetic, 70 % kept with one of two radii, as the manifest stage writes it."""
    encodings = {"row": "DELTA_BINARY_PACKED", "eps": "BYTE_STREAM_SPLIT"}
    with pq.ParquetWriter(
        path, MANIFEST_SCHEMA, compression="zstd", use_dictionary=["source", "label", "reason"], column_encoding=encodings
    ) as writer:
        for first in range(0, rows, CHUNK):
            row = np.arange(first, min(first + CHUNK, rows))
            kept = row % 10 < 7
            eps = np.where(row % 3 == 0, 4 / 255, 8 / 255)
            codes = {"source": pa.DictionaryArray.from_arrays(np.zeros(len(row), np.int8), ["synthetic"])}
            codes["reason"] = pa.DictionaryArray.from_arrays((~kept).astype(np.int8), ["kept", "high_margin"])
            columns = {"row": row, "label": row % 10, "kept": kept, "eps": pa.array(eps, mask=~kept)} | codes
            arrays = [pa.array(columns[field.name]).cast(field.type) for field in MANIFEST_SCHEMA]
            writer.write_batch(pa.record_batch(arrays, schema=MANIFEST_SCHEMA))


def resident_gb() -> dict[str, float]:
    """Resident set of this process, and what of it is mapped files, GiB."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[key].split()[0]) / 2**20 for name, key in (("all", "VmRSS"), ("files", "RssFile"))}


def start_and_train(folder: Path, device: torch.device, steps: int) -> dict[str, Any]:
    """Seconds from nothing to the first step of a training of a tiny model, and its resident set at ten of the steps."""
    begin, first, noted = time.perf_counter(), 0.0, []
    stores = {name: ImageStore.open(folder / name) for name in ("real", "synthetic")}
    pools = read_pools(folder / "manifest.parquet", stores)
    attack = PGDParams(num_steps=1, step_size_255=8)
    params = TrainingParams(
        loss="standard", attack=attack, epochs=1, batch_size=BATCH, synthetic_fraction=0.8, lr=0.1, augmentation=AUGMENTATION,
        holdout=256, select_every=1, selection_attack=attack,
    )  # fmt: skip

    def progress(done: int, total: int, _: object) -> None:
        nonlocal first
        first = first or time.perf_counter() - begin
        step, every = done // BATCH, max(1, total // BATCH // 10)
        if step == 1 or step % every == 0:
            noted.append({"step": step} | resident_gb())

    train(
        build_network(TINY, SHAPE, 10, 0), pools, params, threat=ThreatParams(norm="linf", eps_255=8), seed=0, device=device,
        progress=progress, steps_share=steps / ceil(len(stores["real"]) / BATCH),
    )  # fmt: skip
    return {"start_s": first, "rows": len(pools["synthetic"]), "resident": noted}


def many_rows(rows: int, steps: int, device: str, folder: Path) -> dict[str, Any]:
    """Start and memory on a sparse store of that many synthetic images and 50,000 real ones."""
    sparse_store(folder / "synthetic", rows)
    sparse_store(folder / "real", 50_000)
    write_big_manifest(folder / "manifest.parquet", rows)
    return measure(__file__, ["--run", str(folder), "--device", device, "--steps", str(steps)], timeout_s=1200)


def main(
    num_images: int = 200_000,
    num_rounds: int = 5,
    rows: Annotated[int, typer.Option(help="Rows of the sparse store; 0 leaves it out.")] = 0,
    steps: Annotated[int, typer.Option(help="Steps of the training on them.")] = 500,
    device: str = "cpu",
    threads: int = 1,
    run: Annotated[Path | None, typer.Option(hidden=True)] = None,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    torch.set_num_threads(threads)
    if run is not None:
        finish(lambda: start_and_train(run, torch.device(device), steps))
        return
    with TemporaryDirectory() as name:
        table = rates(num_images, num_rounds, torch.device(device), Path(name))
    print(f"{'data path':18} {'images/s':>10} {'over DataLoader':>16}")
    for row in table:
        print(f"{row['path']:18} {row['images_per_s']:10.0f} {row['ratio']:16.1f}")
    print(f"images per second {table[0]['images_per_s']:.0f} (goal {GOAL})")
    if rows:
        with TemporaryDirectory() as name:
            big = many_rows(rows, steps, device, Path(name))
        if "error" in big:
            sys.exit(f"{rows} rows: {big['error']}")
        table.append({"path": f"{rows} rows"} | big)
        print(f"{rows} rows, {big['rows']} kept: first step after {big['start_s']:.1f} s (goal {GOAL_START_S:.0f}),")
        print(f"resident set at most {big['peak_gb']:.2f} GiB (goal {GOAL_GB}), {big['base_gb']:.2f} GiB before")
        print(f"{'step':>8} {'resident GiB':>14} {'of files':>10}")
        for row in big["resident"]:
            print(f"{row['step']:8} {row['all']:14.2f} {row['files']:10.2f}")
    headline = {"name": "images per second of the data path", "ratio": table[0]["images_per_s"], "goal": GOAL}
    if json_file:
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        json_file.write_text(json.dumps({"headline": headline, "rows": table, "machine": machine}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
