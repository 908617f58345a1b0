"""Exported files load where they belong and compute what the model does; the card says what the artifacts do."""

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from pipeline.artifacts import digest_file, read_json, write_json
from pipeline.cli import app
from pipeline.exporting.export import export
from pipeline.exporting.graphs import check_logits, write_onnx, write_torchscript
from pipeline.exporting.robustbench import Paper
from pipeline.models import Classifier, ModelParams, build_network
from pipeline.models.checkpoint import load_model, save_model
from pipeline.params import InputError
from tests.exporting.test_robustbench import write_run

CPU = torch.device("cpu")
PLACES = {"real": "real/train", "synthetic": "synthetic"}
SMALL: dict[str, dict[str, Any]] = {
    "preactresnet": {"blocks": [1, 1], "width": 8},
    "wideresnet": {"depth": 10, "width": 1},
    "resnet": {},
    "vit": {"patch_size": 4, "num_layers": 1, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 16},
}


def small(name: str) -> Classifier:
    net = build_network(ModelParams(architecture=name, arguments=SMALL[name]), (8, 8, 3), 10, 0)
    if name == "vit":  # whose head starts at zero
        nn.init.normal_(net.get_submodule("heads.head").get_parameter("weight"), generator=torch.Generator().manual_seed(0))
    return Classifier(net, [0.5, 0.4, 0.3], [0.3, 0.2, 0.1]).to(memory_format=torch.channels_last).eval()


def images(count: int) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def load_script(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.jit.load(path)


def run_onnx(path: Path, x: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])


@pytest.mark.parametrize("name", list(SMALL))
def test_torchscript_gives_logits_and_input_gradients_of_the_model_for_any_batch(name: str, tmp_path: Path) -> None:
    model = small(name)
    write_torchscript(tmp_path / "model.pt", model, (8, 8, 3))
    loaded = load_script(tmp_path / "model.pt")
    for count in (1, 3, 7):
        torch.testing.assert_close(loaded(images(count)), model(images(count)))
        x, z = (images(count).requires_grad_() for _ in range(2))
        gradients = [torch.autograd.grad(net(v)[:, 1].sum(), v)[0] for net, v in ((loaded, x), (model, z))]
        assert bool(gradients[1].abs().sum() > 0)
        torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("name", ["wideresnet", "vit"])
def test_onnx_gives_the_logits_of_the_model_for_any_batch(name: str, tmp_path: Path) -> None:
    model = small(name)
    write_onnx(tmp_path / "model.onnx", model, (8, 8, 3))
    for count in (1, 3, 7):
        torch.testing.assert_close(run_onnx(tmp_path / "model.onnx", images(count)), model(images(count)), rtol=1e-3, atol=1e-5)


def test_a_model_whose_logits_depend_on_the_batch_is_refused() -> None:
    model = small("preactresnet")
    with pytest.raises(InputError, match="torchscript: the file gives other logits than the model for a batch of 5"):
        check_logits("torchscript", lambda x: model(x) + (len(x) > 1), model, (8, 8, 3))
    with pytest.raises(InputError, match="onnx: the file gives other logits than the model for a batch of 1"):
        check_logits("onnx", lambda x: model(x)[:, :1], model, (8, 8, 3))


def test_onnx_without_its_packages_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else found(name))
    with pytest.raises(InputError, match=r"wants onnx, onnxscript, onnxruntime; .* `pip install -e \.\[export\]`"):
        write_onnx(tmp_path / "model.onnx", small("wideresnet"), (8, 8, 3))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The artifacts of one evaluated run."""
    data = write_run(tmp_path / "data", reference={"fgsm": 0.75})
    write_json(data / "real/test/store.json", {"origin": {"kind": "cifar10", "root": "a|b", "licence": "MIT"}})
    for place, origin in {"real/train": {"kind": "cifar10", "licence": "MIT"}, "synthetic": {"kind": "npz", "seed": 3}}.items():
        (data / place).mkdir(parents=True, exist_ok=True)
        write_json(data / place / "store.json", {"origin": origin})
    description = read_json(data / "models/puma-0/best/model.json") | {
        "threat": {"norm": "linf", "eps": "8/255"}, "seed": 0, "train": {"steps": 1200},
        "inputs": {"manifest": "c0ffee"} | {name: digest_file(data / place / "store.json") for name, place in PLACES.items()},
    }  # fmt: skip
    write_json(data / "models/puma-0/best/model.json", description)
    return data


def test_the_card_has_data_licence_threat_metrics_and_digests_of_the_records(data: Path, tmp_path: Path) -> None:
    assert export(data, "puma-0", "torchscript", tmp_path / "out", licence="mit") == []
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.pt", "README.md"}
    card = (tmp_path / "out/README.md").read_text()
    weights = sum(p.numel() for p in load_model(data / "models/puma-0/best", CPU)[0].parameters())
    for line in (
        "license: mit",
        "# puma-0: wideresnet",
        f'- Architecture: wideresnet {{"depth": 16, "width": 2}}, {weights:,} weights',
        "| real | 1 | kind: cifar10 | MIT |",
        "| synthetic | 20,000,000 | kind: npz, seed: 3 | not recorded |",
        "| test | in the evaluation only | kind: cifar10, root: a\\|b | MIT |",
        "- Trained against: linf of radius 8/255",
        "- Strategy: puma",
        "- Steps: 1,200",
        "| clean | 92.44% | 91.91% to 92.94% |",
        "| worst case of apgd-ce, apgd-t, fab-t, square | 67.31% | 66.39% to 68.23% |",
        "| fgsm | 75.00% | 74.14% to 75.84% |",
        f"| model.pt | `{digest_file(tmp_path / 'out/model.pt')}` |",
        f"| weights before the export | `{digest_file(data / 'models/puma-0/best/model.safetensors')}` |",
        "| trained on: manifest | `c0ffee` |",
    ):
        assert f"\n{line}\n" in card, line
    assert "(batch, 3, 32, 32) in [0, 1]" in card
    assert "in linf of radius 8/255, seed 0; pyautoattack 0.2.0." in card


def test_images_that_have_changed_since_the_training_are_not_named(data: Path, tmp_path: Path) -> None:
    write_json(data / "real/train/store.json", {"origin": {"kind": "digits"}})
    export(data, "puma-0", "torchscript", tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "| real | 1 | not recorded | not recorded |" in card
    assert "digits" not in card


def test_the_use_that_the_card_shows_runs(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(data, "puma-0", "torchscript", tmp_path / "out")
    code = (tmp_path / "out/README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path / "out")
    x = torch.rand(2, 3, 32, 32)
    scope: dict[str, Any] = {"images": x}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        exec(code, scope)
    torch.testing.assert_close(scope["logits"], load_model(data / "models/puma-0/best", CPU)[0](x))


def test_stand_ins_warnings_and_what_was_not_evaluated_are_said(data: Path, tmp_path: Path) -> None:
    write_json(data / "synthetic/store.json", {"origin": {"kind": "left_out", "seed": 0}})
    described = read_json(data / "models/puma-0/best/model.json")
    described["inputs"]["synthetic"] = digest_file(data / "synthetic/store.json")
    write_json(data / "models/puma-0/best/model.json", described)
    metrics = read_json(data / "evaluations/puma-0/metrics.json")
    write_json(data / "evaluations/puma-0/metrics.json", metrics | {"flags": {"zero_gradients": 5}})
    export(data, "puma-0", "robustbench", tmp_path / "out", paper=Paper("X"))
    card = (tmp_path / "out/README.md").read_text()
    assert "The synthetic images are real ones that training left out, a stand-in" in card
    assert "AutoAttack warns of zero gradients: the accuracy may be overestimated." in card
    model, description = load_model(data / "models/puma-0/best", CPU)
    last = {key: value for key, value in description.items() if key not in ("digest", "normalisation")}
    save_model(data / "models/puma-0/last", model, last)
    for name, target in {"puma-0": "one", str(data / "models/puma-0/last"): "other"}.items():
        export(data, name, "torchscript", tmp_path / target, checkpoint="last")
        assert "This checkpoint was not evaluated." in (tmp_path / target / "README.md").read_text()
    with pytest.raises(InputError, match="RobustBench wants an evaluation of this checkpoint, found none"):
        export(data, "puma-0", "robustbench", tmp_path / "new", checkpoint="last", paper=Paper("X"))


def test_the_command_writes_into_a_folder_of_its_own_and_says_where(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data.parent)
    for model, folder in {
        "puma-0": "puma-0-torchscript",
        "data/models/puma-0/best": "data-models-puma-0-best-torchscript",
    }.items():
        result = CliRunner().invoke(app, ["export", model, "--format", "torchscript"])
        assert result.exit_code == 0, result.output
        assert (data.parent / "exports" / folder / "model.pt").is_file()
        assert "92.44%" in (data.parent / "exports" / folder / "README.md").read_text()
    wrong = CliRunner().invoke(app, ["export", "puma-0", "--format", "pickle"])
    assert wrong.exit_code == 2


def test_a_folder_with_a_saved_model_is_enough(data: Path, tmp_path: Path) -> None:
    model, _ = load_model(data / "models/puma-0/best", CPU)
    description = read_json(data / "models/puma-0/best/model.json")
    save_model(tmp_path / "given", model, {key: description[key] for key in ("architecture", "arguments", "shape", "classes")})
    export(tmp_path / "nothing", str(tmp_path / "given"), "torchscript", tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "- Trained against: not recorded" in card
    assert "| real | not recorded | not recorded | not recorded |" in card
    assert "- Licence of the weights: not recorded" in card
    with pytest.raises(InputError, match="known are puma-0, or a folder with model.json"):
        export(data, "puma-9", "torchscript", tmp_path / "new")
