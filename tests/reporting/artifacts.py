"""A small project's artifacts, written by the schemas of the stages that make them."""

import csv
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.artifacts import MANIFEST_SCHEMA, MARGINS_SCHEMA, SOURCES, write_json, write_table
from pipeline.image_writing import write_store
from pipeline.perceptron import PerceptronSection, learning_curves, measure_shares
from pipeline.perceptron_conclusions import write_perceptron

EPS = 8 / 255
CLASSES = ("zero", "one", "two")
PERCEPTRON = PerceptronSection(
    dimension=4, eps=0.5, fractions=(0.25, 0.5), alphas=(2.0, 4.0), num_seeds=2,
    num_examples=2000, weight_decay=1e-3, probe_angle_deg=0.0, seed=0,
)  # fmt: skip
ATTACKS = ("apgd-ce", "apgd-t")
TRAIN = {"steps": 5, "images_seen": 5000, "images_attacked": 4000}
TRAINING = {"loss": "trades", "attack": {"num_steps": 10}, "holdout": 4, "selection_attack": {"num_steps": 20}}
NETWORK = {
    "architecture": "preactresnet", "arguments": {"blocks": [1], "width": 4, "stem_stride": 2}, "shape": [4, 4, 1],
    "classes": list(CLASSES),
}  # fmt: skip
PARAMS: dict[str, Any] = {  # what the report reads of them; `strategies` come from the test
    "train": {"training": TRAINING},
    "margin_model": {"kind": "train", "training": TRAINING},
    "margins": {"deepfool": {"first_candidates": None, "candidates": 1}, "grand": True},
}


@dataclass(frozen=True)
class Sizes:
    real: int = 40
    synthetic: int = 60
    test: int = 20

    def of(self, source: str) -> int:
        return {"real": self.real, "synthetic": self.synthetic}[source]


def write_artifacts(root: Path, strategies: Sequence[str], seeds: Sequence[int], sizes: Sizes | None = None) -> None:
    """Everything below root that the report reads; strategy i keeps all but 10 i rows, its models miss i + seed images."""
    sizes = sizes or Sizes()
    for index, (name, count) in enumerate(
        {"real/train": sizes.real, "real/test": sizes.test, "synthetic": sizes.synthetic}.items()
    ):
        write_images(root / name, count, seed=index)
    margins = draw_margins(sizes)
    write_margins(root / "margins", margins)
    write_model(root / "margin_model")
    write_margin_quality(root / "margins", margins)
    write_judgement(root / "judge")
    for index, strategy in enumerate(strategies):
        write_manifest(root / "manifests" / strategy, margins, num_pruned=10 * index)
        for seed in seeds:
            wrong = index + seed
            write_evaluation(
                root / "evaluations" / f"{strategy}-{seed}", strategy, seed, sizes.test, wrong, wrong + 2, wrong + 4
            )
            write_model(root / "models" / f"{strategy}-{seed}")
            steps = "step,loss,lr,mean_eps,attacked\n1,0.5,0.1,0.03,16\n2,0.25,0.2,0.03,16\n"
            (root / "models" / f"{strategy}-{seed}" / "steps.csv").write_text(steps)
    params = PERCEPTRON.model_dump()
    shares = {key: params[key] for key in ("dimension", "eps", "fractions", "num_examples")}
    curves = {key: value for key, value in params.items() if key != "num_examples"}
    points = learning_curves(**curves)
    write_perceptron(root / "perceptron", params, measure_shares(np.random.default_rng(0), **shares), points)


def write_images(path: Path, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    images, labels = rng.integers(0, 256, (count, 4, 4, 1), dtype=np.uint8), np.arange(count) % len(CLASSES)
    write_store(
        path, [(images, labels)], classes=CLASSES, shape=(4, 4, 1), shard_rows=16, origin={"licence": f"licence {seed}"}
    )


def draw_margins(sizes: Sizes) -> dict[str, NDArray[np.float32]]:
    """Margins by source, row by row; every tenth is missing."""
    margins = {}
    for code, source in enumerate(SOURCES):
        margin = np.random.default_rng([9, code]).normal(0.04, 0.03, sizes.of(source)).astype(np.float32)
        margin[::10] = np.nan
        margins[source] = margin
    return margins


def write_margins(path: Path, margins: Mapping[str, NDArray[np.float32]]) -> None:
    """One part per source."""
    path.mkdir(parents=True)
    for index, margin in enumerate(margins.values()):
        num, known = len(margin), ~np.isnan(margin)
        label = np.arange(num) % len(CLASSES)
        columns: dict[str, Any] = {
            "source": pa.DictionaryArray.from_arrays(np.full(num, index, np.int8), list(SOURCES)),
            "row": np.arange(num),
            "label": label,
            "predicted": np.where(margin < 0, (label + 1) % len(CLASSES), label),
            "margin": pa.array(margin, mask=~known),
            "nearest": pa.array((label + 1) % len(CLASSES), pa.int16(), mask=~known),
            "iterations": np.ones(num, np.int16),
            "converged": known,
        }
        rest = {name: np.zeros(num, np.float32) for name in MARGINS_SCHEMA.names if name not in columns}
        arrays = [pa.array((columns | rest)[field.name]).cast(field.type) for field in MARGINS_SCHEMA]
        metadata = {"norm": "linf", "margin_model": "0" * 64}
        write_table(path / f"part-{index:05d}.parquet", pa.Table.from_arrays(arrays, schema=MARGINS_SCHEMA), metadata)


def write_margin_quality(path: Path, margins: Mapping[str, NDArray[np.float32]]) -> None:
    """As the margin stage writes it; every tenth row has no margin."""
    by_class = {}
    for source, margin in margins.items():
        label = np.arange(len(margin)) % len(CLASSES)
        classes = {str(k): margin[label == k] for k in np.unique(label)}
        by_class[source] = {
            k: {"rows": len(m), "not_converged": int(np.isnan(m).sum()), "misclassified": int((m < 0).sum())}
            for k, m in classes.items()
        }
    by_source = {
        source: {name: sum(row[name] for row in rows.values()) for name in ("rows", "not_converged", "misclassified")}
        for source, rows in by_class.items()
    }
    quantiles = {"0.05": 1.0, "0.5": 1.125, "0.95": 1.25}
    tight = {"rows": 16, "spearman": 0.9875, "median": 0.045, "median_tight": 0.04, "ratio_quantiles": quantiles}
    repeated = {"rows": 16, "equal": 15, "converged_once": 0, "max_difference": 1e-7}
    found = {"by_source": by_source, "by_class": by_class, "tight": tight, "repeated": repeated}
    rows = sum(len(margin) for margin in margins.values())
    write_json(path / "quality.json", {"rows": rows, "not_converged": 0.1, "mean_iterations": 1.5, **found})


def write_judgement(path: Path) -> None:
    """As the stage judge writes it; the first synthetic image is nearest to training image 3."""
    path.mkdir()
    figures = {
        "num_images": 20,
        "density": 0.9,
        "coverage": 0.8,
        "class_agreement": 0.7,
        "copies": 0.05,
        "nearest_distance": 2.5,
    }
    found = {"synthetic": figures | {"frechet_distance": 1.25}, "test": figures | {"frechet_distance": 0.5}}
    pair = {"row": 0, "train_row": 3, "distance": 0.1, "ratio": 0.25, "mirrored": True}
    by_class = dict(zip(CLASSES, (0.25, 0.75, 1.0), strict=True))
    more = {"features": {"model": "margin_model"}, "num_reference": 40, "class_agreement_by_class": by_class, "closest": [pair]}
    write_json(path / "quality.json", found | more)


def write_manifest(path: Path, margins: Mapping[str, NDArray[np.float32]], num_pruned: int) -> None:
    """Prune the highest margins; the kept have eps = min(8/255, max(margin, 0))."""
    path.mkdir(parents=True)
    margin = np.concatenate(list(margins.values()))
    source = np.repeat(np.arange(len(SOURCES), dtype=np.int8), [len(values) for values in margins.values()])
    order = np.argsort(np.nan_to_num(margin, nan=-1.0), kind="stable")
    kept = np.ones(len(margin), bool)
    kept[order[len(order) - num_pruned :]] = False
    eps = np.clip(np.nan_to_num(margin, nan=EPS), 0, EPS).astype(np.float32)
    row = np.concatenate([np.arange(len(values)) for values in margins.values()])
    columns = {
        "source": pa.DictionaryArray.from_arrays(source, list(SOURCES)),
        "row": row,
        "label": row % len(CLASSES),
        "kept": kept,
        "eps": pa.array(eps, mask=~kept),
        "reason": pa.array(np.where(kept, "kept", "high_margin")).dictionary_encode(),
    }
    arrays = [pa.array(columns[field.name]).cast(field.type) for field in MANIFEST_SCHEMA]
    write_table(path / "manifest.parquet", pa.Table.from_arrays(arrays, schema=MANIFEST_SCHEMA))
    reasons = {"kept": int(kept.sum())} | ({"high_margin": num_pruned} if num_pruned else {})
    by_source = {n: {"total": int((source == i).sum()), "kept": int(kept[source == i].sum())} for i, n in enumerate(SOURCES)}
    cuts = {"all": {"high": float(margin[~kept].min())}} if num_pruned else {}
    summary = {"total": len(kept), "kept": int(kept.sum()), "fraction_kept": float(kept.mean()), "reasons": reasons}
    write_json(path / "summary.json", summary | {"by_source": by_source, "thresholds": cuts})


def write_evaluation(path: Path, strategy: str, seed: int, num: int, wrong: int, wrong_ce: int, wrong_t: int) -> None:
    """The first `wrong` images are wrong without an attack, the first wrong_ce and wrong_t after each attack."""
    path.mkdir(parents=True)
    rows = np.arange(num)
    outcomes = {"clean": rows >= wrong, "apgd-ce": rows >= wrong_ce, "apgd-t": rows >= wrong_t}
    label = (rows % len(CLASSES)).astype(np.int16)
    predicted = np.where(outcomes["clean"], label, (label + 1) % len(CLASSES)).astype(np.int16)
    write_table(path / "samples.parquet", pa.table({"row": rows, "label": label, "predicted": predicted, **outcomes}))
    accuracy = {name: float(values.mean()) for name, values in outcomes.items()}
    model = hashlib.sha256(f"{strategy} {seed} {wrong_t}".encode()).hexdigest()
    metrics = {
        **{"strategy": strategy, "seed": seed, "eps": "8/255", "norm": "linf", "num_examples": num},
        **{"clean": accuracy["clean"], "robust": accuracy["apgd-t"], "attacks": {name: accuracy[name] for name in ATTACKS}},
        **{"checkpoint": "best", "model": model, "train": TRAIN, "more": "is allowed"},
        **{"reference": {"fgsm": accuracy["apgd-ce"]}, "versions": {"torch": "2"}},
        "other": {"checkpoint": "last", "model": "0" * 64, "accuracy": {"clean": 0.625, "fgsm": 0.375}},
        "flags": {"random_outputs": 0, "probability_outputs": False, "zero_gradients": wrong, "square_stronger": None},
    }
    write_json(path / "metrics.json", metrics)


def write_model(path: Path) -> None:
    """As a training writes it, but for the weights, whose description alone the report reads."""
    (path / "best").mkdir(parents=True)
    write_json(path / "best" / "model.json", NETWORK | {"train": TRAIN})
    write_training(path / "training.csv", num_steps=5)


def write_training(path: Path, num_steps: int) -> None:
    """Loss 1 / step at every step, accuracies at every second."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "epoch", "lr", "loss", "clean_accuracy", "robust_accuracy", "mean_eps"])
        for step in range(1, num_steps + 1):
            measured = ["", ""] if step % 2 else [0.5 + step / (10 * num_steps), 0.25]
            writer.writerow([step, 0, 0.1, 1 / step, *measured, 0.03])
