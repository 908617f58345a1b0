"""The networks of torchvision, modules of the user's own, and that whatever looks into a model copes with them."""

import re
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pipeline import project as project_module
from pipeline import recipes
from pipeline.balls import BALLS
from pipeline.deepfool import deepfool
from pipeline.dependencies import code_deps
from pipeline.execution import store
from pipeline.images import ImageStore
from pipeline.margins import grand
from pipeline.models import Classifier, ModelParams, build_network, registry
from pipeline.models.checkpoint import load_model, save_model
from pipeline.models.dry_run import check_model
from pipeline.models.inference import inference_copy
from pipeline.params import InputError, read_yaml
from pipeline.threat import ThreatParams
from pipeline.training import train
from pipeline.training.optimisation import make_optimizer
from pipeline.training.pools import full_pool
from tests.conftest import ROOT, make_store
from tests.projects import checkout, shell
from tests.test_inference import NETWORKS, classifier
from tests.test_training import recipe

OWN = """
from torch import nn

from pipeline.models import register


@register
def tied(shape, num_classes, *, width=8):
    net = nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], width), nn.Linear(width, width))
    net.append(net[2]).append(nn.Linear(width, num_classes))
    return net


def unregistered(shape, num_classes):
    raise AssertionError("called")
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project with the modules mynets and more/nets of the user."""
    monkeypatch.setattr(registry, "PROJECT", tmp_path)
    monkeypatch.setattr(registry, "ARCHITECTURES", dict(registry.ARCHITECTURES))
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "more").mkdir()
    for name in ("mynets.py", "more/nets.py"):
        (tmp_path / name).write_text(OWN)
    yield tmp_path
    for module in ("mynets", "more.nets", "more", "broken"):
        sys.modules.pop(module, None)


@pytest.mark.parametrize(("depth", "million"), [(18, 11.17), (50, 23.52)])
def test_the_resnet_is_torchvisions_with_another_stem(depth: int, million: float) -> None:
    from torchvision import models

    with torch.device("meta"):
        ours = build_network(ModelParams(architecture="resnet", arguments={"depth": depth}), (32, 32, 3), 10, 0)
        theirs = getattr(models, f"resnet{depth}")(num_classes=10)
    shapes = [{name: tuple(tensor.shape) for name, tensor in net.state_dict().items()} for net in (ours, theirs)]
    assert shapes[0].pop("conv1.weight") == (64, 3, 3, 3)
    assert shapes[1].pop("conv1.weight") == (64, 3, 7, 7)
    assert shapes[0] == shapes[1]
    assert sum(p.numel() for p in ours.parameters()) / 1e6 == pytest.approx(million, abs=0.005)


@pytest.mark.parametrize(("stem", "side"), [("cifar", 32), ("imagenet", 8)])
def test_the_stem_decides_the_side_at_which_the_resnet_works(stem: str, side: int) -> None:
    net = build_network(ModelParams(architecture="resnet", arguments={"stem": stem}), (32, 32, 1), 10, 0)
    seen: list[torch.Size] = []
    net.get_submodule("layer1").register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    net.eval()(torch.rand(1, 1, 32, 32))
    assert seen == [torch.Size([1, 64, side, side])]


def test_the_vit_has_one_token_per_patch_and_the_weights_of_its_paper() -> None:
    """With an MLP of 4 d a block has 12 d^2 weights and 13 d biases and norms."""
    with torch.device("meta"):
        net = build_network(ModelParams(architecture="vit"), (32, 32, 3), 10, 0)
    d, tokens = 192, 1 + (32 // 4) ** 2
    assert net.get_parameter("encoder.pos_embedding").shape == (1, tokens, d)
    patches, head = (3 * 4 * 4 + 1) * d, (d + 1) * 10
    expected = 12 * (12 * d**2 + 13 * d) + tokens * d + d + 2 * d + patches + head
    assert sum(p.numel() for p in net.parameters()) == expected


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_deepfool_on_the_folded_copy_gives_the_margins_of_the_model(name: str) -> None:
    model = classifier(name).to(memory_format=torch.channels_last)
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=torch.channels_last)
    y = model(x).argmax(dim=1)
    plain, folded = (deepfool(net, x, y, ball=BALLS["l2"]) for net in (model, inference_copy(model)))
    assert bool(plain.converged.all())
    assert bool((plain.margin > 0).all())
    torch.testing.assert_close(folded.margin, plain.margin, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_grand_is_the_norm_of_the_gradient_of_each_image(name: str) -> None:
    model = classifier(name)
    x, y = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 5, 9])
    for image, label, found in zip(x, y, grand(model, x, y), strict=True):
        loss = nn.functional.cross_entropy(model(image[None]), label[None])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        torch.testing.assert_close(found, torch.cat([g.flatten() for g in gradients]).norm(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_a_saved_resnet_and_vit_give_the_same_logits(name: str, tmp_path: Path) -> None:
    model = classifier(name)
    params = NETWORKS[name].model_dump()
    save_model(tmp_path / "model", model, {**params, "shape": [8, 8, 3], "classes": list("0123456789")})
    loaded, _ = load_model(tmp_path / "model", torch.device("cpu"))
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded(x), model(x))


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("module", ["mynets", "more.nets"])
def test_a_function_of_ones_own_module_is_an_architecture_by_its_path(module: str) -> None:
    params = ModelParams(architecture=f"{module}.tied", arguments={"width": 6})
    net = build_network(params, (8, 8, 1), 10, seed=0)
    assert net(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert net[2] is net[3]  # type: ignore[index]
    with pytest.raises(ValueError, match="unexpected keyword argument 'depth'"):
        ModelParams(architecture=f"{module}.tied", arguments={"depth": 6})


@pytest.mark.usefixtures("project")
def test_tied_weights_are_saved_and_stay_tied(tmp_path: Path) -> None:
    net = build_network(ModelParams(architecture="mynets.tied"), (8, 8, 1), 10, seed=0)
    model = Classifier(net, [0.3], [0.3]).eval()
    description = {"architecture": "mynets.tied", "arguments": {}, "shape": [8, 8, 1], "classes": list("0123456789")}
    save_model(tmp_path / "model", model, description)
    loaded, _ = load_model(tmp_path / "model", torch.device("cpu"))
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded(x), model(x))
    assert loaded.net[2].weight is loaded.net[3].weight  # type: ignore[index]
    torch.testing.assert_close(inference_copy(model)(x), model(x))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mynets.unregistered", r"whose function has @register; got 'mynets\.unregistered'"),
        ("mynets.nothing", r"got 'mynets\.nothing'"),
        ("elsewhere.tied", r"wanted the file elsewhere\.py in the project"),
        ("os.system", r"wanted the file os\.py in the project"),
        ("subprocess.Popen", r"wanted the file subprocess\.py in the project"),
        ("../mynets.tied", "in the project for"),
        ("broken.net", r"broken\.py cannot be imported \(ZeroDivisionError: division by zero\)"),
    ],
)
def test_nothing_but_what_the_project_registers_is_imported_or_called(project: Path, name: str, message: str) -> None:
    (project / "broken.py").write_text("1 / 0")
    with pytest.raises(ValueError, match=message):
        ModelParams(architecture=name)


BUILDERS = """
import torch
from torch import nn

from pipeline.models import register


@register
def off_by_one(shape, num_classes):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(shape[2], num_classes + 1))


@register
def eager(shape, num_classes, *, width=4):  # reads a value, which the meta device has none of
    torch.linspace(0, 1, 3)[1].item()
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(shape[2], [3, 4][width - 3]), nn.Linear(4, 10))


@register
def picky(shape, num_classes, *, side=40):
    assert shape[0] % side == 0, "side"
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(shape[2], num_classes))
"""


@pytest.mark.parametrize(
    ("name", "arguments", "shape", "message"),
    [
        ("off_by_one", {}, (8, 8, 3), r"wanted logits of shape \(2, 10\) for two images, got \(2, 11\)"),
        ("off_by_one", {}, None, None),
        ("eager", {}, (8, 8, 3), None),
        ("eager", {"width": 3}, (8, 8, 3), r"cannot be built and run for 8 x 8 x 3 images with .* \(RuntimeError: mat1"),
        ("eager", {"width": 9}, None, r"cannot be built and run .* \(IndexError: list index out of range\)"),
        ("picky", {}, None, None),
        ("picky", {}, (32, 32, 3), r"cannot be built and run for 32 x 32 x 3 images with \{\} \(AssertionError: side\)"),
    ],
)
def test_a_dry_run_finds_what_would_fail_and_nothing_else(
    project: Path, name: str, arguments: dict[str, int], shape: tuple[int, int, int] | None, message: str | None
) -> None:
    (project / "mynets.py").write_text(BUILDERS)
    params = ModelParams(architecture=f"mynets.{name}", arguments=arguments)
    with pytest.raises(InputError, match=message) if message else nullcontext():
        check_model(params, shape)


MODEL = "{architecture: mynets.cnn, arguments: {}}"
USERS = {
    f"margin_model.model={MODEL}": {"margin_model", "judge", "margins", "report"},
    "margin_model={kind: import, path: given}": {"margin_model", "judge", "margins", "report"},
    f"train.model={MODEL}": {"train", "evaluate", "report"},
    f"guide={{kind: train, model: {MODEL}}}": {"guide", "synthesize", "report"},
}


def test_check_wants_ones_own_module_in_dvc_yaml_and_deps_puts_it_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = "{architecture: preactresnet, arguments: {blocks: [1, 1], width: 16, stem_stride: 2}}"
    text = (ROOT / "params.yaml").read_text().replace(model, "{architecture: mynets.cnn, arguments: {width: 6}}")
    own = re.search(r"```python\n(from torch import nn\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert own
    folder = checkout(tmp_path / "project", text)
    (folder / "mynets.py").write_text(f"import more\n{own[1]}")
    (folder / "more.py").write_text("SIZE = 3\n")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(store, "PROJECT", folder)
    with pytest.raises(InputError, match="your module mynets in the stage margin_model; run `python -m pipeline deps --write`"):
        project_module.check_own_modules(read_yaml(Path("params.yaml")))
    project_module.correct_code_deps(write=True)
    deps = {name: entry.get("do", entry)["deps"] for name, entry in read_yaml(Path("dvc.yaml"))["stages"].items()}
    having = {name for name, listed in deps.items() if {"mynets.py", "more.py"} <= {*listed}}
    assert having == {"margin_model", "judge", "margins", "train", "evaluate", "report"}
    Path("given").mkdir()
    Path("given/model.json").write_text('{"architecture": "mynets.cnn"}')
    for change, wanted in USERS.items():
        Path("params.yaml").write_text(recipes.read("digits", [change]))
        assert {stage for stage in project_module.stage_names() if "mynets.py" in code_deps(stage)} == wanted
        with pytest.raises(InputError, match="in the stage guide") if "guide" in wanted else nullcontext():
            project_module.check_own_modules(read_yaml(Path("params.yaml")))
    Path("params.yaml").write_text(text)
    mine = "stages:\n  mine: {cmd: 'true', params: [seeds, {more.yaml: [a]}], metrics: [mine.json]}\n"  # a stage of one's own
    without = Path("dvc.yaml").read_text()
    Path("dvc.yaml").write_text(without.replace("stages:\n", mine, 1))
    assert "mynets.py" in code_deps("train")
    Path("dvc.yaml").write_text("stages: {}\n")
    assert "mynets.py" in code_deps("train")
    Path("dvc.yaml").unlink()
    assert "mynets.py" in code_deps("train")
    Path("dvc.yaml").write_text(without)
    run = store.RunStore(folder / ".runs/train@puma-0/key")
    run.path.mkdir(parents=True)
    assert {path.name for path in run.snapshot_code().iterdir()} == {"more.py", "mynets.py", "pipeline", "stages"}
    checked = shell("python -m pipeline check", folder)
    assert checked.stdout.strip().endswith("all sections are valid"), checked.stderr


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_a_resnet_and_a_vit_are_trained_without_decay_of_their_norms(
    name: str, tmp_path: Path, stores: dict[str, ImageStore]
) -> None:
    chosen = np.arange(48)
    small = make_store(tmp_path / "store", (stores["real"].batch(chosen), stores["real"].labels[chosen]))
    params = recipe(batch_size=16, holdout=16, epochs=1, micro_batch_size=8)
    net = build_network(NETWORKS[name], (8, 8, 1), 10, seed=0)
    decayed = {id(p) for group in make_optimizer(net, params).param_groups if group["weight_decay"] for p in group["params"]}
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d | nn.LayerNorm)]
    assert norms
    assert not decayed & {id(p) for norm in norms for p in norm.parameters()}
    assert {id(m.weight) for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)} <= decayed
    pools = {"real": full_pool(small, 0.1), "synthetic": full_pool(small, 0.1)}
    result = train(
        net, pools, params, threat=ThreatParams(norm="linf", eps_255=24), seed=0,
        device=torch.device("cpu"), progress=lambda step, of, figures: None,
    )  # fmt: skip
    assert result.cost["steps"] == 3
    assert all(np.isfinite(row["loss"]) for row in result.history)
    before = build_network(NETWORKS[name], (8, 8, 1), 10, seed=0).state_dict()
    assert all(not torch.equal(p, before[key]) for key, p in result.last.net.named_parameters() if p.ndim > 1)
