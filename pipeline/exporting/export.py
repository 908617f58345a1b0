"""One trained model as a folder to hand on."""

from pathlib import Path
from typing import Literal

import torch

from pipeline.artifacts import publish
from pipeline.exporting import robustbench
from pipeline.exporting.card import card
from pipeline.exporting.graphs import write_onnx, write_torchscript
from pipeline.exporting.records import read_record
from pipeline.models.checkpoint import load_model
from pipeline.params import InputError

Format = Literal["robustbench", "torchscript", "onnx"]


def export(
    data: Path,
    model: str,
    kind: Format,
    target: Path,
    *,
    checkpoint: str | None = None,
    licence: str = "",
    paper: robustbench.Paper | None = None,
) -> list[str]:
    """Write the model, a run such as "puma-0" or a folder with model.json, into the new folder target with its card,
    README.md. Returns what is missing before RobustBench would accept it; nothing for the other formats.

    Raises:
        InputError: there is no such model, target exists already, the model cannot be written in this format, or a package
            for it is missing.
    """
    if target.exists():
        raise InputError(f"{target}: wanted a folder that does not exist yet, so that nothing is replaced")
    record = read_record(data, model, checkpoint)
    with publish(target) as work:
        open_points = []
        if kind == "robustbench":
            if paper is None:
                raise InputError("--format robustbench wants --id, the name of the model there, e.g. Maroto2024Puma_WRN-28-10")
            open_points = robustbench.write(work, robustbench.evaluated(record), paper)
        else:
            classifier, description = load_model(record.folder, torch.device("cpu"))
            height, width, channels = description["shape"]
            write, name = {"torchscript": (write_torchscript, "model.pt"), "onnx": (write_onnx, "model.onnx")}[kind]
            write(work / name, classifier, (height, width, channels))
        files = [(path.relative_to(work).as_posix(), path) for path in sorted(work.rglob("*")) if path.is_file()]
        (work / "README.md").write_text(card(record, kind, files, licence))
    return open_points
