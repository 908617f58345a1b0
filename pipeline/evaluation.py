"""Robust accuracy: AutoAttack (Croce & Hein, arXiv:2003.01690) through pyautoattack, per sample and attack."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pyautoattack import AutoAttack
from pydantic import NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from pipeline.artifacts import write_json
from pipeline.batches import to_tensor
from pipeline.images import ImageStore
from pipeline.params import InputError, Section
from pipeline.threat import NormName, ThreatParams

AttackName = Literal["apgd-ce", "apgd-t", "fab-t", "square", "apgd-dlr", "fab"]
STANDARD: list[AttackName] = ["apgd-ce", "apgd-t", "fab-t", "square"]
FEWEST_CLASSES: dict[AttackName, int] = {"apgd-t": 4, "apgd-dlr": 3, "fab-t": 2, "fab": 2}
PACKAGE_NORM: dict[NormName, str] = {"linf": "Linf", "l2": "L2"}


class EvaluateSection(Section):
    """`version: standard` runs all four attacks of AutoAttack; `custom` runs `attacks` in their order. `checkpoint`:
    the model selected on held-out images, or the last one."""

    version: Literal["standard", "custom"]
    attacks: list[AttackName]
    checkpoint: Literal["best", "last"]
    batch_size: PositiveInt
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _custom_names_attacks(self) -> "EvaluateSection":
        if self.version == "custom" and (not self.attacks or len(set(self.attacks)) != len(self.attacks)):
            raise ValueError("version custom wants a list of different attacks")
        return self

    @property
    def chosen(self) -> list[AttackName]:
        return STANDARD if self.version == "standard" else self.attacks


def predict(model: nn.Module, x: Tensor, batch_size: int) -> Tensor:
    """Predicted class (N,) of x (N, C, H, W).

    Raises:
        InputError: the model gives NaN or infinite logits.
    """
    with torch.no_grad():
        logits = torch.cat([model(batch) for batch in x.split(batch_size)])
    if not bool(torch.isfinite(logits).all()):
        raise InputError("evaluate: wanted finite logits, got NaN or infinity; the model is damaged: train it again")
    return logits.argmax(dim=1)


def evaluate(
    model: nn.Module,
    store: ImageStore,
    *,
    threat: ThreatParams,
    attacks: list[AttackName],
    batch_size: int,
    seed: int,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> pa.Table:
    """One row per test image: row, label, predicted, clean (bool), and per attack whether the sample survived it and
    all before it. Each attack meets only the survivors, as in AutoAttack, and gives the same result as one run of all.

    Raises:
        InputError: no images, too few classes for an attack, or a model that gives no finite logits.
    """
    if not len(store):
        raise InputError(f"{store.path}: wanted test images to evaluate on, got none")
    check_classes(attacks, len(store.classes))
    x = to_tensor(store.batch(np.arange(len(store))), device)
    y = torch.from_numpy(np.array(store.labels)).to(device)
    predicted = predict(model, x, batch_size)
    survived = predicted == y
    columns: dict[str, NDArray[np.generic]] = {
        "row": np.arange(len(store)),
        "label": y.cpu().numpy().astype(np.int16),
        "predicted": predicted.cpu().numpy().astype(np.int16),
        "clean": survived.cpu().numpy(),
    }
    for index, attack in enumerate(attacks):
        survivors = survived.nonzero().squeeze(1)
        if len(survivors):
            package = auto_attack(model, attack, threat, len(store.classes), seed, device)
            x_adv, _ = package.run_standard_evaluation(x[survivors].contiguous(), y[survivors], batch_size=batch_size)
            survived = survived.clone()
            survived[survivors] = predict(model, x_adv, batch_size) == y[survivors]
        columns[attack] = survived.cpu().numpy()
        progress(index + 1, len(attacks))
    return pa.table(columns)


def auto_attack(
    model: nn.Module, attack: AttackName, threat: ThreatParams, num_classes: int, seed: int, device: torch.device
) -> AutoAttack:
    """One attack with the settings of the standard version, aimed at min(9, num_classes - 1) targets."""
    package = AutoAttack(
        model, norm=PACKAGE_NORM[threat.norm], eps=threat.eps, seed=seed, version="standard", device=device
    )  # fmt: skip
    package.attacks_to_run = [attack]
    package.apgd_targeted.n_target_classes = package.fab.n_target_classes = min(9, num_classes - 1)
    return package


def check_classes(attacks: list[AttackName], num_classes: int) -> None:
    for attack in attacks:
        fewest = FEWEST_CLASSES.get(attack, 2)
        if num_classes < fewest:
            raise InputError(
                f"evaluate.attacks: {attack} wants at least {fewest} classes, the data have {num_classes}; "
                "set version: custom and leave it out (apgd-ce, fab-t and square work with 2 classes)"
            )


def write_metrics(
    path: Path,
    samples: pa.Table,
    section: EvaluateSection,
    threat: ThreatParams,
    strategy: str,
    seed: int,
    description: dict[str, Any],
) -> None:
    """Write metrics.json: counts, accuracies, and what the numbers depend on."""
    correct = accuracies(samples, section.chosen)
    clean = correct.pop("clean")
    write_json(
        path,
        {
            "strategy": strategy,
            "seed": seed,
            "norm": threat.norm,
            "eps": threat.exact,
            "num_examples": len(samples),
            "clean": clean,
            "robust": min(correct.values()),
            "attacks": correct,
            "attack_seed": section.seed,
            "checkpoint": section.checkpoint,
            "model": description["digest"],
            "train": description.get("train", {}),
            "versions": {name: version(name) for name in ("torch", "pyautoattack")},
        },
    )


def accuracies(samples: pa.Table, attacks: list[AttackName]) -> dict[str, float]:
    """Share of correct samples, clean and after each attack in turn."""
    return {name: float(np.mean(samples[name].to_numpy())) for name in ["clean", *attacks]}
