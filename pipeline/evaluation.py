"""Robust accuracy: AutoAttack (Croce & Hein, arXiv:2003.01690) through pyautoattack, per sample and attack."""

from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pyautoattack import AutoAttack
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from pipeline.artifacts import write_json
from pipeline.attack_flags import row_flags, summarise_flags
from pipeline.batches import to_tensor
from pipeline.checkpoints import Checkpoint
from pipeline.images import ImageStore
from pipeline.params import InputError, Section
from pipeline.reference_attacks import ReferenceAttack, reference_outcomes
from pipeline.threat import NormName, ThreatParams

AttackName = Literal["apgd-ce", "apgd-t", "fab-t", "square", "apgd-dlr", "fab"]
FEWEST_CLASSES: dict[AttackName, int] = {"apgd-t": 4, "apgd-dlr": 3, "fab-t": 2, "fab": 2}
OTHER = "other_"  # columns of the checkpoint that AutoAttack does not meet
PACKAGE_NORM: dict[NormName, str] = {"linf": "Linf", "l2": "L2"}


class EvaluateSection(Section):
    """`version: standard` runs all four attacks of AutoAttack; `custom` runs `attacks` in their order. `reference_attacks`
    are run beside it, each alone. `checkpoint`: the model selected on held-out images, or the last one; the other one is
    evaluated too, without attack and under `reference_attacks`. `shard_rows` test
    images are evaluated at a time; as the random starts of an attack depend on which images it meets together, this is part
    of the result."""

    version: Literal["standard", "custom"]
    attacks: list[AttackName]
    reference_attacks: list[ReferenceAttack] = Field(default_factory=list)
    checkpoint: Literal["best", "last"]
    batch_size: PositiveInt
    shard_rows: PositiveInt = 1000
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _custom_names_attacks(self) -> "EvaluateSection":
        if self.version == "custom" and (not self.attacks or len(set(self.attacks)) != len(self.attacks)):
            raise ValueError("version custom wants a list of different attacks")
        return self

    @property
    def other_checkpoint(self) -> Literal["best", "last"]:
        return "last" if self.checkpoint == "best" else "best"

    def attacks_for(self, num_classes: int) -> list[AttackName]:
        """With 2 or 3 classes the targeted DLR loss does not exist: standard takes the plain one, with 2 classes none."""
        if self.version == "custom":
            return self.attacks
        fitting: list[AttackName] = ["apgd-t"] if num_classes > 3 else ["apgd-dlr"] if num_classes == 3 else []
        return ["apgd-ce", *fitting, "fab-t", "square"]


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


def shards(num_rows: int, shard_rows: int) -> dict[str, dict[str, Any]]:
    """Name -> first row and end of each piece of at most shard_rows test images that is evaluated at a time."""
    starts = range(0, num_rows, shard_rows)
    return {f"{start // shard_rows:05d}": {"start": start, "stop": min(start + shard_rows, num_rows)} for start in starts}


def evaluate(
    model: nn.Module,
    store: ImageStore,
    *,
    start: int = 0,
    stop: int | None = None,
    threat: ThreatParams,
    attacks: list[AttackName],
    batch_size: int,
    seed: int,
    device: torch.device,
    progress: Callable[[int, int], None],
    reference_attacks: Sequence[ReferenceAttack] = (),
    checkpoint: Checkpoint | None = None,
) -> pa.Table:
    """One row per test image in [start, stop): row, label, predicted, clean (bool), what AutoAttack would warn of, per
    reference attack whether the sample survived it alone, and per attack whether it survived it and all before it. Each
    attack meets only the survivors, as in AutoAttack, and gives the same result as one run of all. Saves to checkpoint after
    every attack, and goes on from there.

    Raises:
        InputError: no images, too few classes for an attack, or a model that gives no finite logits.
    """
    rows = np.arange(start, len(store) if stop is None else stop)
    if not len(rows):
        raise InputError(f"{store.path}: wanted test images to evaluate on, got none")
    check_classes(attacks, len(store.classes))
    x = to_tensor(store.batch(rows), device)
    y = torch.from_numpy(np.array(store.labels[rows])).to(device)
    predicted = predict(model, x, batch_size)
    survived: dict[str, Tensor] = {"clean": predicted == y}
    if checkpoint and (saved := checkpoint.load()):
        survived = {name: flags.bool().to(device) for name, flags in saved.items()}
    for attack in attacks:
        if attack not in survived:
            survived[attack] = surviving(
                model, x, y, list(survived.values())[-1], attack,
                threat=threat, num_classes=len(store.classes), batch_size=batch_size, seed=seed,
            )  # fmt: skip
            if checkpoint:
                checkpoint.save({name: flags.to(torch.uint8) for name, flags in survived.items()})
        progress(len(rows) * (len(survived) - 1), len(rows) * len(attacks))
    columns: dict[str, NDArray[np.generic]] = {
        "row": rows,
        "label": y.cpu().numpy().astype(np.int16),
        "predicted": predicted.cpu().numpy().astype(np.int16),
    }
    columns["clean"] = survived.pop("clean").cpu().numpy()
    columns |= row_flags(model, x, y, batch_size)
    columns |= reference_outcomes(
        model, x, y, reference_attacks, rows=rows, threat=threat, seed=seed, batch_size=batch_size
    )  # fmt: skip
    return pa.table(columns | {name: flags.cpu().numpy() for name, flags in survived.items()})


def evaluate_other(
    model: nn.Module,
    store: ImageStore,
    *,
    start: int,
    stop: int,
    threat: ThreatParams,
    reference_attacks: Sequence[ReferenceAttack],
    batch_size: int,
    seed: int,
    device: torch.device,
) -> dict[str, NDArray[np.bool_]]:
    """Of the checkpoint that AutoAttack does not meet, for the test images in [start, stop): `other_clean`, which are
    classified correctly, and `other_<attack>`, which are so under each reference attack too, from the same starts."""
    rows = np.arange(start, stop)
    x = to_tensor(store.batch(rows), device)
    y = torch.from_numpy(np.array(store.labels[rows])).to(device)
    found = {"clean": (predict(model, x, batch_size) == y).cpu().numpy()}
    found |= reference_outcomes(
        model, x, y, reference_attacks, rows=rows, threat=threat, seed=seed, batch_size=batch_size
    )  # fmt: skip
    return {f"{OTHER}{name}": outcome for name, outcome in found.items()}


def surviving(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    before: Tensor,
    attack: AttackName,
    *,
    threat: ThreatParams,
    num_classes: int,
    batch_size: int,
    seed: int,
) -> Tensor:
    """Which of the samples (N,) that survived before also survive one more attack."""
    survivors = before.nonzero().squeeze(1)
    after = before.clone()
    if len(survivors):
        package = auto_attack(model, attack, threat, num_classes, seed, x.device)
        x_adv, _ = package.run_standard_evaluation(x[survivors].contiguous(), y[survivors], batch_size=batch_size)
        after[survivors] = predict(model, x_adv, batch_size) == y[survivors]
    return after


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
                "leave it out, or set version: standard, which takes what is defined for them"
            )


def write_metrics(
    path: Path,
    samples: pa.Table,
    section: EvaluateSection,
    threat: ThreatParams,
    strategy: str,
    seed: int,
    description: dict[str, Any],
    other_digest: str,
) -> None:
    """Write metrics.json: counts, accuracies, and what the numbers depend on; other_digest is that of the weights of the
    other checkpoint."""
    attacks = [name for name in samples.column_names if name in get_args(AttackName)]
    correct = accuracies(samples, attacks)
    clean = correct.pop("clean")
    reference = accuracies(samples, section.reference_attacks)
    del reference["clean"]
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
            "version": section.version,
            "attacks": correct,
            "reference": reference,
            "flags": summarise_flags(samples, correct),
            "attack_seed": section.seed,
            "checkpoint": section.checkpoint,
            "model": description["digest"],
            "other": {
                "checkpoint": section.other_checkpoint,
                "model": other_digest,
                "accuracy": accuracies(samples, section.reference_attacks, OTHER),
            },
            "train": description.get("train", {}),
            "versions": {name: version(name) for name in ("torch", "pyautoattack")},
        },
    )


def accuracies(samples: pa.Table, attacks: Sequence[str], prefix: str = "") -> dict[str, float]:
    """Share of correct samples, clean and in the column of each attack, the names of the columns beginning with prefix."""
    return {name: float(np.mean(samples[prefix + name].to_numpy())) for name in ["clean", *attacks]}
