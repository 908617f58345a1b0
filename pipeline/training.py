"""Adversarial training with a radius per sample: the recipe of Wang et al. (arXiv:2302.04638), one loop."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from pipeline.attacks import PGDParams, pgd
from pipeline.batches import AugmentationParams, Batch, Pool, augment, draw, load_batch, split_holdout, to_tensor
from pipeline.ema import EMA
from pipeline.images import ImageStore
from pipeline.losses import cross_entropy, cw_margin, kl_divergence, mart, trades
from pipeline.models import Classifier
from pipeline.params import InputError, Section
from pipeline.randomness import torch_stream
from pipeline.threat import BALLS, Ball, ThreatParams

Progress = Callable[[int, int, dict[str, float]], None]  # step, of steps, latest figures


class TrainingParams(Section):
    """The recipe. `loss: standard` trains without attack; `epochs` count batches as the recipe does,
    ceil(real images / batch_size) each, whatever the amount of synthetic data; `budget: scaled` multiplies the steps by
    the share of rows kept. Half of nothing is nothing: `synthetic_fraction` only counts when both sources have rows.
    One-cycle moves the learning rate and, as in the published code, the momentum (0.95 to 0.85 and back).
    `holdout` real images never enter training and select the best checkpoint every `select_every` epochs."""

    loss: Literal["standard", "pgd_at", "trades", "mart"]
    beta: NonNegativeFloat = 5.0
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    attack: PGDParams
    attack_batchnorm: Literal["batch", "running"] = "batch"
    epochs: PositiveInt
    budget: Literal["fixed", "scaled"] = "fixed"
    batch_size: PositiveInt
    synthetic_fraction: float = Field(ge=0, le=1)
    lr: PositiveFloat
    warmup_fraction: float = Field(default=0.025, gt=0, lt=1)
    weight_decay: NonNegativeFloat = 5e-4
    ema_decay: float = Field(default=0.995, ge=0, lt=1)
    augmentation: AugmentationParams
    holdout: PositiveInt
    holdout_seed: NonNegativeInt = 0
    select_every: PositiveInt
    selection_attack: PGDParams


@dataclass(frozen=True)
class TrainingResult:
    """`best` by PGD on the held-out images, and `last`, both averaged; `history`: one row per selection; `cost`."""

    best: Classifier
    last: Classifier
    history: list[dict[str, float]]
    cost: dict[str, int]


def train(
    net: nn.Module,
    pools: dict[str, Pool],
    params: TrainingParams,
    *,
    threat: ThreatParams,
    fraction_kept: float,
    seed: int,
    device: torch.device,
    progress: Progress,
) -> TrainingResult:
    """Train net on the pools of real and synthetic rows; a function of its arguments alone on one kind of device.

    Raises:
        InputError: the loss becomes NaN or infinite, or nothing is left to train on.
    """
    ball = BALLS[threat.norm]
    store = pools["real"].store
    real, held_out = split_holdout(pools["real"], params.holdout, params.holdout_seed)
    pools = {**pools, "real": real}
    mean, std = channel_statistics(store, held_out)
    model = Classifier(net, mean, std).to(device).to(memory_format=torch.channels_last).train()
    ema = EMA(model, params.ema_decay)
    steps_per_epoch = math.ceil((len(store) - params.holdout) / params.batch_size)
    steps = max(1, round(steps_per_epoch * params.epochs * (fraction_kept if params.budget == "scaled" else 1.0)))
    optimizer = make_optimizer(model, params)
    # A warm-up of exactly one step divides by zero in PyTorch.
    one_step = math.isclose(params.warmup_fraction * (steps + 1), 1)
    pct_start = params.warmup_fraction * (1.01 if one_step else 1)
    schedule = OneCycleLR(optimizer, params.lr, total_steps=steps + 1, pct_start=pct_start)

    selector = Selector(store, held_out, params.selection_attack, ball, threat.eps, device)
    best = copy.deepcopy(ema.model)
    best_score = (-1.0, -1.0)
    history: list[dict[str, float]] = []
    running: list[Tensor] = []
    figures: dict[str, float] = {}
    attacked = torch.zeros((), dtype=torch.int64, device=device)
    for step in range(steps):
        positions = draw(pools, step, batch_size=params.batch_size, synthetic_fraction=params.synthetic_fraction, seed=seed)
        batch = load_batch(pools, positions, device)
        batch = Batch(augment(batch.x, params.augmentation, seed=seed, step=step), batch.y, batch.eps)
        generator = torch_stream(seed, step, "attack", device)
        loss = batch_loss(model, batch, params, ball=ball, threat_eps=threat.eps, start=generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        ema.update(model, step)
        running.append(loss.detach())
        attacked += (batch.eps > 0).sum() if params.loss != "standard" else 0

        if (step + 1) % (steps_per_epoch * params.select_every) == 0 or step + 1 == steps:
            mean_loss = torch.stack(running).mean().item()
            running.clear()
            if not math.isfinite(mean_loss):
                raise InputError(
                    f"training: the loss is {mean_loss} before step {step + 1}; lower training.lr or training.beta"
                )
            clean, robust = selector.score(ema.model)
            if (robust, clean) > best_score:
                best_score = (robust, clean)
                best.load_state_dict(ema.model.state_dict())
            epoch = (step + 1) / steps_per_epoch
            figures = {"loss": mean_loss, "clean_accuracy": clean, "robust_accuracy": robust}
            lr = optimizer.param_groups[0]["lr"]
            history.append({"step": step + 1, "epoch": epoch, "lr": lr, **figures, "mean_eps": batch.eps.mean().item()})
        progress(step + 1, steps, figures)
    cost = {"steps": steps, "images_seen": steps * params.batch_size, "images_attacked": int(attacked)}
    return TrainingResult(best, ema.model, history, cost)


def batch_loss(
    model: nn.Module,
    batch: Batch,
    params: TrainingParams,
    *,
    ball: Ball,
    threat_eps: float,
    start: torch.Generator,
) -> Tensor:
    """Mean loss of one batch; samples of radius 0 take no attack steps and enter as their own adversarial example."""
    if params.loss == "standard":
        return cross_entropy(model(batch.x), batch.y, label_smoothing=params.label_smoothing).mean()
    x_adv = attack_batch(model, batch, params, ball=ball, threat_eps=threat_eps, start=start)
    if params.loss == "pgd_at":
        return cross_entropy(model(x_adv), batch.y, label_smoothing=params.label_smoothing).mean()
    clean_logits, adv_logits = model(batch.x), model(x_adv)
    if params.loss == "mart":
        return mart(clean_logits, adv_logits, batch.y, beta=params.beta).mean()
    return trades(clean_logits, adv_logits, batch.y, beta=params.beta, label_smoothing=params.label_smoothing).mean()


def attack_batch(
    model: nn.Module, batch: Batch, params: TrainingParams, *, ball: Ball, threat_eps: float, start: torch.Generator
) -> Tensor:
    """Adversarial examples (B, C, H, W): KL to the clean prediction for TRADES, cross-entropy otherwise. The step of a
    sample is scaled by eps_i / eps."""
    chosen = batch.eps > 0
    x, y, eps = batch.x[chosen], batch.y[chosen], batch.eps[chosen]
    if len(x) == 0:
        return batch.x
    step_size = eps * (params.attack.step_size_255 / 255 / threat_eps)
    with frozen_statistics(model, params.attack_batchnorm):
        if params.loss == "trades":
            with torch.no_grad():
                reference = model(x)
            attacked = pgd(
                lambda z: kl_divergence(model(z), reference),
                x, ball=ball, eps=eps, step_size=step_size, num_steps=params.attack.num_steps, start=start,
            )  # fmt: skip
        else:
            attacked = pgd(
                lambda z: cross_entropy(model(z), y),
                x, ball=ball, eps=eps, step_size=step_size, num_steps=params.attack.num_steps, start=start,
            )  # fmt: skip
    x_adv = batch.x.clone()
    x_adv[chosen] = attacked
    return x_adv


@contextmanager
def frozen_statistics(model: nn.Module, mode: Literal["batch", "running"]) -> Iterator[None]:
    """During an attack BatchNorm normalises by the batch (as in the recipe) or by its running statistics; either way
    these do not move, and every module's mode is as before afterwards."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.training, norm.track_running_stats) for norm in norms]
    for norm in norms:
        norm.train(mode == "batch")
        norm.track_running_stats = mode != "batch"
    try:
        yield
    finally:
        for norm, (training, track) in zip(norms, before, strict=True):
            norm.train(training)
            norm.track_running_stats = track


def make_optimizer(model: nn.Module, params: TrainingParams) -> torch.optim.SGD:
    """Nesterov SGD; no weight decay on BatchNorm and biases."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": params.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=params.lr, momentum=0.9, nesterov=True)


class Selector:
    """Clean and PGD accuracy (CW loss) on the held-out images, the same attack every time."""

    def __init__(
        self, store: ImageStore, rows: np.ndarray, attack: PGDParams, ball: Ball, eps: float, device: torch.device
    ) -> None:
        self.x = to_tensor(store.batch(rows), device)
        self.y = torch.from_numpy(store.labels[rows]).to(device)
        self.attack, self.ball = attack, ball
        self.eps = torch.full((len(rows),), eps, device=device)

    def score(self, model: nn.Module) -> tuple[float, float]:
        """(clean, robust) accuracy of a model in eval mode."""
        start = torch_stream(0, 0, "selection", self.x.device)
        step_size = torch.full_like(self.eps, self.attack.step_size_255 / 255)
        x_adv = pgd(
            lambda z: cw_margin(model(z), self.y),
            self.x, ball=self.ball, eps=self.eps, step_size=step_size, num_steps=self.attack.num_steps, start=start,
        )  # fmt: skip
        with torch.no_grad():
            clean, robust = ((model(z).argmax(dim=1) == self.y).float().mean().item() for z in (self.x, x_adv))
        return clean, robust


def channel_statistics(store: ImageStore, rows: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of the given images, pixel range; a constant channel has std 1."""
    pixels = store.batch(rows).reshape(-1, store.shape[2]) / 255
    std = pixels.std(axis=0)
    return pixels.mean(axis=0).tolist(), np.where(std > 1e-3, std, 1.0).tolist()
