"""The fast copy of a classifier computes the same logits and leaves the classifier alone."""

import copy

import pytest
import torch
from torch import Tensor, nn

from pipeline.models import Classifier, ModelParams, build_network
from pipeline.models.inference import Affine, FewSizes, MixedPrecision, inference_copy, unsure

NETWORKS = {
    "preactresnet": ModelParams(architecture="preactresnet", arguments={"blocks": [1, 1], "width": 8}),
    "wideresnet": ModelParams(architecture="wideresnet", arguments={"depth": 10, "width": 1}),
    "resnet": ModelParams(architecture="resnet", arguments={"depth": 18}),
    "vit": ModelParams(
        architecture="vit", arguments={"patch_size": 2, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
    ),
}


def classifier(name: str = "wideresnet") -> Classifier:
    """With statistics of BatchNorm that are not 0 and 1, and no head of zeros."""
    model = Classifier(build_network(NETWORKS[name], (8, 8, 3), 10, 0), [0.4] * 3, [0.3] * 3)
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        nn.init.normal_(model.get_submodule("net.heads.head").get_parameter("weight"), generator=generator)
    for _ in range(20):
        model(torch.rand(16, 3, 8, 8, generator=generator))
    return model.eval()


def gradient(model: nn.Module, x: Tensor) -> Tensor:
    z = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(z)[:, 3].sum(), z)
    return grad


@pytest.mark.parametrize("name", list(NETWORKS))
def test_logits_and_gradients_are_those_of_the_model_with_fewer_norms(name: str) -> None:
    model = classifier(name)
    fast = inference_copy(model)
    x = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient(fast, x), gradient(model, x), rtol=1e-3, atol=1e-5)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    affine = sum(isinstance(module, Affine) for module in fast.modules())
    assert affine < norms or name == "vit"  # the others are part of a convolution, and a transformer has none
    assert not any(module.training for module in fast.modules())


def test_a_forward_pass_that_branches_on_its_input_is_copied_without_folding_into_convolutions() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.norm(self.conv(x))
            return out.flatten(1) if out.sum() > 0 else -out.flatten(1)

    model = Branching().eval()
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(inference_copy(model)(x), model(x))


def test_the_model_is_left_as_it_was() -> None:
    model = classifier()
    before = copy.deepcopy(model.state_dict())
    modules = [type(module) for module in model.modules()]
    inference_copy(model, bf16=True)(torch.rand(2, 3, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [type(module) for module in model.modules()] == modules
    assert all(p.requires_grad for p in model.parameters())


def test_bf16_changes_gradients_by_its_rounding_and_logits_not_at_all() -> None:
    model = classifier()
    exact, mixed = inference_copy(model), inference_copy(model, bf16=True)
    x = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(mixed(x), exact(x))
    z = x.clone().requires_grad_()
    torch.testing.assert_close(mixed(z), exact(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mixed(z, torch.ones(8, 10)), torch.ones(8, 10), rtol=1e-6, atol=1e-6)  # known, not computed
    one, other = (gradient(net, x).flatten(1) for net in (exact, mixed))
    assert not torch.equal(one, other)
    assert bool((torch.cosine_similarity(one, other) > 0.999).all())


def test_rough_logits_are_those_of_bf16_but_for_images_whose_two_highest_are_close() -> None:
    model = classifier()
    mixed = inference_copy(model, bf16=True)
    assert isinstance(mixed, MixedPrecision)
    x = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    exact, low = mixed.exact(x), mixed.low(x.to(torch.bfloat16)).float()
    found = mixed(x.requires_grad_(), rough=True)
    rows = unsure(low)
    assert 0 < rows.sum() < 64
    torch.testing.assert_close(found[rows], exact[rows], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[~rows], low[~rows], rtol=1e-6, atol=1e-6)
    assert not torch.equal(found[~rows], exact[~rows])
    assert torch.equal(found.argmax(dim=1), exact.argmax(dim=1))
    logits = torch.zeros(2, 10)
    logits[:, 0], logits[:, 2] = 1, torch.tensor([0.97, 0.99])
    assert unsure(logits).tolist() == [False, True]
    assert unsure(logits[:, :3]).tolist() == [True, True]


def test_a_gpu_sees_batches_of_multiples_and_gives_back_what_belongs_to_each_image(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    class Noting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return x.square().flatten(1)

    few = FewSizes(Noting(), multiple=4)
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    assert [few.missing(count, on_gpu=True) for count in (0, 1, 4, 6)] == [0, 3, 0, 2]
    assert [few.missing(count, on_gpu=False) for count in (0, 1, 4, 6)] == [0, 1, 0, 0]
    plain = gradient(few, x)
    monkeypatch.setattr(few, "missing", lambda count, _: -count % 4)
    assert torch.equal(few(x), x.square().flatten(1))
    assert torch.equal(gradient(few, x), plain)
    assert [len(z) for z in seen] == [6, 8, 8]
    assert seen[-1].is_contiguous(memory_format=torch.channels_last)
