"""Robust accuracy: AutoAttack (Croce & Hein, arXiv:2003.01690) through pyautoattack, per sample and attack."""

from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from pyautoattack import AutoAttack
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from pipeline.artifacts import write_json
from pipeline.attack_flags import row_flags, summarise_flags
from pipeline.batches import to_tensor
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
    evaluated too, without attack and under `reference_attacks`. The random starts of AutoAttack depend on which images meet
    it together, so `batch_size` is part of the result; `shard_rows`, how many images a task takes, changes none: tasks are
    whole batches of one run over all images."""

    version: Literal["standard", "custom"]
    attacks: list[AttackName] = Field(default_factory=list)
    reference_attacks: list[ReferenceAttack] = Field(default_factory=list)
    checkpoint: Literal["best", "last"]
    batch_size: PositiveInt
    shard_rows: PositiveInt = 1000
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _custom_names_attacks(self) -> "EvaluateSection":
        if self.version == "custom" and (not self.attacks or len(set(self.attacks)) != len(self.attacks)):
            raise ValueError(f"attacks: version custom wants a list of different attacks, got {self.attacks}")
        if self.version == "standard" and {*self.attacks} not in [set(), *({*standard_attacks(k)} for k in (2, 3, 4))]:
            raise ValueError(f"attacks: version standard wants none, or its own {standard_attacks(4)}, got {self.attacks}")
        return self

    @property
    def other_checkpoint(self) -> Literal["best", "last"]:
        return "last" if self.checkpoint == "best" else "best"

    @property
    def task_rows(self) -> int:
        """Images of one task: as many whole batches as shard_rows holds, at least one."""
        return max(1, self.shard_rows // self.batch_size) * self.batch_size

    def attacks_for(self, num_classes: int) -> list[AttackName]:
        """With 2 or 3 classes the targeted DLR loss does not exist: standard takes the plain one, with 2 classes none.

        Raises:
            InputError: a custom set names an attack that is not defined for so few classes.
        """
        if self.version == "custom":
            check_classes(self.attacks, num_classes)
            return self.attacks
        return standard_attacks(num_classes)


def standard_attacks(num_classes: int) -> list[AttackName]:
    """Those of AutoAttack's standard version that are defined for so many classes, in their order."""
    fitting: list[AttackName] = ["apgd-t"] if num_classes > 3 else ["apgd-dlr"] if num_classes == 3 else []
    return ["apgd-ce", *fitting, "fab-t", "square"]


def predict(model: nn.Module, x: Tensor) -> Tensor:
    """Predicted class (B,) of x (B, C, H, W).

    Raises:
        InputError: the model gives NaN or infinite logits.
    """
    with torch.no_grad():
        logits = model(x)
    if not bool(torch.isfinite(logits).all()):
        raise InputError("evaluate: wanted finite logits, got NaN or infinity; the model is damaged: train it again")
    return logits.argmax(dim=1)


def load_batch(store: ImageStore, rows: NDArray[np.int64], device: torch.device) -> tuple[Tensor, Tensor]:
    """Images (B, C, H, W), in memory as AutoAttack expects them, and labels (B,) of some rows."""
    x = to_tensor(store.batch(rows), device).contiguous()
    return x, torch.from_numpy(np.array(store.labels[rows])).to(device)


def shards(store: ImageStore, task_rows: int) -> dict[str, dict[str, Any]]:
    """Task -> first row and end of each piece of at most task_rows test images.

    Raises:
        InputError: there are none.
    """
    if not len(store):
        raise InputError(f"{store.path}: wanted test images to evaluate on, got none")
    starts = range(0, len(store), task_rows)
    return {
        f"clean-{index:05d}": {"start": start, "stop": min(start + task_rows, len(store))} for index, start in enumerate(starts)
    }


def evaluate(
    model: nn.Module,
    other: nn.Module,
    store: ImageStore,
    *,
    start: int,
    stop: int,
    threat: ThreatParams,
    reference_attacks: Sequence[ReferenceAttack],
    batch_size: int,
    seed: int,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> pa.Table:
    """All but AutoAttack. One row per test image in [start, stop): row, label, predicted, clean (bool), what AutoAttack would
    warn of, and per reference attack whether the sample survived it alone; of the other checkpoint, which AutoAttack does
    not meet, `other_clean` and `other_<attack>`, from the same starts.

    Raises:
        InputError: a model that gives no finite logits.
    """
    tables = []
    progress(0, stop - start)
    for first in range(start, stop, batch_size):
        rows = np.arange(first, min(first + batch_size, stop))
        x, y = load_batch(store, rows, device)
        predicted = predict(model, x)
        columns: dict[str, NDArray[np.generic]] = {
            "row": rows,
            "label": y.cpu().numpy().astype(np.int16),
            "predicted": predicted.cpu().numpy().astype(np.int16),
            "clean": (predicted == y).cpu().numpy(),
        }
        columns |= row_flags(model, x, y)
        alone = partial(reference_outcomes, x=x, y=y, attacks=reference_attacks, rows=rows, threat=threat, seed=seed)
        columns |= alone(model)
        columns[f"{OTHER}clean"] = (predict(other, x) == y).cpu().numpy()
        columns |= {f"{OTHER}{name}": outcome for name, outcome in alone(other).items()}
        tables.append(pa.table(columns))
        progress(int(rows[-1]) + 1 - start, stop - start)
    return pa.concat_tables(tables)


def attack_tasks(attack: AttackName, samples: pa.Table, task_rows: int) -> dict[str, dict[str, Any]]:
    """Task -> attack and rows, for an attack on all samples that survived those before it. The package too packs its batches
    from the survivors in the order of their rows: cut between batches, the tasks together do what one run of it does."""
    before = [samples[name].to_numpy() for name in samples.column_names if name in ("clean", *get_args(AttackName))]
    survivors = samples["row"].to_numpy()[np.logical_and.reduce(before)].tolist()
    starts = range(0, len(survivors), task_rows)
    return {
        f"{attack}-{index:05d}": {"attack": attack, "rows": survivors[start : start + task_rows]}
        for index, start in enumerate(starts)
    }


def surviving(
    model: nn.Module,
    store: ImageStore,
    rows: Sequence[int],
    attack: AttackName,
    *,
    threat: ThreatParams,
    batch_size: int,
    seed: int,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> pa.Table:
    """Those of the test images in rows that survive one more attack, as a column `row`.

    Raises:
        InputError: a model that gives no finite logits.
    """
    chosen = auto_attack(model, attack, threat, len(store.classes), seed, device)
    kept: list[NDArray[np.int64]] = []
    progress(0, len(rows))
    for first in range(0, len(rows), batch_size):
        batch = np.array(rows[first : first + batch_size], dtype=np.int64)
        x, y = load_batch(store, batch, device)
        with torch.no_grad():
            x_adv = chosen.perturb(x, y)
        kept.append(batch[(predict(model, x_adv) == y).cpu().numpy()])
        progress(first + len(batch), len(rows))
    return pa.table({"row": np.concatenate(kept)})


def with_outcome(samples: pa.Table, attack: AttackName, parts: Sequence[Path]) -> pa.Table:
    """samples with the outcome of one more attack, after those before it; parts: what `surviving` gave for its tasks."""
    survivors = read_parts(parts)["row"].to_numpy() if parts else np.empty(0, np.int64)
    outcome = pa.array(np.isin(samples["row"].to_numpy(), survivors))
    return samples.add_column(samples.column_names.index(f"{OTHER}clean"), attack, outcome)


def read_parts(parts: Sequence[Path]) -> pa.Table:
    """The tables of several tasks as one, laid out in memory, and so in a file, as that of a single task."""
    return pa.concat_tables([pq.read_table(part) for part in parts]).combine_chunks()


def auto_attack(
    model: nn.Module, attack: AttackName, threat: ThreatParams, num_classes: int, seed: int, device: torch.device
) -> Any:
    """One attack of the package as its standard version sets it up, aimed at min(9, num_classes - 1) targets. `perturb(x, y)`
    of one batch does what the package's `run_standard_evaluation` does with it; that itself would first leave out the images
    that the model, in the batch they now are in, gets wrong by a rounding error, which a run over all images does not."""
    package = AutoAttack(
        model, norm=PACKAGE_NORM[threat.norm], eps=threat.eps, seed=seed, version="standard", device=device
    )  # fmt: skip
    package.apgd_targeted.n_target_classes = package.fab.n_target_classes = min(9, num_classes - 1)
    package.fab.targeted = attack == "fab-t"
    if attack in ("apgd-ce", "apgd-dlr"):
        package.apgd.loss = attack.removeprefix("apgd-")
        return package.apgd
    return {"apgd-t": package.apgd_targeted, "square": package.square}.get(attack, package.fab)


def check_classes(attacks: list[AttackName], num_classes: int) -> None:
    for attack in attacks:
        fewest = FEWEST_CLASSES.get(attack, 2)
        if num_classes < fewest:
            raise InputError(
                f"evaluate.attacks: {attack} wants at least {fewest} classes, the data have {num_classes}; "
                "leave it out, or set version: standard without attacks, which takes what is defined for them"
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
