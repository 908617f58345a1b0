from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models import Classifier, ModelParams, build_network
from pipeline.models.checkpoint import import_model, load_model, save_model
from pipeline.params import InputError
from tests.conftest import TINY, make_store, untrained

CPU = torch.device("cpu")
DESCRIPTION = {
    "architecture": TINY.architecture,
    "arguments": TINY.arguments,
    "shape": [8, 8, 1],
    "classes": list("0123456789"),
}


def wide_forward(state: dict[str, Tensor], x: Tensor, num_blocks: int) -> Tensor:
    """A WideResNet with SiLU written from its published definition, on a state dict of RobustBench's key layout."""

    def norm_act(prefix: str, z: Tensor) -> Tensor:
        mean, var = state[f"{prefix}.running_mean"], state[f"{prefix}.running_var"]
        return F.silu(F.batch_norm(z, mean, var, state[f"{prefix}.weight"], state[f"{prefix}.bias"]))

    z = F.conv2d(x, state["init_conv.weight"], padding=1)
    for group in range(3):
        for index in range(num_blocks):
            prefix = f"layer.{group}.block.{index}"
            first, stride = index == 0, 2 if group > 0 and index == 0 else 1
            activated = norm_act(f"{prefix}.batchnorm_0", z)
            padded = F.pad(activated, (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1))
            out = F.conv2d(padded, state[f"{prefix}.conv_0.weight"], stride=stride)
            out = F.conv2d(norm_act(f"{prefix}.batchnorm_1", out), state[f"{prefix}.conv_1.weight"], padding=1)
            skip = F.conv2d(activated, state[f"{prefix}.shortcut.weight"], stride=stride) if first else z
            z = skip + out
    z = norm_act("batchnorm", z).mean(dim=(2, 3))
    return F.linear(z, state["logits.weight"], state["logits.bias"])


def test_the_wide_resnet_equals_its_published_definition_and_key_layout() -> None:
    params = ModelParams(architecture="wideresnet", arguments={"depth": 16, "width": 2})
    net = build_network(params, (32, 32, 3), 10, seed=0).eval()
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(net(x), wide_forward(net.state_dict(), x, num_blocks=2))
    block = {"batchnorm_0", "conv_0", "batchnorm_1", "conv_1", "shortcut"}
    keys = {name.rsplit(".", 1)[0] for name in net.state_dict()}
    expected = {
        f"layer.{g}.block.{i}.{part}" for g in range(3) for i in range(2) for part in block if i == 0 or part != "shortcut"
    }
    assert keys == expected | {"init_conv", "batchnorm", "logits"}


def published_shapes(depth: int, width: int) -> dict[str, tuple[int, ...]]:
    """State dict of DMWideResNet, name by name, written from its published definition (RobustBench)."""
    planes = [16, 16 * width, 32 * width, 64 * width]

    def norm(name: str, channels: int) -> dict[str, tuple[int, ...]]:
        vectors = {f"{name}.{key}": (channels,) for key in ("weight", "bias", "running_mean", "running_var")}
        return {**vectors, f"{name}.num_batches_tracked": ()}

    expected: dict[str, tuple[int, ...]] = {"init_conv.weight": (16, 3, 3, 3)}
    for group in range(3):
        inputs, outputs = planes[group], planes[group + 1]
        for index in range((depth - 4) // 6):
            prefix = f"layer.{group}.block.{index}"
            expected |= norm(f"{prefix}.batchnorm_0", inputs) | norm(f"{prefix}.batchnorm_1", outputs)
            expected[f"{prefix}.conv_0.weight"] = (outputs, inputs, 3, 3)
            expected[f"{prefix}.conv_1.weight"] = (outputs, outputs, 3, 3)
            if inputs != outputs:
                expected[f"{prefix}.shortcut.weight"] = (outputs, inputs, 1, 1)
            inputs = outputs
    return expected | norm("batchnorm", planes[3]) | {"logits.weight": (10, planes[3]), "logits.bias": (10,)}


@pytest.mark.parametrize(("depth", "width", "million"), [(28, 10, 36.48), (70, 16, 266.80), (10, 1, 0.08)])
def test_the_wide_resnet_has_the_keys_and_shapes_of_the_published_one(depth: int, width: int, million: float) -> None:
    with torch.device("meta"):
        params = ModelParams(architecture="wideresnet", arguments={"depth": depth, "width": width})
        net = build_network(params, (32, 32, 3), 10, seed=0)
    assert {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()} == published_shapes(depth, width)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(million, abs=0.005)


@pytest.mark.parametrize(("name", "arguments", "million"), [("wideresnet", {}, 36.5), ("preactresnet", {}, 11.2)])
def test_parameter_counts_are_those_of_the_papers(name: str, arguments: dict[str, int], million: float) -> None:
    net = build_network(ModelParams(architecture=name, arguments=arguments), (32, 32, 3), 10, seed=0)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(million, abs=0.05)


@pytest.mark.parametrize("name", ["wideresnet", "preactresnet"])
def test_the_seed_decides_the_weights_and_the_global_state_is_left_alone(name: str) -> None:
    params = ModelParams(architecture=name, arguments={"depth": 10, "width": 1} if name == "wideresnet" else {"width": 4})
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, same, other = (build_network(params, (8, 8, 1), 3, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(value, same[key]) for key, value in first.items())
    assert any(not torch.equal(value, other[key]) for key, value in first.items())


def test_normalisation_is_inside_and_not_in_the_weights() -> None:
    net = build_network(TINY, (8, 8, 1), 10, 0).eval()
    model = Classifier(net, [0.25], [0.5]).eval()
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(x), net((x - 0.25) / 0.5))
    assert set(model.state_dict()) == {f"net.{name}" for name in net.state_dict()}


def test_a_saved_model_gives_the_same_logits_and_the_same_bytes(tmp_path: Path) -> None:
    model = untrained()
    for name in ("a", "b"):
        save_model(tmp_path / name, model, DESCRIPTION)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    loaded, description = load_model(tmp_path / "a", CPU)
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(x), model.to(memory_format=torch.channels_last)(x))
    assert not loaded.training
    assert len(description["digest"]) == 64


def test_damaged_and_missing_models_are_clear_errors(tmp_path: Path) -> None:
    save_model(tmp_path / "model", untrained(), {**DESCRIPTION, "arguments": {"blocks": [1], "width": 16}})
    with pytest.raises(InputError, match=r"wanted weights that fit model\.json"):
        load_model(tmp_path / "model", CPU)
    (tmp_path / "model/model.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(InputError, match=r"wanted weights that fit model\.json"):
        load_model(tmp_path / "model", CPU)
    with pytest.raises(InputError, match="found none; run `dvc repro`"):
        load_model(tmp_path / "nowhere", CPU)


def test_an_imported_model_must_be_for_the_same_images(tmp_path: Path) -> None:
    save_model(tmp_path / "given", untrained(), DESCRIPTION)
    other = make_store(tmp_path / "other", (np.zeros((2, 16, 16, 1), np.uint8), np.zeros(2, np.int64)))
    with pytest.raises(InputError, match=r"wanted a model for images and number of classes \(\[16, 16, 1\], 10\)"):
        import_model(tmp_path / "given", tmp_path / "copy", other)
    with pytest.raises(InputError, match=r"nowhere: wanted a folder .* found no model.json and no model.safetensors; correct"):
        import_model(tmp_path / "nowhere", tmp_path / "copy", other)
    fitting = make_store(tmp_path / "fitting", (np.zeros((2, 8, 8, 1), np.uint8), np.zeros(2, np.int64)))
    import_model(tmp_path / "given", tmp_path / "copy", fitting)
    given, copied = (load_model(tmp_path / name, CPU)[1]["digest"] for name in ("given", "copy"))
    assert given == copied


@pytest.mark.parametrize(
    ("architecture", "arguments", "message"),
    [
        ("resnext", {}, "wanted an architecture out of preactresnet, resnet, .*vit, wideresnet, or module.function"),
        ("nets.of.nobody", {}, "wanted the file nets/of.py in the project for 'nets.of', found none"),
        ("resnet", {"depth": 20}, "wanted depth out of 18, 34, 50, 101, 152"),
        ("vit", {"patch_size": 3}, "wanted square images whose side is a multiple of patch_size, got 8 x 8 and 3"),
        ("vit", {"hidden_dim": 100}, "hidden_dim a multiple of num_heads"),
        ("wideresnet", {"depth": 12}, "wanted 6 n \\+ 4 with n >= 1"),
        ("wideresnet", {"deepness": 12}, "unexpected keyword argument 'deepness'"),
        ("preactresnet", {"blocks": []}, "wanted at least one block per stage"),
    ],
)
def test_wrong_models_are_named(architecture: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_network(ModelParams(architecture=architecture, arguments=arguments), (8, 8, 1), 10, 0)
