"""What a training run is between two steps."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoints import restore_optimizer
from pipeline.ema import EMA
from pipeline.models import Classifier
from pipeline.params import InputError
from pipeline.ranks import average_gradients, mean_over_ranks, world_size
from pipeline.training.heldout import Selector
from pipeline.training.optimisation import make_optimizer, make_schedule
from pipeline.training.recipe import TrainingParams

CURVE = ("loss", "lr", "mean_eps", "attacked")  # of one step; attacked: how many images


@dataclass(frozen=True)
class TrainingResult:
    """`best` by PGD on the held-out images, and `last`, both averaged; `history`: one row per selection; `curve`: step and
    CURVE, one row per step; `cost`."""

    best: Classifier
    last: Classifier
    history: list[dict[str, float]]
    curve: list[dict[str, float]]
    cost: dict[str, int]


class TrainingState:
    """What a run is between two steps."""

    def __init__(self, model: Classifier, params: TrainingParams, steps: int) -> None:
        self.model, self.step = model, 0
        self.ema = EMA(model, params.ema_decay, warmup=round(params.warmup_fraction * steps))
        self.best = copy.deepcopy(self.ema.model)
        self.best_score = [-1.0, -1.0]  # robust, clean
        self.optimizer = make_optimizer(model, params)
        self.schedule = make_schedule(self.optimizer, params, steps)
        self.history: list[dict[str, float]] = []
        self.figures: dict[str, float] = {}
        self.curve = torch.full((steps, len(CURVE)), math.nan, dtype=torch.float64)

    def saved(self) -> dict[str, Any]:
        """All of it, for a checkpoint.

        Raises:
            InputError: a weight is not finite; such a state would replace a good one.
        """
        self.check_weights()
        parts = ("model", "best", "optimizer", "schedule")
        plain = ("step", "best_score", "history", "figures", "curve")
        states = {name: getattr(self, name).state_dict() for name in parts} | {"ema": self.ema.model.state_dict()}
        return states | {name: getattr(self, name) for name in plain}

    def restore(self, saved: dict[str, Any]) -> None:
        """Become what `saved` was."""
        for name in ("model", "best", "schedule"):
            getattr(self, name).load_state_dict(saved[name])
        self.ema.model.load_state_dict(saved["ema"])
        restore_optimizer(self.optimizer, saved["optimizer"])
        for name in ("step", "best_score", "history", "figures", "curve"):
            setattr(self, name, saved[name])

    def update(self, loss: Tensor, eps: float, attacked: int) -> None:
        """One step of the optimiser, the schedule and the average, by the gradients that are there. Notes the mean loss and
        radius of the batch and how many of its images were attacked, each of this rank.

        Raises:
            InputError: the loss is not finite; the weights are then those before the step.
        """
        values = torch.tensor([0, eps, attacked], dtype=torch.float64).to(loss.device, non_blocking=True)
        values[0] = loss.detach()
        mean_loss, mean_eps, mean_attacked = mean_over_ranks(values).tolist()
        if not math.isfinite(mean_loss):
            raise InputError(self.stopped(f"the loss is {mean_loss}"))
        average_gradients(self.model.parameters())
        lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.schedule.step()
        self.ema.update(self.model, self.step)
        self.curve[self.step] = torch.tensor([mean_loss, lr, mean_eps, round(mean_attacked * world_size())])
        self.figures = self.figures | {"loss": mean_loss, "lr": lr, "mean_eps": mean_eps}
        self.step += 1

    def check_weights(self) -> None:
        """
        Raises:
            InputError: a weight is not finite.
        """
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.model.parameters()):
            raise InputError(self.stopped("a weight is not finite"))

    def stopped(self, what: str) -> str:
        return (
            f"training: {what} at step {self.step} of {len(self.curve)}; lower training.lr or training.beta, or raise "
            "training.warmup_fraction"
        )

    def select(self, selector: Selector, epoch: float) -> None:
        """Score the average on the held-out images and keep it if it is the best so far; all ranks must ask.

        Raises:
            InputError: a weight is not finite.
        """
        self.check_weights()
        clean, robust = selector.score(self.ema.model)
        if [robust, clean] > self.best_score:
            self.best_score = [robust, clean]
            self.best.load_state_dict(self.ema.model.state_dict())
        before = int(self.history[-1]["step"]) if self.history else 0
        mean = dict(zip(CURVE, self.curve[before : self.step].mean(dim=0).tolist(), strict=True))
        found = {"loss": mean["loss"], "clean_accuracy": clean, "robust_accuracy": robust}
        self.figures = self.figures | found
        lr = self.optimizer.param_groups[0]["lr"]
        self.history.append({"step": self.step, "epoch": epoch, "lr": lr, **found, "mean_eps": mean["mean_eps"]})

    def result(self, batch_size: int) -> TrainingResult:
        cost = {
            "steps": self.step,
            "images_seen": self.step * batch_size,
            "images_attacked": round(self.curve[:, CURVE.index("attacked")].sum().item()),
        }
        rows = [{"step": step, **dict(zip(CURVE, row, strict=True))} for step, row in enumerate(self.curve.tolist(), 1)]
        return TrainingResult(self.best, self.ema.model, self.history, rows, cost)
