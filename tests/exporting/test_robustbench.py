"""The export of a small WideResNet, loaded as RobustBench loads it."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.artifacts import digest_file, write_json
from pipeline.exporting.export import export as export_model
from pipeline.exporting.robustbench import Paper
from pipeline.models import Classifier, ModelParams, build_network
from pipeline.models.checkpoint import load_model, save_model
from pipeline.params import InputError
from tests.test_models import published_shapes, wide_forward

PAPER = Paper("Some2024Thing_WRN-16-2", "A title", "A. Author", "https://example.org", "", "cifar10", licence="MIT")
NPZ = {"kind": "npz"}
STANDARD = {"apgd-ce": 0.7, "apgd-t": 0.673149, "fab-t": 0.673149, "square": 0.673149}
MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2471, 0.2435, 0.2616]


def export(data: Path, run: str, paper: Paper | None, target: Path) -> list[str]:
    return export_model(data, run, "robustbench", target, paper=paper)


def write_run(
    data: Path,
    architecture: str = "wideresnet",
    shape: tuple[int, ...] = (32, 32, 3),
    origin: Mapping[str, Any] = NPZ,
    **changes: Any,
) -> Path:
    arguments = {"depth": 16, "width": 2} if architecture == "wideresnet" else {}
    net = build_network(ModelParams(architecture=architecture, arguments=arguments), (32, 32, 3), 10, seed=0).eval()
    description = {"architecture": architecture, "arguments": arguments, "shape": list(shape), "classes": list("0123456789")}
    folder, store = data / "models" / "puma-0" / "best", data / "synthetic" / "store.json"
    store.parent.mkdir(parents=True)
    write_json(store, {"origin": origin})
    description["inputs"] = {"synthetic": digest_file(store)}
    save_model(folder, Classifier(net, MEAN, STD), description)
    metrics = {
        "strategy": "puma", "norm": "linf", "eps": "8/255", "num_examples": 10_000, "clean": 0.9244, "robust": 0.673149,
        "attacks": STANDARD, "checkpoint": "best", "attack_seed": 0, "versions": {"pyautoattack": "0.2.0"},
        "model": digest_file(folder / "model.safetensors"), "flags": {"zero_gradients": 0, "square_stronger": None},
    }  # fmt: skip
    for path, content in {
        "evaluations/puma-0/metrics.json": metrics | changes,
        "manifests/puma/summary.json": {"by_source": {"real": {"kept": 1}, "synthetic": {"kept": 20_000_000}}},
        "real/test/store.json": {"origin": {"kind": "parquet"}},
    }.items():
        (data / path).parent.mkdir(parents=True)
        write_json(data / path, content)
    return data


def test_the_weights_load_as_published_and_give_the_logits_of_our_model(tmp_path: Path) -> None:
    data = write_run(tmp_path / "data")
    assert export(data, "puma-0", PAPER, tmp_path / "out") == []
    state = torch.load(tmp_path / "out/models/cifar10/Linf/Some2024Thing_WRN-16-2.pt", weights_only=True)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == published_shapes(16, 2)
    model, _ = load_model(data / "models/puma-0/best", torch.device("cpu"))
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    with torch.no_grad():
        torch.testing.assert_close(model(x), wide_forward(state, (x - mean) / std, num_blocks=2))


def test_model_info_is_that_of_a_published_entry_but_for_its_values(tmp_path: Path) -> None:
    export(write_run(tmp_path / "data"), "puma-0", PAPER, tmp_path / "out")
    found = json.loads((tmp_path / "out/model_info/cifar10/Linf/Some2024Thing_WRN-16-2.json").read_text())
    assert found == {
        "link": "https://example.org", "name": "A title", "authors": "A. Author", "additional_data": False,
        "number_forward_passes": 1, "dataset": "cifar10", "venue": "Unpublished", "architecture": "WideResNet-16-2",
        "eps": "8/255", "clean_acc": "92.44", "reported": "67.31", "autoattack_acc": "67.31",
        "footnote": "It uses additional 20M synthetic images in training.", "unreliable": False,
    }  # fmt: skip


def test_the_issue_has_the_claims_and_the_entry_of_the_model_zoo(tmp_path: Path) -> None:
    export(write_run(tmp_path / "data"), "puma-0", PAPER, tmp_path / "out")
    text = (tmp_path / "out/issue.md").read_text()
    for line in ("- **Threat Model**: Linf", "- **Robust accuracy**: 67.31", "- **Additional data**: false", "# Model Zoo:"):
        assert f"\n{line}\n" in text
    assert "DMWideResNet(num_classes=10, depth=16, width=2," in text
    assert "mean=(0.49" in text
    assert "To be done" not in text


@pytest.mark.parametrize(
    ("paper", "architecture", "checked"),
    [
        (PAPER, "wideresnet", [False, False, True, False]),
        (replace(PAPER, model_zoo=True, licence="https://example.org/terms"), "wideresnet", [True, False, False, True]),
        (replace(PAPER, licence=""), "preactresnet", [False, True, False, False]),
    ],
)
def test_the_issue_has_the_boxes_of_the_template_and_checks_what_holds(
    tmp_path: Path, paper: Paper, architecture: str, checked: list[bool]
) -> None:
    points = export(write_run(tmp_path / "data", architecture), "puma-0", paper, tmp_path / "out")
    text = (tmp_path / "out/issue.md").read_text()
    zoo = text[text.index("# Model Zoo:") :]
    boxes = re.findall(r"^- \[( |x)\] (.*)$", zoo, re.MULTILINE)
    assert [mark == "x" for mark, _ in boxes] == checked
    words = ("to the Model Zoo", "an architecture that is **not** included", "under MIT license", "custom license")
    assert all(word in box for word, (_, box) in zip(words, boxes, strict=True))
    assert boxes[3][1].endswith(": https://example.org/terms" if checked[3] else ": ")
    assert any("give --licence" in point for point in points) is (not paper.licence)


def test_a_stand_in_is_not_called_synthetic(tmp_path: Path) -> None:
    points = export(write_run(tmp_path / "data", origin={"kind": "left_out"}), "puma-0", PAPER, tmp_path / "out")
    assert points == [
        "a stand-in: 20,000,000 real images that ingest left out were used in the place of synthetic ones, so it is no model "
        "of synthetic data"
    ]
    (info,) = (tmp_path / "out/model_info").rglob("*.json")
    assert json.loads(info.read_text())["footnote"] == ""
    assert "| stand-in (left-out real) | 20,000,000 |" in (tmp_path / "out/README.md").read_text()


def test_synthetic_images_of_unknown_origin_are_an_open_point(tmp_path: Path) -> None:
    data = write_run(tmp_path / "data")
    write_json(data / "synthetic" / "store.json", {"origin": {"kind": "edm"}})  # not those it was trained on
    (point,) = export(data, "puma-0", PAPER, tmp_path / "out")
    assert point.startswith("where its synthetic images come from is not on record")


@pytest.mark.parametrize(
    ("changes", "paper", "message"),
    [
        ({"attacks": {"apgd-ce": 0.5}}, PAPER, "attacked by apgd-ce only: it wants evaluate.version: standard"),
        ({"num_examples": 400}, PAPER, "evaluated on 400 images: it wants 10000"),
        ({"eps": "2/255"}, PAPER, "eps is 2/255: the leaderboard of cifar10 Linf wants 8/255"),
        ({"flags": {"zero_gradients": 3}}, PAPER, "AutoAttack warns of zero gradients"),
        ({"shape": [64, 64, 3]}, PAPER, "its DMWideResNet pools 8 x 8 features: it wants images of 32 x 32, not [64, 64]"),
        ({}, Paper("X"), "give --title"),
        ({}, Paper("X"), "no leaderboard for parquet Linf"),
        ({"architecture": "preactresnet"}, PAPER, "RobustBench has no preactresnet of this layout"),
    ],
)
def test_what_is_missing_is_said_and_written(tmp_path: Path, changes: dict[str, Any], paper: Paper, message: str) -> None:
    points = export(write_run(tmp_path / "data", **changes), "puma-0", paper, tmp_path / "out")
    assert any(point.startswith(message) for point in points)
    assert message in (tmp_path / "out/issue.md").read_text()
    (info,) = (tmp_path / "out/model_info").rglob("*.json")
    assert ("autoattack_acc" in json.loads(info.read_text())) == ("attacks" not in changes)


def test_l2_radii_are_decimal_as_on_the_leaderboard(tmp_path: Path) -> None:
    assert export(write_run(tmp_path / "data", norm="l2", eps="127.5/255"), "puma-0", PAPER, tmp_path / "out") == []
    (info,) = (tmp_path / "out/model_info/cifar10/L2").glob("*.json")
    assert json.loads(info.read_text())["eps"] == "0.5"


def test_an_existing_folder_other_weights_and_unknown_runs_are_input_errors(tmp_path: Path) -> None:
    data = write_run(tmp_path / "data")
    with pytest.raises(InputError, match="wants --id"):
        export(data, "puma-0", None, tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="does not exist yet"):
        export(data, "puma-0", PAPER, tmp_path / "out")
    with pytest.raises(InputError, match="found none"):
        export(data, "puma-7", PAPER, tmp_path / "other")
    with (data / "models/puma-0/best/model.safetensors").open("ab") as file:
        file.write(b" ")
    with pytest.raises(InputError, match="of other weights; run `dvc repro evaluate@puma-0`"):
        export(data, "puma-0", PAPER, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_command_says_where_it_wrote_and_what_is_missing(tmp_path: Path) -> None:
    write_run(tmp_path / "data")
    command = [sys.executable, "-m", "pipeline", "export-robustbench", "puma-0", "Some2024Thing", "--dataset", "cifar10"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        *(f"to be done: give --{n}" for n in ("title", "authors", "link")),
        "to be done: give --licence: mit, or where another one can be read; that of the training images may bind it",
        "wrote robustbench",
    ]
    assert (tmp_path / "robustbench/issue.md").is_file()
    card = (tmp_path / "robustbench/README.md").read_text()
    assert "| models/cifar10/Linf/Some2024Thing.pt | `" in card
