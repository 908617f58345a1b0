"""Two classifiers for the benchmarks, one trained normally and one adversarially, and a store of unseen images.

python benchmarks/models.py "PATH/train-*.parquet" "PATH/test-*.parquet"
python benchmarks/models.py "PATH/train-*.parquet" "PATH/test-*.parquet" --device cuda --depth 28 --width 10
"""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
import typer

from pipeline.attacks import pgd
from pipeline.balls import BALLS
from pipeline.batches import to_float, to_tensor
from pipeline.image_writing import write_store
from pipeline.images import ImageStore
from pipeline.losses import cross_entropy
from pipeline.models import Classifier, ModelParams, build_network
from pipeline.models.checkpoint import save_model
from pipeline.randomness import numpy_stream, torch_stream
from pipeline.sources.parquet import ParquetParams
from pipeline.sources.source import SplitName
from pipeline.training.augmentation import AugmentationParams, augment

AUGMENTATION = AugmentationParams(crop_padding=2, flip=True)
BATCH, EPS, SEED = 64, 8 / 255, 0


def fit(
    network: ModelParams, store: ImageStore, kind: Literal["standard", "robust"], steps: int, device: torch.device
) -> Classifier:
    """Nesterov SGD with one cycle; `robust` on PGD examples of two steps from a random start, Linf 8/255."""
    net = build_network(network, store.shape, len(store.classes), SEED)
    model = Classifier(net, [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]).to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps + 1)
    for step in range(steps):
        rows = np.sort(numpy_stream(SEED, step, "real_order").choice(len(store), BATCH, replace=False))
        images, y = torch.from_numpy(store.batch(rows)).to(device), torch.from_numpy(store.labels[rows]).to(device)
        x = to_float(augment(images, AUGMENTATION, seed=SEED, step=step))
        if kind == "robust":
            eps = torch.full((BATCH,), EPS, device=device)
            start = BALLS["linf"].uniform(x, torch_stream(SEED, step, "attack", device))
            model.eval()
            x = pgd(
                lambda z, y=y: cross_entropy(model(z), y),  # type: ignore[misc]
                x, ball=BALLS["linf"], eps=eps, step_size=0.6 * eps, num_steps=2, start=start,
            )  # fmt: skip
        model.train()
        loss = cross_entropy(model(x), y).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"{kind} {step}/{steps}: loss {loss.item():.3f}", flush=True)
    return model.eval()


def accuracy(model: Classifier, store: ImageStore, device: torch.device) -> float:
    with torch.no_grad():
        hits = [
            (model(to_tensor(images, device)).argmax(dim=1).cpu().numpy() == labels).sum()
            for _, images, labels in store.chunks(100)
        ]
    return float(np.sum(hits)) / len(store)


def main(
    train: str,
    test: str,
    out: Path = Path("benchmarks/cifar10"),
    num_train: int = 20000,
    num_test: int = 1000,
    standard_steps: int = 500,
    robust_steps: int = 500,
    depth: int = 10,
    width: int = 2,
    device: str = "cpu",
) -> None:
    torch.set_num_threads(1)
    network = ModelParams(architecture="wideresnet", arguments={"depth": depth, "width": width})
    counts: dict[SplitName, int] = {"train": num_train, "test": num_test}
    source = ParquetParams(
        kind="parquet", train=(train,), test=(test,), image_column="img", label_column="label", classes=None, size=None
    ).open()  # fmt: skip
    stores = {
        name: write_store(
            out / name,
            source.splits[name](np.arange(min(count, len(source.splits[name].labels)))),
            classes=source.classes,
            shape=source.shape,
            shard_rows=count,
            origin=source.origin,
        )
        for name, count in counts.items()
    }
    description = {
        **network.model_dump(),
        "shape": list(source.shape), "classes": list(source.classes),
    }  # fmt: skip
    for kind, steps in (("standard", standard_steps), ("robust", robust_steps)):
        model = fit(network, stores["train"], "standard" if kind == "standard" else "robust", steps, torch.device(device))
        save_model(out / kind, model, description)
        print(f"{kind}: {accuracy(model, stores['test'], torch.device(device)):.1%} of {num_test} test images", flush=True)


if __name__ == "__main__":
    typer.run(main)
