"""Speed, tightness and agreement of our DeepFool beside its peers, in one run.

Same trained models, images, threads, batch, 50 iterations, overshoot 0.02 and box for all; correctly classified images
only, because the peers leave the others alone or move them anyhow. `median` is that of the distance each one reports: the
peers' to an image beyond the boundary, ours to the boundary; `across` is that to the image beyond it, for all alike. On the
CPU time is processor time, so that what else runs on the machine counts little.

    python benchmarks/deepfool.py --model data/margin_model/best --store data/real/train
    python benchmarks/deepfool.py ... --device cuda --tf32 --batch-size 256 --num-images 256 --slow-images 0

`--tricks` compares each trick with the default instead, `--tightness` the tight estimate with FAB.
"""

import ctypes
import json
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from deepfool_peers import FAST, ITERATIONS, OVERSHOOT, SLOW, Attack, fab, installed
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.balls import BALLS
from pipeline.batches import to_tensor
from pipeline.deepfool import DeepFoolParams, deepfool
from pipeline.hyperplanes import gradient_scale
from pipeline.images import ImageStore
from pipeline.models.checkpoint import load_model
from pipeline.models.inference import FewSizes, convolutions, inference_copy
from pipeline.threat import NormName
from pipeline.tight import tight

GOAL, GOAL_FOOLBOX, KEEP, WARM_UP = 5.0, 20.0, 0.7, 16
EVERY_CLASS: dict[str, Any] = {"first_candidates": None, "candidates": None}
MODES: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, bf16": {"bf16": True},
    "ours, bf16, overshoot 0.1": {"bf16": True, "overshoot": 0.1},
}
HEADLINE = "ours, bf16"  # margins that agree with float32's and are as tight as the peers', at the same overshoot
CALIBRATION = 128  # images at which the gradients of all classes are computed, as the stage does it
TRICKS: dict[str, tuple[dict[str, Any], str]] = {  # settings, and the model: fast, or as loaded, or in the default layout
    "default": ({}, "fast"),
    "1 candidate first": ({"first_candidates": 1}, "fast"),
    "2, by the last layer's weights": ({"scale": None}, "fast"),
    "3, by the last layer's weights": ({"scale": None, "first_candidates": 3}, "fast"),
    "all candidates first": ({"first_candidates": None}, "fast"),
    "all candidates always": (EVERY_CLASS, "fast"),
    "no forward pass to refine": ({"refine_steps": 0}, "fast"),
    "plain, not refined": ({"refine_steps": None}, "fast"),
    "BatchNorm not folded": ({}, "loaded"),
    "and channels first": ({}, "channels first"),
    "bf16": ({}, "bf16"),
    "bf16, overshoot 0.1": ({"overshoot": 0.1}, "bf16"),
}


@dataclass
class Row:
    model: str
    norm: str
    attack: str
    images_per_s: float
    median: float
    across: float
    success: float
    peak_mb: float
    ratio: float = 0.0


def ours(norm: NormName, *, closer: bool = False, bf16: bool = False, **settings: Any) -> Attack:
    def attack(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        estimate = tight if closer else deepfool
        common = {"max_iterations": ITERATIONS, "overshoot": OVERSHOOT, **settings}
        with convolutions(tf32=bf16 or torch.backends.cudnn.allow_tf32):
            result = estimate(model, x, y, ball=BALLS[norm], **common)
        # A tight point is on the boundary up to rounding, which the copy and the model do not share.
        return (x + 1.0005 * (result.x_adv - x) if closer else result.x_adv), result.margin.abs()

    return attack


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def reset_peak(device: torch.device) -> float:
    """Start a new peak; returns the memory in use, in MiB."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 2**20
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else resident("VmHWM")


def resident(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 2**10


def compare(
    attacks: dict[str, tuple[Attack, nn.Module, int]],
    judge: nn.Module,
    x: Tensor,
    y: Tensor,
    batch_size: int,
    rounds: int,
    names: tuple[str, str],
) -> list[Row]:
    """Attack name -> (attack, its model, its number of images). All take turns batch by batch, after a warm-up of 16
    images whose memory is what is reported: measuring it during the others would cost time."""
    seconds: dict[str, list[float]] = {name: [] for name in attacks}
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in attacks}
    memory = dict.fromkeys(attacks, 0.0)
    for name, (attack, model, count) in attacks.items():
        before = reset_peak(x.device)
        attack(model, x[: min(WARM_UP, count)], y[: min(WARM_UP, count)])
        memory[name] = peak(x.device) - before
        if x.device.type == "cuda":  # cuDNN plans each convolution for each number of images, at the first time
            attack(model, x[:batch_size][:count], y[:batch_size][:count])
    for turn in range(rounds):
        spent = dict.fromkeys(attacks, 0.0)
        for first in range(0, len(x), batch_size):
            for name, (attack, model, count) in attacks.items():
                a, b = x[first : min(first + batch_size, count)], y[first : min(first + batch_size, count)]
                if not len(a):
                    continue
                begin = now(x.device)
                x_adv, distance = attack(model, a, b)
                spent[name] += now(x.device) - begin
                if turn == 0:
                    with torch.no_grad():
                        crossed = judge(x_adv).argmax(dim=1) != b
                    found[name].append((x_adv.detach(), distance.detach(), crossed))
        for name in attacks:
            seconds[name].append(spent[name])
    rows = []
    for name, (_, _, count) in attacks.items():
        distance, crossed = (torch.cat([piece[i] for piece in found[name]]) for i in (1, 2))
        rate = min(len(x), count) / median(seconds[name])
        beyond = BALLS["linf" if names[1] == "linf" else "l2"].norm(torch.cat([piece[0] for piece in found[name]]) - x[:count])
        middles = distance[crossed].median().item(), beyond[crossed].median().item()
        rows.append(Row(*names, name, rate, *middles, crossed.float().mean().item(), memory[name]))
    fastest = max(row.images_per_s for row in rows if not row.attack.startswith("ours"))
    for row in rows:
        row.ratio = row.images_per_s / fastest
    return rows


def margins(model: nn.Module, x: Tensor, y: Tensor, norm: NormName, *, closer: bool = False, **settings: Any) -> Tensor:
    """Of all images, misclassified ones too, in pieces."""
    estimate = tight if closer else deepfool
    pieces = zip(x.split(128), y.split(128), strict=True)
    return torch.cat([estimate(model, a, b, ball=BALLS[norm], **settings).margin for a, b in pieces])


def exact_margins(model: nn.Module, x: Tensor, y: Tensor, norm: NormName, **settings: Any) -> Tensor:
    """In float32, DeepFool's over all classes."""
    classes = {} if settings.get("closer") else EVERY_CLASS
    with convolutions(tf32=False):
        return margins(inference_copy(model), x, y, norm, **classes, **settings)


def agreement(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    norm: NormName,
    wanted: Tensor,
    nearest: Tensor | None = None,
    *,
    bf16: bool = False,
    **settings: Any,
) -> dict[str, float]:
    """Of the settings with the exact margins (B,), and how much longer than the tight ones `nearest` (B,) they are."""
    with convolutions(tf32=bf16 or torch.backends.cudnn.allow_tf32):
        got = margins(inference_copy(model, bf16=bf16), x, y, norm, **settings)
    both = got.isfinite() & wanted.isfinite()
    cut = wanted[both].quantile(KEEP)
    over_tight = {} if nearest is None else {"over_tight": (got / nearest)[both & nearest.isfinite()].mean().item()}
    return over_tight | {
        "converged": got.isfinite().float().mean().item(),
        "spearman": float(spearmanr(wanted[both].cpu(), got[both].cpu()).statistic),
        "other_side": ((wanted > cut) != (got > cut))[both].float().mean().item(),
        "off_by_1_percent": (((got - wanted) / wanted).abs() > 0.01)[both].float().mean().item(),
    }


def floor(model: nn.Module, x: Tensor, y: Tensor, norm: NormName, scale: Tensor) -> float:
    """Images per second if the forward and backward passes that our DeepFool takes ran at the rate of a large convolution."""
    fast, passes = inference_copy(model), 0
    assert isinstance(fast, FewSizes)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        fast.model(x[:2])  # without what it fills up

    def note(_: nn.Module, inputs: tuple[Tensor], logits: Tensor) -> None:
        def count_backward(_: Tensor) -> None:
            nonlocal passes
            passes += len(logits)  # the gradient of the input takes as many operations as the forward pass

        nonlocal passes
        passes += len(inputs[0])
        if logits.requires_grad:
            logits.register_hook(count_backward)

    fast.register_forward_hook(note)
    deepfool(fast, x, y, ball=BALLS[norm], scale=scale)
    count = 8 if x.device.type == "cpu" else 256
    z, weight = torch.rand(count, 256, 32, 32, device=x.device), torch.rand(256, 256, 3, 3, device=x.device)
    z, weight = (t.to(memory_format=torch.channels_last) for t in (z, weight))
    times = []
    for _ in range(5):
        begin = now(x.device)
        torch.nn.functional.conv2d(z, weight, padding=1)
        times.append(now(x.device) - begin)
    rate = 2 * count * 256 * 256 * 9 * 32 * 32 / min(times)
    return rate / (counter.get_total_flops() / 2 * passes / len(x))


def show_tricks(
    model: nn.Module, x: Tensor, y: Tensor, right: Tensor, norm: NormName, rounds: int, scale: Tensor
) -> list[dict[str, Any]]:
    """Each trick of `TRICKS` against the default, on all images (agreement) and the correctly classified ones (time)."""
    models = {
        "fast": inference_copy(model), "loaded": model, "bf16": inference_copy(model, bf16=True),
        "channels first": inference_copy(model).to(memory_format=torch.contiguous_format),
    }  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in TRICKS}
    for turn in range(rounds + 1):
        for name, (settings, which) in TRICKS.items():
            begin = now(x.device)
            with convolutions(tf32=which == "bf16" or torch.backends.cudnn.allow_tf32):
                deepfool(models[which], x[right], y[right], ball=BALLS[norm], **{"scale": scale, **settings})
            if turn:
                times[name].append(now(x.device) - begin)
    rows = []
    refined = DeepFoolParams().refine_steps
    wanted = {steps: exact_margins(model, x, y, norm, refine_steps=steps) for steps in (refined, 0, None)}
    for name, (settings, which) in TRICKS.items():
        cost = median(times[name]) / median(times["default"])
        beside = wanted[settings.get("refine_steps", refined)]
        found = agreement(model, x, y, norm, beside, bf16=which == "bf16", **{"scale": scale, **settings})
        rows.append({"norm": norm, "trick": name, "time": cost, **found})
        print(
            f"{norm:5} {name:32} time {cost:5.2f}  spearman {found['spearman']:.5f}  other side {found['other_side']:.2%}  "
            f"off by 1 % {found['off_by_1_percent']:.1%}  converged {found['converged']:.1%}", flush=True,
        )  # fmt: skip
    return rows


def contestants(
    classifier: nn.Module, plain: nn.Module, fast: nn.Module, norm: NormName, count: int, slow_images: int, scale: Tensor
) -> dict[str, tuple[Attack, nn.Module, int]]:
    """The peers that are installed and the modes of ours: name -> (attack, its model, its number of images)."""
    attacks: dict[str, tuple[Attack, nn.Module, int]] = {}
    attacks["adv-lib, channels first"] = (FAST["adv-lib"](norm), plain, count)
    attacks |= {name: (make(norm), classifier, count) for name, make in FAST.items()}
    for name in SLOW if norm == "l2" and slow_images else ():
        if installed(name):
            attacks[name] = (SLOW[name](norm), classifier, slow_images)
            attacks["ours, on the images of the slow peers"] = (ours(norm, scale=scale), fast, slow_images)
        else:
            print(f"{norm:5} {name:38} not installed, left out")
    low = inference_copy(classifier, bf16=True)
    for mode, settings in MODES.items():
        attacks[mode] = (ours(norm, scale=scale, **settings), low if settings.get("bf16") else fast, count)
    return attacks


def main(
    model: Annotated[list[Path] | None, typer.Option()] = None,
    store: Path = Path("data/real/train"),
    num_images: int = 128,
    slow_images: int = 16,
    agreement_images: int = 400,
    batch_size: int = 64,
    num_rounds: int = 3,
    threads: int = 1,
    device: str = "cpu",
    tf32: Annotated[bool, typer.Option(help="On a GPU all in TensorFloat-32, PyTorch's default; `bf16` always is.")] = False,
    tricks: bool = False,
    tightness: bool = False,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = tf32
    where = torch.device(device)
    images = ImageStore.open(store)
    x_all = to_tensor(images.batch(np.arange(min(len(images), max(agreement_images, 3 * num_images)))), where).contiguous()
    y_all = torch.from_numpy(images.labels[np.arange(len(x_all))]).to(where)
    rows, extra = [], []
    for path in model or [Path("data/margin_model/best")]:
        classifier, _ = load_model(path, where)
        plain = load_model(path, where)[0].to(memory_format=torch.contiguous_format)
        with torch.no_grad():
            right = (classifier(x_all).argmax(dim=1) == y_all).nonzero().squeeze(1)[:num_images]
        x, y = x_all[right], y_all[right]
        few_x, few_y = x_all[:agreement_images], y_all[:agreement_images]
        fast = inference_copy(classifier)  # made once per data set, outside the time, as is the calibration
        print(f"\n{path}: {len(x)} images {tuple(x.shape[1:])}, batch {batch_size}, {threads} threads, {device}")
        for norm in BALLS:
            scale = gradient_scale(fast, x_all[-CALIBRATION:], BALLS[norm])
            if tricks:
                mine = right[right < agreement_images][:num_images]
                extra += show_tricks(classifier, few_x, few_y, mine, norm, num_rounds, scale)
                continue
            attacks = (
                {"FAB, 100 steps": (fab(norm), classifier, len(x)), "ours": (ours(norm, scale=scale), fast, len(x))}
                if tightness
                else contestants(classifier, plain, fast, norm, len(x), slow_images, scale)
            )
            attacks["ours, tight"] = (ours(norm, closer=True), fast, len(x))
            titles = f"{'images/s':>9} {'ratio':>6} {'median':>9} {'across':>9} {'success':>8} {'peak MiB':>9}"
            print(f"{'norm':5} {'attack':38} {titles}")
            for row in compare(attacks, classifier, x, y, batch_size, num_rounds, (path.name, norm)):
                rows.append(row)
                print(
                    f"{norm:5} {row.attack:38} {row.images_per_s:9.1f} {row.ratio:6.2f} {row.median:9.5f} {row.across:9.5f} "
                    f"{row.success:8.1%} {row.peak_mb:9.0f}", flush=True,
                )  # fmt: skip
            if tightness:
                continue
            mine = next(row for row in rows[::-1] if row.attack == "ours")
            share = mine.images_per_s / floor(classifier, x, y, norm, scale)
            wanted = exact_margins(classifier, few_x, few_y, norm)
            nearest = exact_margins(classifier, few_x, few_y, norm, closer=True)
            for mode, settings in MODES.items():
                found: dict[str, Any] = {"model": path.name, "norm": norm, "mode": mode}
                found |= agreement(classifier, few_x, few_y, norm, wanted, nearest, scale=scale, **settings)
                extra.append(found | ({"share_of_floor": share} if mode == "ours" else {}))
                shown = ", ".join(f"{key} {value:.4f}" for key, value in extra[-1].items() if isinstance(value, float))
                print(f"      {mode}: {shown}", flush=True)
    if tightness:
        medians = {(row.model, row.norm, row.attack): row.median for row in rows}
        worst = max(medians[m, n, "ours, tight"] / medians[m, n, "FAB, 100 steps"] for m, n, _ in medians)
        headline: dict[str, Any] = {"name": "median of tight over FAB's, worst model and norm", "ratio": worst, "goal": 1.02}
        print(f"\n{headline['name']}: {worst:.3f} (goal: at most 1.02)")
    elif rows:
        slowest = min(row.ratio for row in rows if row.attack == HEADLINE)
        name = f"DeepFool ({HEADLINE}), images/s over the fastest peer, worst model and norm"
        rates = {(row.model, row.norm, row.attack): row.images_per_s for row in rows}
        over = min(rates[m, n, HEADLINE] / rates[m, n, "foolbox"] for m, n, _ in rates)
        headline = {"name": name, "ratio": slowest, "goal": GOAL, "over_foolbox": over, "goal_over_foolbox": GOAL_FOOLBOX}
        print(f"\n{headline['name']}: {slowest:.2f} (goal {GOAL}), over foolbox: {over:.1f} (goal {GOAL_FOOLBOX:g})")
    else:
        headline = {"name": "tricks", "ratio": None, "goal": None}
    if json_file:
        machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__, "threads": threads}
        content = {"headline": headline, "rows": [*map(asdict, rows), *extra], "machine": machine}
        json_file.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
