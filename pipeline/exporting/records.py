"""What the artifacts say of one trained model: its description, its evaluation, the data behind it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifacts import digest_file, read_json
from pipeline.models.checkpoint import describe
from pipeline.params import InputError

STORES = {"real": "real/train", "synthetic": "synthetic", "test": "real/test"}


@dataclass(frozen=True)
class Record:
    """`folder` has model.json and model.safetensors; `model` is the former with the digest of the weights. `metrics` is the
    evaluation, None where there is none of this checkpoint; `kept` the images of each source that it was trained on, empty
    where no manifest tells; `origins` where the images of "real", "synthetic" and "test" come from: those of training only
    where the stores are, by their digests, those it was trained on, the test images where it was evaluated."""

    name: str
    folder: Path
    model: dict[str, Any]
    metrics: dict[str, Any] | None
    kept: dict[str, int]
    origins: dict[str, dict[str, Any]]


def read_record(data: Path, model: str, checkpoint: str | None = None) -> Record:
    """Read a run such as "puma-0" below data, or a folder with a saved model such as data/margin_model/best. The
    checkpoint of a run, best or last, is by default the one that was evaluated.

    Raises:
        InputError: there is no such model, or its evaluation is of other weights.
    """
    place = Path(model)
    if place.parent.parent == data / "models":
        model, checkpoint = place.parent.name, place.name
    elif (place / "model.json").is_file():
        description = describe(place)
        return Record("/".join(place.parts[-2:]), place, description, None, {}, origins_of(data, description, None))
    run = data / "models" / model
    if not run.is_dir():
        known = ", ".join(sorted(path.name for path in run.parent.glob("[!.]*"))) or "none yet"
        raise InputError(f"{run}: wanted a trained model, found none; known are {known}, or a folder with model.json")
    file = data / "evaluations" / model / "metrics.json"
    metrics = read_json(file) if file.is_file() else None
    chosen = checkpoint or (metrics["checkpoint"] if metrics else "best")
    folder = run / chosen
    description = describe(folder)
    if metrics and metrics["checkpoint"] != chosen:
        metrics = None
    if metrics and metrics["model"] != description["digest"]:
        raise InputError(f"{folder}: the evaluation is of other weights; run `dvc repro evaluate@{model}`")
    kept = kept_rows(data, model, description)
    return Record(model, folder, description, metrics, kept, origins_of(data, description, metrics))


def kept_rows(data: Path, run: str, description: dict[str, Any]) -> dict[str, int]:
    """Images of each source in the manifest of a run, where that is still the one it was trained on."""
    manifest = data / "manifests" / run.rpartition("-")[0]
    wanted = description.get("inputs", {}).get("manifest")
    if not (manifest / "summary.json").is_file():
        return {}
    if wanted and (manifest / "manifest.parquet").is_file() and digest_file(manifest / "manifest.parquet") != wanted:
        raise InputError(f"{manifest}: the model was trained on another manifest; run `dvc repro train@{run}`")
    by_source = read_json(manifest / "summary.json")["by_source"]
    return {source: counts["kept"] for source, counts in by_source.items()}


def origins_of(data: Path, description: dict[str, Any], metrics: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    inputs = description.get("inputs", {})
    found = {}
    for name, place in STORES.items():
        file = data / place / "store.json"
        if file.is_file() and (metrics is not None if name == "test" else digest_file(file) == inputs.get(name)):
            found[name] = read_json(file).get("origin", {})
    return found
