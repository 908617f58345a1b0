"""Where the numbers come from: digests, versions, parameters and the commands that repeat them."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import pyarrow.parquet as pq

from pipeline.artifacts import MARGINS_SCHEMA, digest_file, read_json, table_parts
from pipeline.reporting.inputs import Artifacts
from pipeline.reporting.runs import Run

COMMANDS = (
    "make setup                  # the environment, its versions pinned in constraints.txt",
    "source .venv/bin/activate",
    "python -m pipeline check    # with the parameters below in params.yaml",
    "python -m pipeline repro    # or: dvc repro",
)
PACKAGES = ("dvc", "numpy", "plotly", "pyarrow", "scipy", "torchvision")  # pinned in constraints.txt, as all are


def digests(artifacts: Artifacts, runs: Sequence[Run]) -> dict[str, str]:
    """SHA-256 of what the numbers come from, by place; store.json and summary.json hold those of the larger files."""
    files = {
        "real/train/store.json": artifacts.real / "train" / "store.json",
        "real/test/store.json": artifacts.real / "test" / "store.json",
        "synthetic/store.json": artifacts.synthetic / "store.json",
        "margin_model/best/model.json": artifacts.margin_model / "best" / "model.json",
        "judge/quality.json": artifacts.judge / "quality.json",
        "perceptron/perceptron.json": artifacts.perceptron / "perceptron.json",
    }
    for run in runs:
        files[f"manifests/{run.strategy}/summary.json"] = run.manifest.path.with_name("summary.json")
        files[f"evaluations/{run.name}/metrics.json"] = artifacts.evaluations / run.name / "metrics.json"
    models = {f"models/{run.name} (weights)": run.model for run in runs if run.model}
    return {place: digest_file(path) for place, path in files.items()} | models


def provenance(
    artifacts: Artifacts, params: Mapping[str, Any], runs: Sequence[Run], names: Mapping[str, str]
) -> dict[str, Any]:
    """By heading: text, or what is shown as JSON; names: what the sources are called."""
    stores = {
        "real train": artifacts.real / "train",
        "real test": artifacts.real / "test",
        names["synthetic"]: artifacts.synthetic,
    }
    metadata = pq.read_schema(table_parts(artifacts.margins, MARGINS_SCHEMA)[0]).metadata or {}
    versions = {name: sorted({run.versions[name] for run in runs}) for name in runs[0].versions}
    return {
        "commands": "\n".join(COMMANDS),
        "parameters": dict(params),
        "versions of the evaluations": {name: ", ".join(found) for name, found in versions.items()},
        "versions of the report": {name: version(name) for name in PACKAGES},
        **{f"images: {name}": read_json(path / "store.json").get("origin", {}) for name, path in stores.items()},
        "margins": {key.decode(): value.decode() for key, value in metadata.items() if key != b"ARROW:schema"},
        "perceptron": read_json(artifacts.perceptron / "perceptron.json").get("params", {}),
    }
