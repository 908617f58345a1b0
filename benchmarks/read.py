"""Random batches of images per second: from an image store, beside arrays in memory, Hugging Face datasets and a DataLoader.

All give uint8 batches (B, 32, 32, 3) of random rows with their labels; the files are in the page cache. The DataLoader takes
image after image from the arrays in memory, as tensors, which is the least it can do, or as PIL images made into tensors, as
torchvision's CIFAR-10 does. Ratios are taken within a round, in which the readers of a group follow each other; what forks or
is slow is in a group of its own. A store above LARGEST_MAPPED (`--num-images 300000`) is read from its files instead of a map.

    python benchmarks/read.py --peers PATH_TO_PEERS
"""

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader, Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from pipeline.image_writing import write_store
from pipeline.images import LARGEST_MAPPED, Images, ImageStore, Labels

GOAL = 5.0
Reader = Callable[[list[np.ndarray]], Iterator[tuple[Any, Any]]]  # rows of each batch -> images and labels


class Items(Dataset[tuple[torch.Tensor, int]]):
    """One image at a time."""

    def __init__(self, images: Images, labels: Labels) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(self.images[row]), int(self.labels[row])


class PictureItems(Items):
    """One image at a time, by way of PIL."""

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return pil_to_tensor(Image.fromarray(self.images[row])), int(self.labels[row])


class Fixed(BatchSampler):
    """The given rows, batch by batch."""

    def __init__(self, batches: list[np.ndarray]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return (rows.tolist() for rows in self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def store_reader(store: ImageStore) -> Reader:
    return lambda batches: ((store.batch(rows), store.labels[rows]) for rows in batches)


def array_reader(images: Images, labels: Labels) -> Reader:
    return lambda batches: ((images[rows], labels[rows]) for rows in batches)


def loader_reader(items: Items, num_workers: int) -> Reader:
    return lambda batches: iter(DataLoader(items, batch_sampler=Fixed(batches), num_workers=num_workers))


def datasets_reader(images: Images, labels: Labels, folder: Path) -> Reader:
    """A dataset with the pixels in fixed-size lists, memory-mapped from Arrow files."""
    os.environ["HF_HOME"] = str(folder)
    import datasets

    features = datasets.Features({"image": datasets.Array3D(images.shape[1:], "uint8"), "label": datasets.Value("int64")})

    def rows() -> Iterator[dict[str, Any]]:
        for first in range(0, len(images)):
            yield {"image": images[first], "label": int(labels[first])}

    dataset = datasets.Dataset.from_generator(rows, features=features, cache_dir=str(folder)).with_format("numpy")

    def read(batches: list[np.ndarray]) -> Iterator[tuple[Any, Any]]:
        for chosen in batches:
            part = dataset[chosen.tolist()]
            yield part["image"], part["label"]

    return read


def rounds(
    readers: dict[str, Reader], limits: dict[str, int], num_rounds: int, num_batches: int, batch_size: int
) -> dict[str, list[float]]:
    """Seconds per image of each reader in each round, the first round left out."""
    rng = np.random.default_rng(1)
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    for number in range(num_rounds + 1):
        for name, read in readers.items():
            batches = [rng.integers(0, limits[name], batch_size) for _ in range(num_batches)]
            begin = time.perf_counter()
            given = sum(len(x) for x, _ in read(batches))
            if number:
                seconds[name].append((time.perf_counter() - begin) / given)
    return seconds


def table(seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Images per second, and how many times those of the plain DataLoader in the same round."""
    reference = seconds["DataLoader"]
    return [
        {
            "reader": name,
            "images_per_s": 1 / median(times),
            "ratio": median(other / own for other, own in zip(reference, times, strict=True)),
        }
        for name, times in seconds.items()
    ]


def main(
    num_images: int = 200_000,
    batch_size: int = 512,
    num_batches: int = 60,
    num_rounds: int = 15,
    num_datasets: Annotated[int, typer.Option(help="Images in the Hugging Face data set, which is slow to make.")] = 20_000,
    peers: Annotated[Path | None, typer.Option(help="Folder in which datasets is installed.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    torch.set_num_threads(1)
    if peers is not None:
        sys.path.append(str(peers))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (num_images, 32, 32, 3), np.uint8)
    labels = rng.integers(0, 10, num_images)
    with TemporaryDirectory() as folder:
        target = Path(folder) / "store"
        shape, classes = (32, 32, 3), tuple(map(str, range(10)))
        write_store(target, [(images, labels)], classes=classes, shape=shape, shard_rows=num_images // 20, origin={})
        store = ImageStore.open(target)
        for index in range(len(store.shard_counts)):
            store.shard(index).sum()  # the first epoch
        opening = []
        for _ in range(20):
            begin = time.perf_counter()
            ImageStore.open(target)
            opening.append(time.perf_counter() - begin)
        readers = {
            "ours": store_reader(store),
            "arrays in memory": array_reader(images, labels),
            "DataLoader": loader_reader(Items(images, labels), 0),
            "DataLoader, PIL": loader_reader(PictureItems(images, labels), 0),
            "DataLoader, 2 workers": loader_reader(Items(images, labels), 2),
        }
        try:
            readers["datasets"] = datasets_reader(images[:num_datasets], labels[:num_datasets], Path(folder) / "hf")
        except ImportError as error:
            print(f"datasets is left out: {error}")
        fast = {name: readers[name] for name in ("ours", "arrays in memory", "DataLoader")}
        slow = {name: read for name, read in readers.items() if name not in fast} | {"DataLoader": readers["DataLoader"]}
        limits = dict.fromkeys(readers, num_images) | {"datasets": num_datasets}
        seconds = rounds(fast, limits, num_rounds, num_batches, batch_size)
        slower = rounds(slow, limits, 3, max(5, num_batches // 10), batch_size)
    rows = [row for group in (seconds, slower) for row in table(group)]
    rows = [row for index, row in enumerate(rows) if row["reader"] not in [other["reader"] for other in rows[:index]]]
    how = "from its files" if images.nbytes > LARGEST_MAPPED else "from maps"
    print(f"{num_images} images in 20 shards, read {how}, batches of {batch_size}; opens in {1e3 * median(opening):.2f} ms")
    print(f"{'reader':22} {'images/s':>10} {'over DataLoader':>16}")
    for row in rows:
        print(f"{row['reader']:22} {row['images_per_s']:10.0f} {row['ratio']:16.2f}")
    headline = {"name": "random batches, over a plain DataLoader", "ratio": rows[0]["ratio"], "goal": GOAL}
    print(f"{headline['name']}: {rows[0]['ratio']:.1f} (goal {GOAL})")
    if json_file:
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        json_file.write_text(json.dumps({"headline": headline, "rows": rows, "machine": machine}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
