"""The model card, README.md beside an exported model: what it is, what it was trained on, how robust it is, all on record."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open

from pipeline.artifacts import digest_file
from pipeline.exporting.records import Record
from pipeline.reporting.intervals import wilson_interval
from pipeline.reporting.synthetic import names_of_sources

CONFIDENCE = 0.95
UNKNOWN = "not recorded"
USES = {
    "torchscript": ("import torch", 'model = torch.jit.load("model.pt")', "logits = model(images)"),
    "onnx": (
        "import onnxruntime",
        'session = onnxruntime.InferenceSession("model.onnx")',
        '(logits,) = session.run(None, {"images": images})',
    ),
    "robustbench": (
        "import torch",
        'state_dict = torch.load("models/...", weights_only=True)  # for the class that issue.md names',
    ),
}


def card(record: Record, kind: str, files: Iterable[tuple[str, Path]], licence: str = "") -> str:
    """Markdown. `files`: the exported files by their names in the folder."""
    sections = [
        ["---", f"license: {licence or 'unknown'}", "tags: [adversarial-robustness, image-classification]", "---"],
        [f"# {record.name}: {record.model['architecture']}", "", *what(record, licence)],
        ["## Use", "", "```python", *USES[kind], "```", "", *interface(record, kind)],
        ["## Data", "", *data(record)],
        ["## Threat and training", "", *training(record)],
        ["## Results", "", *results(record)],
        ["## Digests (SHA-256)", "", *digests(record, files)],
    ]
    return "\n\n".join("\n".join(section) for section in sections) + "\n"


def what(record: Record, licence: str) -> list[str]:
    model = record.model
    return [
        f"- Architecture: {model['architecture']} {json.dumps(model['arguments'])}, {num_weights(record):,} weights",
        f"- Checkpoint: {record.folder.name}",
        f"- Licence of the weights: {licence or UNKNOWN}; that of the data is below and may bind them",
    ]


def num_weights(record: Record) -> int:
    """Numbers in the weights file but for the running statistics of BatchNorm."""
    with safe_open(record.folder / "model.safetensors", framework="np") as file:
        names = [name for name in file.keys() if ".running_" not in name and "num_batches" not in name]  # noqa: SIM118
        return sum(math.prod(file.get_slice(name).get_shape()) for name in names)


def interface(record: Record, kind: str) -> list[str]:
    height, width, channels = record.model["shape"]
    normalisation, where = record.model["normalisation"], "class of issue.md" if kind == "robustbench" else "model"
    return [
        f"Images are float32 (batch, {channels}, {height}, {width}) in [0, 1]. They are normalised inside the {where}, mean "
        f"{rounded(normalisation['mean'])} and standard deviation {rounded(normalisation['std'])}. Logits are in the order of "
        f"the classes: {', '.join(record.model['classes'])}.",
    ]


def rounded(values: list[float]) -> str:
    return str([round(value, 4) for value in values])


def data(record: Record) -> list[str]:
    lines = ["| images | used | origin | licence |", "|---|---|---|---|"]
    for source in ("real", "synthetic"):
        count = record.kept.get(source)
        origin = record.origins.get(source)
        if count == 0 or (origin or {}).get("kind") == "none":
            continue
        used = f"{count:,}" if count else "in training" if origin else UNKNOWN
        name = names_of_sources(origin or {})[source]
        lines.append(f"| {name} | {used} | {origin_text(origin or {})} | {licence_of(origin or {})} |")
    if (test := record.origins.get("test")) is not None:
        lines.append(f"| test | in the evaluation only | {origin_text(test)} | {licence_of(test)} |")
    if record.origins.get("synthetic", {}).get("kind") == "left_out":
        lines += ["", "The synthetic images are real ones that training left out, a stand-in: no generator's are as good."]
    return lines


def origin_text(origin: dict[str, Any]) -> str:
    """The short values of an origin; files with their digests stay in store.json."""
    parts = [f"{key}: {value}" for key, value in origin.items() if isinstance(value, str | int | float) and key != "licence"]
    return ", ".join(parts).replace("|", "\\|") or UNKNOWN


def licence_of(origin: dict[str, Any]) -> str:
    return str(origin.get("licence") or UNKNOWN).replace("|", "\\|")


def training(record: Record) -> list[str]:
    model, metrics = record.model, record.metrics or {}
    threat = model.get("threat")
    lines = [f"- Trained against: {threat['norm']} of radius {threat['eps']}" if threat else f"- Trained against: {UNKNOWN}"]
    lines += [f"- Strategy: {metrics['strategy']}"] if metrics else []
    lines += [f"- Seed: {model['seed']}"] if "seed" in model else []
    return lines + [f"- {name.replace('_', ' ').capitalize()}: {count:,}" for name, count in model.get("train", {}).items()]


def results(record: Record) -> list[str]:
    metrics = record.metrics
    if metrics is None:
        return ["This checkpoint was not evaluated."]
    count = metrics["num_examples"]
    rows = {
        "clean": metrics["clean"],
        f"worst case of {', '.join(metrics['attacks'])}": metrics["robust"],
        **metrics.get("reference", {}),
    }
    lines = ["| accuracy | | 95 % (Wilson) |", "|---|---|---|"]
    for name, accuracy in rows.items():
        low, high = wilson_interval(accuracy, count, CONFIDENCE)
        lines.append(f"| {name} | {accuracy:.2%} | {low:.2%} to {high:.2%} |")
    versions = ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())
    lines += [
        "",
        f"On {count:,} test images, attacks in {metrics['norm']} of radius {metrics['eps']}, seed {metrics['attack_seed']}; "
        f"{versions}. An attack stronger than these, or another kind of perturbation, can do better.",
    ]
    warned = [name.replace("_", " ") for name, value in metrics.get("flags", {}).items() if value]
    return lines + (["", f"AutoAttack warns of {', '.join(warned)}: the accuracy may be overestimated."] if warned else [])


def digests(record: Record, files: Iterable[tuple[str, Path]]) -> list[str]:
    found = {name: digest_file(path) for name, path in files}
    found |= {"weights before the export": record.model["digest"]}
    found |= {f"trained on: {name}": digest for name, digest in record.model.get("inputs", {}).items()}
    return ["| what | digest |", "|---|---|", *(f"| {name} | `{digest}` |" for name, digest in found.items())]
