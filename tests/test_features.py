"""Features are what the last layer of a model is given."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import inception_v3

from pipeline.features import InceptionFeatures, MarginFeatures, Penultimate, extractor
from pipeline.params import InputError
from tests.conftest import untrained


def test_the_last_layer_of_the_model_makes_its_logits_of_the_features() -> None:
    model = untrained()
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    features = Penultimate(model)(x)
    (head,) = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert features.shape == (3, head.in_features)
    torch.testing.assert_close(head(features), model(x))
    assert not head._forward_pre_hooks


def test_a_model_without_a_linear_layer_has_no_features() -> None:
    with pytest.raises(InputError, match="no linear layer"):
        Penultimate(nn.Conv2d(1, 1, 1))


def test_inception_gives_2048_features_of_the_weights_of_a_file(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = inception_v3(weights=None, init_weights=False, transform_input=False).eval()
    path = tmp_path / "inception.safetensors"
    save_file(net.state_dict(), path)
    features, name = extractor(InceptionFeatures(kind="inception", path=str(path)), untrained(), "0")
    x = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = features(x)
    assert found.shape == (1, 2048)
    assert name["model"] == "torchvision inception_v3"
    large = torch.nn.functional.interpolate(x, (299, 299), mode="bilinear", antialias=True).expand(-1, 3, -1, -1)
    with torch.inference_mode():
        torch.testing.assert_close(net.fc(found), net(2 * large - 1))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"inception\.safetensors: wanted the weights"):
        extractor(InceptionFeatures(kind="inception", path=str(path)), untrained(), "0")
    with pytest.raises(InputError, match="found none at nowhere"):
        extractor(InceptionFeatures(kind="inception", path="nowhere"), untrained(), "0")


def test_the_margin_model_is_named_by_its_digest() -> None:
    assert extractor(MarginFeatures(kind="margin_model"), untrained(), "abc")[1] == {"model": "margin_model", "digest": "abc"}
