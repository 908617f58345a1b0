"""Small real data and models that several test modules share."""

import os
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from pipeline.image_writing import write_store
from pipeline.images import Chunk, ImageStore
from pipeline.models import Classifier, ModelParams, build_network
from pipeline.sources.digits import DigitsParams

os.environ.setdefault("PUMA_EXECUTION", "{backend: local}")  # also where SLURM is installed
torch.set_num_threads(1)  # the test processes share the cores

ROOT = Path(__file__).parents[1]
TINY = ModelParams(architecture="preactresnet", arguments={"blocks": [1], "width": 8, "stem_stride": 2})


def digits(split: Literal["train", "test"], count: int) -> Chunk:
    """The first images of a split of scikit-learn's digits, shuffled by a fixed seed."""
    images, labels = zip(*DigitsParams(kind="digits", test_fraction=0.2, seed=0).open().splits[split](), strict=True)
    order = np.random.default_rng(0).permutation(len(np.concatenate(labels)))[:count]
    return np.concatenate(images)[order], np.concatenate(labels)[order]


def make_store(path: Path, chunk: Chunk, shard_rows: int = 1000) -> ImageStore:
    images = chunk[0]
    shape = (images.shape[1], images.shape[2], images.shape[3])
    return write_store(path, [chunk], classes=tuple("0123456789"), shape=shape, shard_rows=shard_rows, origin={})


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ImageStore]:
    """400 real digits, and another 200 in the place of synthetic ones."""
    folder = tmp_path_factory.mktemp("stores")
    images, labels = digits("train", 600)
    return {
        "real": make_store(folder / "real", (images[:400], labels[:400])),
        "synthetic": make_store(folder / "synthetic", (images[400:], labels[400:])),
    }


@pytest.fixture(scope="session")
def test_store(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    return make_store(tmp_path_factory.mktemp("test") / "test", digits("test", 60))


def untrained(seed: int = 0, num_classes: int = 10) -> Classifier:
    """A tiny network with random weights in eval mode."""
    return Classifier(build_network(TINY, (8, 8, 1), num_classes, seed), [0.3], [0.3]).eval()
