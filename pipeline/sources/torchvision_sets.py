"""CIFAR-10, CIFAR-100 and SVHN as torchvision keeps and downloads them. torch is imported only when one is opened."""

import hashlib
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.images import Images, Labels
from pipeline.params import InputError, Section
from pipeline.sources.source import Source, array_split, check_unchanged, snapshot

Kind = Literal["cifar10", "cifar100", "svhn"]


class TorchvisionParams(Section):
    """`root` is torchvision's folder of the data set; with `download` what is missing is fetched into it."""

    kind: Kind
    root: Path
    download: bool = False

    def open(self) -> Source:
        return open_torchvision(kind=self.kind, root=self.root, download=self.download)


def open_torchvision(*, kind: Kind, root: Path, download: bool) -> Source:
    """A data set of torchvision with its own train and test splits.

    Raises:
        InputError: the files are not below root, damaged, changed while they were read, or cannot be downloaded.
    """
    before = snapshot(path for path in files(kind, root) if path.is_file())
    try:
        train, test = load(kind, root, True, download), load(kind, root, False, download)
    except (OSError, RuntimeError) as error:
        tried = "could not be downloaded to" if download else "was not found in"
        remedy = "put torchvision's files there by hand" if download else "set `download: true`"
        raise InputError(f"{kind}: {tried} {root} ({error}); {remedy} or use another kind of source") from error
    check_unchanged(before)
    content = {"train": arrays(train), "test": arrays(test)}
    return Source(
        classes=tuple(map(str, range(10))) if kind == "svhn" else tuple(train.classes),
        shape=(32, 32, 3),
        origin={"kind": kind, "root": root.as_posix(), "arrays": {name: digest(*found) for name, found in content.items()}},
        splits={"train": array_split(*content["train"]), "test": array_split(*content["test"])},
    )


def files(kind: Kind, root: Path) -> list[Path]:
    """Where torchvision keeps a data set."""
    from torchvision import datasets

    if kind == "svhn":
        return [root / f"{split}_32x32.mat" for split in ("train", "test")]
    found = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[kind]
    return [root / found.base_folder / name for name, _ in [*found.train_list, *found.test_list]]


def digest(images: Images, labels: Labels) -> str:
    """SHA-256 of the images and labels as read."""
    found = hashlib.sha256(np.ascontiguousarray(images).data)
    found.update(labels.data)
    return found.hexdigest()


def load(kind: Kind, root: Path, train: bool, download: bool) -> Any:
    from torchvision import datasets

    if kind == "svhn":
        return datasets.SVHN(root, split="train" if train else "test", download=download)
    return {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[kind](root, train=train, download=download)


def arrays(dataset: Any) -> tuple[Images, Labels]:
    """Images (n, 32, 32, 3) and labels (n,); SVHN alone keeps its channels first and calls its targets labels."""
    if hasattr(dataset, "targets"):
        return dataset.data, np.asarray(dataset.targets, np.int64)
    return dataset.data.transpose(0, 2, 3, 1), np.asarray(dataset.labels, np.int64)
