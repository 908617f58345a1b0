"""Images per second and tightness of our DeepFool beside adv-lib's and foolbox's, in one run.

The median is that of the distance each one reports: the peers' to an image 2 % beyond the boundary, ours to the boundary.
Same trained model, images, threads, batch, 50 iterations, overshoot 0.02 and box; correctly classified images only,
because the peers leave the others alone. Peers come with `pip install -e ".[bench]"`.

    python benchmarks/deepfool.py --model data/margin_model/best --store data/real/train
"""

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor, nn

from pipeline.batches import to_tensor
from pipeline.deepfool import deepfool
from pipeline.images import ImageStore
from pipeline.models.checkpoint import load_model
from pipeline.threat import BALLS, NormName

Attack = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]  # model, x, y -> x_adv, distance (B,)
ITERATIONS, OVERSHOOT, GOAL = 50, 0.02, 5.0


def ours(norm: NormName) -> Attack:
    def attack(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        result = deepfool(
            model, x, y, ball=BALLS[norm], max_iterations=ITERATIONS, overshoot=OVERSHOOT
        )  # fmt: skip
        return result.x_adv, result.margin.abs()

    return attack


def adv_lib(norm: NormName) -> Attack:
    from adv_lib.attacks import df

    order = {"linf": float("inf"), "l2": 2.0}[norm]

    def attack(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x_adv = df(model, x, y, steps=ITERATIONS, overshoot=OVERSHOOT, norm=order)
        return x_adv, BALLS[norm].norm(x_adv - x)

    return attack


def foolbox(norm: NormName) -> Attack:
    import foolbox as package

    kind = {"linf": package.attacks.LinfDeepFoolAttack, "l2": package.attacks.L2DeepFoolAttack}[norm]

    def attack(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        wrapped = package.PyTorchModel(model, bounds=(0, 1), device=x.device)
        _, clipped, _ = kind(steps=ITERATIONS, overshoot=OVERSHOOT, candidates=None)(wrapped, x, y, epsilons=None)
        return clipped, BALLS[norm].norm(clipped - x)

    return attack


def rounds(
    attacks: dict[str, Attack], model: nn.Module, x: Tensor, y: Tensor, batch_size: int, count: int
) -> tuple[dict[str, list[float]], dict[str, tuple[Tensor, Tensor]]]:
    """Seconds per round, peers alternating, after one warm-up batch each; and the last images and distances of each."""
    times: dict[str, list[float]] = {name: [] for name in attacks}
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for attack in attacks.values():
        attack(model, x[:batch_size], y[:batch_size])
    for _ in range(count):
        for name, attack in attacks.items():
            begin = time.perf_counter()
            pieces = [attack(model, a, b) for a, b in zip(x.split(batch_size), y.split(batch_size), strict=True)]
            if x.is_cuda:
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - begin)
            x_adv, distance = (torch.cat(part).detach() for part in zip(*pieces, strict=True))
            found[name] = x_adv, distance
    return times, found


def main(
    model: Path = Path("data/margin_model/best"),
    store: Path = Path("data/real/train"),
    num_images: int = 256,
    batch_size: int = 128,
    num_rounds: int = 3,
    threads: int = 1,
    device: str = "cpu",
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    torch.set_num_threads(threads)
    classifier, _ = load_model(model, torch.device(device))
    images = ImageStore.open(store)
    x = to_tensor(images.batch(np.arange(min(len(images), 2 * num_images))), torch.device(device)).contiguous()
    y = torch.from_numpy(images.labels[np.arange(len(x))]).to(device)
    with torch.no_grad():
        right = (classifier(x).argmax(dim=1) == y).nonzero().squeeze(1)[:num_images]
    x, y = x[right], y[right]
    rows = []
    print(f"{len(x)} images {tuple(x.shape[1:])}, batch {batch_size}, {threads} threads, {device}")
    print(f"{'norm':5} {'attack':10} {'images/s':>9} {'ratio':>6} {'median':>9} {'success':>8}")
    for norm in ("linf", "l2"):
        attacks = {"adv-lib": adv_lib(norm), "foolbox": foolbox(norm), "ours": ours(norm)}
        times, found = rounds(attacks, classifier, x, y, batch_size, num_rounds)
        fastest_peer = max(len(x) / median(times[name]) for name in attacks if name != "ours")
        for name in attacks:
            with torch.no_grad():
                crossed = classifier(found[name][0]).argmax(dim=1) != y
            distance = found[name][1][crossed]
            rate = len(x) / median(times[name])
            row = {
                "norm": norm, "attack": name, "images_per_s": rate, "ratio": rate / fastest_peer,
                "median": distance.median().item(), "success": crossed.float().mean().item(),
            }  # fmt: skip
            rows.append(row)
            print(f"{norm:5} {name:10} {rate:9.1f} {row['ratio']:6.2f} {row['median']:9.5f} {row['success']:8.1%}", flush=True)
    slowest = min(row["ratio"] for row in rows if row["attack"] == "ours")
    headline = {"name": "DeepFool, images/s over the fastest peer, worst norm", "ratio": slowest, "goal": GOAL}
    print(f"{headline['name']}: {slowest:.2f} (goal {GOAL})")
    if json_file:
        machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__, "threads": threads}
        json_file.write_text(json.dumps({"headline": headline, "rows": rows, "machine": machine}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
