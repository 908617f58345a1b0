"""One evaluated model in the files that RobustBench asks for: model_info, weights in its key layout, text of the issue."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pipeline.artifacts import write_json
from pipeline.exporting.records import Record
from pipeline.params import InputError
from pipeline.reporting.runs import radius

STANDARD = ["apgd-ce", "apgd-t", "fab-t", "square"]
THREATS = {"linf": "Linf", "l2": "L2"}
TEST_IMAGES = {"cifar10": 10_000, "cifar100": 10_000, "imagenet": 5_000}
LEADERBOARDS = {  # dataset and threat -> radius
    ("cifar10", "Linf"): "8/255",
    ("cifar10", "L2"): "0.5",
    ("cifar100", "Linf"): "8/255",
    ("imagenet", "Linf"): "4/255",
}


@dataclass(frozen=True)
class Paper:
    """What the artifacts do not know. `model_id`: as in Wang2023Better_WRN-28-10; `licence` of the weights, "mit" or where it
    can be read; `model_zoo`: whether RobustBench may add the weights to its model zoo."""

    model_id: str
    title: str = ""
    authors: str = ""
    link: str = ""
    venue: str = ""
    dataset: str = ""
    additional_data: bool = False
    licence: str = ""
    model_zoo: bool = False


@dataclass(frozen=True)
class Evaluated:
    """The artifacts of one run. `origin` of the test images, `synthetic_origin` of the `num_synthetic` images that are called
    synthetic, empty where it is not on record."""

    metrics: dict[str, Any]
    model: dict[str, Any]
    weights: Path
    num_synthetic: int
    origin: dict[str, Any]
    synthetic_origin: dict[str, Any]

    @property
    def norm(self) -> str:
        return THREATS[self.metrics["norm"]]

    @property
    def eps(self) -> str:
        """ "8/255" in Linf, "0.5" in L2."""
        exact: str = self.metrics["eps"]
        return exact if self.norm == "Linf" else f"{radius(exact):g}"

    @property
    def is_standard(self) -> bool:
        return list(self.metrics["attacks"]) == STANDARD

    @property
    def has_stand_in(self) -> bool:
        """Whether real images that ingest left out stand in the place of the synthetic ones."""
        return self.synthetic_origin.get("kind") == "left_out"


def evaluated(record: Record) -> Evaluated:
    """Raises:
    InputError: the checkpoint has no evaluation.
    """
    if record.metrics is None:
        raise InputError(f"{record.folder}: RobustBench wants an evaluation of this checkpoint, found none; run `dvc repro`")
    test, synthetic = (record.origins.get(name, {}) for name in ("test", "synthetic"))
    weights = record.folder / "model.safetensors"
    return Evaluated(record.metrics, record.model, weights, record.kept.get("synthetic", 0), test, synthetic)


def write(work: Path, found: Evaluated, paper: Paper) -> list[str]:
    """Write model_info/, models/ and issue.md into the folder work, placed as RobustBench places them; returns what is
    missing before it would accept them."""
    dataset = paper.dataset or str(found.origin.get("kind", ""))
    place = Path(dataset or "dataset") / found.norm
    open_points = missing(found, paper, dataset)
    info, weights = (work / name / place / paper.model_id for name in ("model_info", "models"))
    for path in (info, weights):
        path.parent.mkdir(parents=True)
    write_json(info.with_name(f"{paper.model_id}.json"), model_info(found, paper, dataset))
    torch.save(load_file(found.weights), weights.with_name(f"{paper.model_id}.pt"))
    (work / "issue.md").write_text(issue_text(found, paper, open_points))
    return open_points


def model_info(found: Evaluated, paper: Paper, dataset: str) -> dict[str, Any]:
    """The content of model_info/<dataset>/<threat>/<model>.json; `autoattack_acc` only where it is the standard version."""
    robust = percent(found.metrics["robust"])
    return {
        "link": paper.link,
        "name": paper.title,
        "authors": paper.authors,
        "additional_data": paper.additional_data,
        "number_forward_passes": 1,
        "dataset": dataset,
        "venue": paper.venue or "Unpublished",
        "architecture": architecture_name(found.model),
        "eps": found.eps,
        "clean_acc": percent(found.metrics["clean"]),
        "reported": robust,
        **({"autoattack_acc": robust} if found.is_standard else {}),
        "footnote": footnote(found),
        "unreliable": False,
    }


def percent(accuracy: float) -> str:
    return f"{100 * accuracy:.2f}"


def footnote(found: Evaluated) -> str:
    """Empty where no image was generated."""
    count = found.num_synthetic
    if not count or found.has_stand_in:
        return ""
    amount = f"{count / 1e6:g}M" if count >= 100_000 else f"{count:,}"
    return f"It uses additional {amount} synthetic images in training."


def architecture_name(model: dict[str, Any]) -> str:
    arguments = model["arguments"]
    if model["architecture"] == "wideresnet":
        return f"WideResNet-{arguments.get('depth', 28)}-{arguments.get('width', 10)}"
    blocks, width = arguments.get("blocks", [2, 2, 2, 2]), arguments.get("width", 64)
    if model["architecture"] == "preactresnet":
        name = f"PreActResNet-{2 + 2 * sum(blocks)}"
        return name if width == 64 else f"{name} (width {width})"
    if model["architecture"] == "resnet":
        return f"ResNet-{arguments.get('depth', 18)}"
    return str(model["architecture"])


def missing(found: Evaluated, paper: Paper, dataset: str) -> list[str]:
    """What a maintainer would ask for, in words."""
    metrics, empty = found.metrics, [name for name in ("title", "authors", "link") if not getattr(paper, name)]
    points = [f"give --{name}" for name in empty]
    wanted = LEADERBOARDS.get((dataset, found.norm))
    if wanted is None:
        boards = ", ".join(f"{name} {norm}" for name, norm in LEADERBOARDS)
        points.append(f"no leaderboard for {dataset or 'this dataset'} {found.norm}: give --dataset if it is one of {boards}")
    elif found.eps != wanted:
        points.append(f"eps is {found.eps}: the leaderboard of {dataset} {found.norm} wants {wanted} (threat.eps_255)")
    if metrics["num_examples"] != TEST_IMAGES.get(dataset, metrics["num_examples"]):
        points.append(f"evaluated on {metrics['num_examples']} images: it wants {TEST_IMAGES[dataset]} (ingest.max_test: null)")
    if not found.is_standard:
        points.append(f"attacked by {', '.join(metrics['attacks'])} only: it wants evaluate.version: standard")
    flags = metrics.get("flags", {})
    points += [f"AutoAttack warns of {name.replace('_', ' ')}" for name, value in flags.items() if value]
    if found.num_synthetic and found.has_stand_in:
        points.append(
            f"a stand-in: {found.num_synthetic:,} real images that ingest left out were used in the place of synthetic ones, "
            "so it is no model of synthetic data"
        )
    elif found.num_synthetic and not found.synthetic_origin:
        points.append("where its synthetic images come from is not on record: correct the footnote if they were not generated")
    if not paper.licence:
        points.append("give --licence: mit, or where another one can be read; that of the training images may bind it")
    if found.model["architecture"] != "wideresnet":
        points.append(f"RobustBench has no {found.model['architecture']} of this layout: hand in its definition too")
    elif found.model["shape"][:2] != [32, 32]:
        points.append(f"its DMWideResNet pools 8 x 8 features: it wants images of 32 x 32, not {found.model['shape'][:2]}")
    return points


def issue_text(found: Evaluated, paper: Paper, open_points: list[str]) -> str:
    """The headings of RobustBench's template for a new model, filled in."""
    metrics = found.metrics
    method = f"AutoAttack ({', '.join(metrics['attacks'])}; pyautoattack {metrics['versions']['pyautoattack']})"
    method += f", {metrics['num_examples']} test images, seed {metrics['attack_seed']}"
    lines = [
        f"[New Model] {paper.model_id}",
        "",
        "# Paper Information",
        f"- **Paper Title**: {paper.title}",
        f"- **Paper URL**: {paper.link}",
        f"- **Paper authors**: {paper.authors}",
        "",
        "# Leaderboard Claim(s)",
        "## Model 1",
        f"- **Architecture**: {architecture_name(found.model)}",
        f"- **Threat Model**: {found.norm}",
        f"- **eps**: {found.eps}",
        f"- **Clean accuracy**: {percent(metrics['clean'])}",
        f"- **Robust accuracy**: {percent(metrics['robust'])}",
        f"- **Additional data**: {str(paper.additional_data).lower()}",
        f"- **Evaluation method**: {method}",
        f"- **Checkpoint and code**: SHA-256 of the weights before conversion {metrics['model']}",
        "",
        "# Model Zoo:",
        *zoo_boxes(found, paper),
        "",
        *zoo_entry(found, paper),
    ]
    lines += ["", "To be done before it is handed in:", *(f"- {point}" for point in open_points)] if open_points else []
    return "\n".join(lines) + "\n"


def zoo_boxes(found: Evaluated, paper: Paper) -> list[str]:
    """The statements of the template, checked where they hold."""
    custom = "" if paper.licence.lower() == "mit" else paper.licence
    statements = {
        "I want to add my models to the Model Zoo": paper.model_zoo,
        "I use an architecture that is **not** included among those there": found.model["architecture"] != "wideresnet",
        "I agree to release my model(s) under MIT license **OR**": bool(paper.licence) and not custom,
        f"I want my models to be released under a custom license, located here: {custom}": bool(custom),
    }
    return [f"- [{'x' if holds else ' '}] {statement}" for statement, holds in statements.items()]


def zoo_entry(found: Evaluated, paper: Paper) -> list[str]:
    """The entry of the model zoo that the weights fit, where it has the architecture."""
    model = found.model
    if model["architecture"] != "wideresnet":
        return []
    depth, width = model["arguments"].get("depth", 28), model["arguments"].get("width", 10)
    mean, std = (tuple(model["normalisation"][key]) for key in ("mean", "std"))
    return [
        "```python",
        f"('{paper.model_id}', {{",
        f"    'model': lambda: DMWideResNet(num_classes={len(model['classes'])}, depth={depth}, width={width},",
        f"                                  activation_fn=nn.SiLU, mean={mean},",
        f"                                  std={std}, num_input_channels={len(mean)}),",
        "    'gdrive_id': '',",
        "}),",
        "```",
    ]
