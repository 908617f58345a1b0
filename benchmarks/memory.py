"""Peak memory of the margin stage on a store of many rows (sparse files of black 32 x 32 images and a tiny model), or of
drawing as many images shard by shard with a tiny generator.

python benchmarks/memory.py --rows 1000000
python benchmarks/memory.py --rows 32768 --sampling    # 8 shards
"""

import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from pipeline.artifacts import write_json
from pipeline.balls import BALLS
from pipeline.deepfool import DeepFoolParams
from pipeline.edm.network import NetworkParams, build_unet
from pipeline.edm.sampling import SamplerParams, sample_images
from pipeline.image_writing import join_stores, write_store
from pipeline.images import ImageStore, shard_name
from pipeline.margin_quality import write_quality
from pipeline.margins import MarginsSection, shards, write_shard
from pipeline.models import Classifier, ModelParams, build_network

SHAPE, SHARD_ROWS, LIMIT_GB = (32, 32, 3), 65536, 1.5
DRAWN_SHARD_ROWS = 4096  # small, so that a run of minutes has many shards
TINY = ModelParams(architecture="preactresnet", arguments={"blocks": [1], "width": 4, "stem_stride": 8})


def sparse_store(path: Path, rows: int) -> ImageStore:
    """A store whose images take no disk space; labels go round the classes."""
    path.mkdir()
    counts = [min(SHARD_ROWS, rows - first) for first in range(0, rows, SHARD_ROWS)]
    for index, count in enumerate(counts):
        np.lib.format.open_memmap(path / shard_name(index), "w+", np.uint8, (count, *SHAPE))
    np.save(path / "labels.npy", np.arange(rows) % 10)
    shards = [{"file": shard_name(index), "count": count, "sha256": ""} for index, count in enumerate(counts)]
    header = {
        "classes": list("0123456789"), "shape": list(SHAPE), "count": rows, "class_counts": [rows // 10] * 10,
        "shards": shards, "labels_sha256": "", "origin": {},
    }  # fmt: skip
    write_json(path / "store.json", header)
    return ImageStore.open(path)


def draw_images(folder: Path, rows: int) -> None:
    """As the stage synthesize does it: shards, each a store that is streamed to disk, then joined."""
    network = NetworkParams(channels=4, multipliers=(1, 1, 1), blocks=1, attention_resolutions=())
    net, parts = build_unet(network, SHAPE, 10, 0).requires_grad_(False), []
    sampler = SamplerParams(num_steps=2)
    for first in range(0, rows, DRAWN_SHARD_ROWS):
        stop = min(first + DRAWN_SHARD_ROWS, rows)
        chunks = sample_images(net, first, stop, batch_size=512, seed=0, sigma_data=0.5, sampler=sampler)
        parts.append(folder / f"part-{first}")
        classes = tuple("0123456789")
        write_store(parts[-1], chunks, classes=classes, shape=SHAPE, shard_rows=stop - first, origin={})
        print(f"{len(parts)} shards, {stop} images: resident set at most {resident_gb():.2f} GiB", flush=True)
    (folder / "all").mkdir()
    join_stores(folder / "all", parts, {})


def resident_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(
    rows: int = 1_000_000, sampling: bool = False, json_file: Annotated[Path | None, typer.Option("--json")] = None
) -> None:
    torch.set_num_threads(1)
    before, begin = resident_gb(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if sampling:
            draw_images(Path(folder), rows)
        else:
            measure_margins(Path(folder), rows)
    peak = resident_gb()
    print(f"{rows} rows ({rows * np.prod(SHAPE) / 2**30:.2f} GiB of pixels) in {time.perf_counter() - begin:.0f} s")
    print(f"resident set: {before:.2f} GiB before, at most {peak:.2f} GiB (limit {LIMIT_GB})")
    if json_file:
        what = "drawing" if sampling else "the margins of"
        headline = {"name": f"Peak resident GiB of {what} {rows} rows", "ratio": peak, "goal": LIMIT_GB}
        json_file.write_text(json.dumps({"headline": headline}, indent=2) + "\n")


def measure_margins(folder: Path, rows: int) -> None:
    """As the stage margins does it."""
    settings = MarginsSection(
        deepfool=DeepFoolParams(max_iterations=3), grand=False, batch_size=512, shard_rows=SHARD_ROWS, max_not_converged=1.0
    )
    model = Classifier(build_network(TINY, SHAPE, 10, 0), [0.5] * 3, [0.25] * 3).eval()
    stores = {"real": sparse_store(folder / "real", rows), "synthetic": sparse_store(folder / "synthetic", 0)}
    out = folder / "margins"
    out.mkdir()
    common = {"ball": BALLS["linf"], "settings": settings, "device": torch.device("cpu")}
    for index, shard in enumerate(shards(stores, SHARD_ROWS).values()):
        write_shard(
            out / f"part-{index:05d}.parquet", model, stores[shard["source"]], **shard,
            scale=None, model_digest="", progress=lambda *_: None, **common,  # type: ignore[arg-type]
        )  # fmt: skip
    write_quality(out, model, stores, **common)  # type: ignore[arg-type]


if __name__ == "__main__":
    typer.run(main)
