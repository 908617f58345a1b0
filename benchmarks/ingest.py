"""Ingest: an .npz to an image store beside np.load and np.save, and encoded images on one core and on all.

The .npz is made by the script, uncompressed as those of Wang et al. 2023 (a million images take 3.07 GB). Both sides end with
everything flushed to the disk; ours also checks the labels and writes digests. The resident memory of each is that of its
process. The JPEGs are those of a tar in the layout of ImageFolder.

    python benchmarks/ingest.py --num-images 1000000
"""

import json
import os
import platform
import shutil
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from processes import finish, flush, measure

GOAL = 1.0
TINY_IMAGENET = Path("../shared/data/tiny-imagenet/tiny-imagenet-20.tar")
CHUNK = 50_000


def generate(file: Path, num_images: int) -> None:
    """Random images sorted by class."""
    import io
    import zipfile

    rng = np.random.default_rng(0)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("image.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": (num_images, 32, 32, 3)}
            np.lib.format.write_array_header_1_0(member, header)
            for first in range(0, num_images, CHUNK):
                count = min(CHUNK, num_images - first)
                member.write(rng.integers(0, 256, (count, 32, 32, 3), np.uint8).tobytes())
        buffer = io.BytesIO()
        np.save(buffer, np.arange(num_images) * 10 // num_images)
        archive.writestr("label.npy", buffer.getvalue())


def ours(file: Path, out: Path, seed: int | None) -> None:
    from pipeline.image_writing import write_store
    from pipeline.sources.npz import Archives, archive_split, read_labels

    archives = Archives.open([file])
    split = archive_split(archives, read_labels(archives), seed)
    classes = tuple(map(str, range(10)))
    write_store(out, split(), classes=classes, shape=archives.shape, shard_rows=65536, origin={"files": archives.origin()})


def load_and_save(file: Path, out: Path) -> None:
    out.mkdir()
    archive = np.load(file)
    np.save(out / "images.npy", archive["image"])
    np.save(out / "labels.npy", archive["label"])
    flush(out)


def jpeg(file: Path, out: Path) -> dict[str, int]:
    from pipeline.image_writing import write_store
    from pipeline.sources.imagefolder import ImageFolderParams

    inside = "tiny-imagenet-20/train"
    source = ImageFolderParams(kind="imagefolder", root=file, train=inside, test=None, test_fraction=0.01, size=64).open()
    store = write_store(
        out, source.splits["train"](), classes=source.classes, shape=source.shape, shard_rows=65536, origin=source.origin
    )
    return {"images": len(store)}


def torchvision(file: Path, out: Path) -> dict[str, int]:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    shutil.unpack_archive(file, out)
    dataset = ImageFolder(str(out / "tiny-imagenet-20" / "train"), v2.Compose([v2.Resize(64), v2.CenterCrop(64)]))
    np.save(out / "images.npy", np.stack([np.asarray(image) for image, _ in dataset]))
    np.save(out / "labels.npy", np.array(dataset.targets))
    flush(out)
    return {"images": len(dataset)}


def run_one(name: str, file: Path, out: Path) -> dict[str, Any] | None:
    match name:
        case "ours, in order":
            ours(file, out, None)
        case "ours, permuted":
            ours(file, out, 0)
        case "np.load, np.save":
            load_and_save(file, out)
        case "ours, one core":
            os.sched_setaffinity(0, [sorted(os.sched_getaffinity(0))[0]])
            return jpeg(file, out)
        case "ours, all cores":
            return jpeg(file, out)
        case _:
            return torchvision(file, out)
    return None


def compare(names: list[str], file: Path, folder: Path, num_rounds: int, title: str, against: str) -> list[dict[str, Any]]:
    """Alternating rounds; the row of each with its ratio over the one named against."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(num_rounds):
        for name in names:
            out = folder / "out"
            found[name].append(measure(__file__, ["--run", name, "--file", str(file), "--out", str(out)]))
            shutil.rmtree(out, ignore_errors=True)
    rows = []
    for name, results in found.items():
        if "error" in results[0]:
            print(f"{title:6} {name:18} {results[0]['error']}")
            continue
        seconds, peak = (median(result[key] for result in results) for key in ("seconds", "peak_gb"))
        rows.append({"input": title, "tool": name, "seconds": seconds, "peak_gb": peak})
    reference = next(row["seconds"] for row in rows if row["tool"] == against)
    for row in rows:
        row["ratio"] = reference / row["seconds"]
        print(f"{title:6} {row['tool']:18} {row['seconds']:8.2f} {row['peak_gb']:8.2f} {row['ratio']:6.2f}", flush=True)
    return rows


def main(
    num_images: int = 200_000,
    num_rounds: int = 3,
    folder: Path = Path("/tmp/ingest-benchmark"),
    tar: Path = TINY_IMAGENET,
    run: Annotated[str | None, typer.Option(hidden=True)] = None,
    file: Annotated[Path | None, typer.Option(hidden=True)] = None,
    out: Annotated[Path | None, typer.Option(hidden=True)] = None,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    if run is not None and file is not None and out is not None:
        finish(lambda: run_one(run, file, out))
        return
    folder.mkdir(parents=True, exist_ok=True)
    npz = folder / "images.npz"
    generate(npz, num_images)
    print(f"{num_images} images, {npz.stat().st_size / 1e9:.2f} GB")
    print(f"{'input':6} {'tool':18} {'seconds':>8} {'peak GB':>8} {'ratio':>6}")
    names = ["ours, in order", "ours, permuted", "np.load, np.save"]
    rows = compare(names, npz, folder, num_rounds, "npz", "np.load, np.save")
    if tar.is_file():
        jpegs = ["ours, one core", "ours, all cores", "torchvision"]
        rows += compare(jpegs, tar, folder, num_rounds, "JPEG", "ours, one core")
    shutil.rmtree(folder)
    own, peer = (next(row for row in rows if row["tool"] == name) for name in ("ours, in order", "np.load, np.save"))
    headline = {"name": "npz ingest, speed over np.load and np.save", "ratio": own["ratio"], "goal": GOAL}
    print(f"{headline['name']}: {own['ratio']:.2f} (goal {GOAL}); peak memory {own['peak_gb'] / peer['peak_gb']:.3f} of theirs")
    if json_file:
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        json_file.write_text(json.dumps({"headline": headline, "rows": rows, "machine": machine}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
