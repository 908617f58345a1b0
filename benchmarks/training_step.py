"""One TRADES step: the published implementation's, written out as its users run it, beside ours with each trick off and on.

Published (Wang et al., arXiv:2302.04638, as coded): float32, channels first, no compile; ten steps of KL from a uniform start
with BatchNorm by the batch, a clean pass before the attack and another in the loss. Same weights, images and radii for all, in
turns; a ratio is taken within a round. `--unattacked 0.3` gives that share of the images radius 0, as a margin strategy does.

    python benchmarks/training_step.py
    python benchmarks/training_step.py --device cuda --depth 28 --width 10 --batch-size 512
    python benchmarks/training_step.py --accuracy    # fast and plain path on cifar10-small's training
"""

import copy
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median, stdev
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.attacks import PGDParams
from pipeline.balls import BALLS
from pipeline.images import ImageStore
from pipeline.models import Classifier, ModelParams, build_network
from pipeline.models.inference import convolutions
from pipeline.params import read_yaml
from pipeline.threat import ThreatParams
from pipeline.training import TrainingParams, train
from pipeline.training.augmentation import AugmentationParams
from pipeline.training.batch import Batch
from pipeline.training.heldout import Selector
from pipeline.training.objective import batch_loss
from pipeline.training.pools import full_pool

GOAL = {"cpu": 1.8, "cuda": 4.0}
GOAL_POINTS = 0.5
EPS, STEP_255, BETA = 8 / 255, 2.0, 5.0
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}  # dense bf16, of the data sheets
Step = Callable[[], Tensor]


def published_step(model: nn.Module, x: Tensor, y: Tensor, num_steps: int) -> Tensor:
    """Loss of the published step, gradients in the parameters; every image in the ball of the threat."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.track_running_stats = False
    clean = F.softmax(model(x), dim=1).detach()
    x_adv = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
    for _ in range(num_steps):
        x_adv.requires_grad_()
        loss = F.kl_div(F.log_softmax(model(x_adv), dim=1), clean, reduction="batchmean")
        (grad,) = torch.autograd.grad(loss, [x_adv])
        x_adv = x_adv.detach() + STEP_255 / 255 * grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)
    for norm in norms:
        norm.track_running_stats = True
    model.zero_grad()
    natural, adversarial = model(x), model(x_adv)
    robust = F.kl_div(F.log_softmax(adversarial, dim=1), F.softmax(natural, dim=1), reduction="batchmean")
    loss = F.cross_entropy(natural, y, label_smoothing=0.1) + BETA * robust
    loss.backward()
    return loss.detach()


def in_true_float32(step: Step) -> Tensor:
    with convolutions(tf32=False):
        return step()


def recipe(num_steps: int, **fields: Any) -> TrainingParams:
    attack = PGDParams(num_steps=num_steps, step_size_255=STEP_255)
    values: dict[str, Any] = {
        "loss": "trades", "beta": BETA, "label_smoothing": 0.1, "attack": attack, "epochs": 1, "batch_size": 1,
        "synthetic_fraction": 0.7, "lr": 0.2, "augmentation": AugmentationParams(crop_padding=4, flip=True), "holdout": 1,
        "select_every": 1, "selection_attack": attack,
    }  # fmt: skip
    return TrainingParams.model_validate(values | fields)


def our_step(model: nn.Module, batch: Batch, params: TrainingParams) -> Tensor:
    """Loss of our step, gradients in the parameters."""
    model.zero_grad()
    start = torch.empty_like(batch.x).uniform_(-1, 1)
    loss = batch_loss(model, batch, params, ball=BALLS["linf"], threat_eps=EPS, start=start)
    loss.backward()
    return loss.detach()


def contestants(model: nn.Module, x: Tensor, y: Tensor, num_steps: int, unattacked: float) -> dict[str, Step]:
    """Each row of the table has the tricks of the rows above it, but for those after the third, each on the third.
    On a GPU the published step is timed in true float32 too, without PyTorch's default of TensorFloat-32."""
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x_last = x.contiguous(memory_format=torch.channels_last)
    full = torch.full((len(x),), EPS)
    some = torch.where(torch.arange(len(x)) < round(unattacked * len(x)), 0.0, full)
    ours, first, rest = Batch(x_last, y, full), Batch(x, y, full), Batch(x_last, y, some)
    plain = recipe(num_steps)
    steps = {
        "published": lambda: published_step(model, x, y, num_steps),
        "ours: one clean pass": lambda: our_step(model, first, plain),
        "+ channels last": lambda: our_step(last, ours, plain),
        "+ statistics of the clean batch": lambda: our_step(last, ours, recipe(num_steps, attack_batchnorm="clean")),
        "+ running statistics": lambda: our_step(last, ours, recipe(num_steps, attack_batchnorm="running")),
        "+ bf16": lambda: our_step(last, ours, recipe(num_steps, precision="bf16")),
        "+ bf16, clean statistics": lambda: our_step(last, ours, recipe(num_steps, precision="bf16", attack_batchnorm="clean")),
        f"+ {unattacked:.0%} of radius 0": lambda: our_step(last, rest, plain),
        f"+ bf16, {unattacked:.0%} of radius 0": lambda: our_step(last, rest, recipe(num_steps, precision="bf16")),
    }
    if x.device.type == "cuda":
        steps["published, true float32"] = lambda: in_true_float32(steps["published"])
    return steps


def forward_flops(model: nn.Module, x: Tensor) -> int:
    """Floating point operations of the convolutions and matrix products of one forward pass."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


def passes(name: str, num_steps: int, unattacked: float) -> float:
    """What a step computes, in forward passes of the batch: a gradient to the images costs one more, one to the weights two."""
    attacked = 1 - unattacked if "radius 0" in name else 1.0
    clean = 1 if "published" in name or "running" in name else 0
    return clean + 2 * num_steps * attacked + 2 * 3


def timed(step: Step, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def accuracy(data: Path, num_seeds: int, device: torch.device) -> list[dict[str, Any]]:
    """Clean and PGD accuracy on all test images at the end of cifar10-small's training: its float32 beside bf16, and bf16
    with the statistics of the clean batch."""
    chosen = read_yaml(Path("recipes/cifar10-small.yaml"))["train"]
    plain, model = TrainingParams.model_validate(chosen["training"]), ModelParams.model_validate(chosen["model"])
    stores = {"real": ImageStore.open(data / "real" / "train"), "synthetic": ImageStore.open(data / "synthetic")}
    threat, test = ThreatParams(norm="linf", eps_255=8), ImageStore.open(data / "real" / "test")
    judge = Selector(test, np.arange(len(test)), plain.selection_attack, BALLS["linf"], threat.eps, 500, device)
    rows: list[dict[str, Any]] = []
    bf16 = plain.model_copy(update={"precision": "bf16"})
    paths = {"plain": plain, "bf16": bf16, "bf16, clean": bf16.model_copy(update={"attack_batchnorm": "clean"})}
    for seed in range(num_seeds):
        for name, params in paths.items():
            pools = {source: full_pool(store, threat.eps) for source, store in stores.items()}
            net = build_network(model, stores["real"].shape, len(stores["real"].classes), seed)
            result = train(net, pools, params, threat=threat, seed=seed, device=device, progress=lambda *_: None)
            clean, robust = judge.score(result.last)
            rows.append({"seed": seed, "path": name, "clean": clean, "robust": robust, "num_test": len(test)})
            print(f"seed {seed} {name:11} clean {clean:.4f} PGD {robust:.4f} of {len(test)} test images", flush=True)
    return rows


def paid(rows: list[dict[str, Any]]) -> float:
    """The largest loss of mean clean or PGD accuracy by a fast path, in points; each mean loss is printed with its standard
    error over the seeds."""
    losses = []
    for path in dict.fromkeys(row["path"] for row in rows if row["path"] != "plain"):
        for kind in ("clean", "robust"):
            pairs = [
                100 * (plain[kind] - fast[kind])
                for plain, fast in zip(*([row for row in rows if row["path"] == name] for name in ("plain", path)), strict=True)
            ]
            losses.append(mean(pairs))
            error = stdev(pairs) / len(pairs) ** 0.5
            print(f"{path}: loses {losses[-1]:+.2f} points of {kind} accuracy, standard error {error:.2f}")
    return max(losses)


def write_report(path: Path | None, name: str, ratio: float, goal: float, rows: list[dict[str, Any]]) -> None:
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    if path:
        headline = {"name": name, "ratio": ratio, "goal": goal}
        path.write_text(json.dumps({"headline": headline, "rows": rows, "machine": machine}, indent=2) + "\n")


def main(
    device: str = "cpu",
    depth: int = 10,
    width: int = 2,
    batch_size: int = 32,
    num_steps: int = 10,
    num_rounds: int = 7,
    unattacked: float = 0.3,
    threads: int = 1,
    accuracy_run: Annotated[bool, typer.Option("--accuracy")] = False,
    num_seeds: Annotated[int, typer.Option(min=2)] = 3,
    data: Annotated[Path, typer.Option(help="Stores of cifar10-small, for --accuracy.")] = Path("data"),
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    torch.set_num_threads(threads)
    where = torch.device(device)
    if accuracy_run:
        seeds = accuracy(data, num_seeds, where)
        what = "points of accuracy that the fast path pays"
        most = paid(seeds)
        print(f"{what}: {most:.2f} (goal {GOAL_POINTS})")
        write_report(json_file, what, most, GOAL_POINTS, seeds)
        return
    net = build_network(ModelParams(architecture="wideresnet", arguments={"depth": depth, "width": width}), (32, 32, 3), 10, 0)
    model = Classifier(net, [0.5] * 3, [0.25] * 3).to(where).train()
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.random((batch_size, 3, 32, 32), np.float32)).to(where)
    y = torch.from_numpy(rng.integers(0, 10, batch_size)).to(where)
    steps = contestants(model, x, y, num_steps, unattacked)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(num_rounds + 1):
        for name, step in steps.items():
            taken = timed(step, where)
            if number:
                seconds[name].append(taken)
    work = forward_flops(model, x)
    card = torch.cuda.get_device_name() if where.type == "cuda" else ""
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in card), None)
    rows: list[dict[str, Any]] = []
    print(f"WRN-{depth}-{width}, batch {batch_size}, {num_steps} attack steps, {work / 1e9:.1f} GFLOP a forward pass")
    print(f"{'step':34} {'images/s':>9} {'ratio':>6} {'GFLOP/s':>8}" + ("    MFU" if peak else ""))
    for name, times in seconds.items():
        ratio = median(a / b for a, b in zip(seconds["published"], times, strict=True))
        # Utilisation counts what this step computes, not what the published one would.
        rate = work * passes(name, num_steps, unattacked) / median(times)
        rows.append({"step": name, "images_per_s": batch_size / median(times), "ratio": ratio, "flops": rate})
        used = f" {rate / peak:6.1%}" if peak else ""
        print(f"{name:34} {batch_size / median(times):9.1f} {ratio:6.2f} {rate / 1e9:8.1f}{used}")
    best = max(row["ratio"] for row in rows if "radius 0" not in row["step"])
    goal = GOAL[where.type]
    print(f"TRADES step, over the published one: {best:.2f} (goal {goal})")
    write_report(json_file, "TRADES step, over the published one", best, goal, rows)


if __name__ == "__main__":
    typer.run(main)
