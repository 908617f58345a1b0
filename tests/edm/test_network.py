"""The U-Net against published sizes and straightforward recomputation of its parts."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.edm.network import Block, NetworkParams, UNet, build_unet, group_norm, positions
from pipeline.params import InputError
from pipeline.randomness import global_stream

TINY = NetworkParams(channels=8, multipliers=(1, 2), blocks=1, attention_resolutions=(4,))


def tiny(seed: int = 0, **changes: object) -> UNet:
    return build_unet(TINY.model_copy(update=changes), (8, 8, 1), 10, seed)


def perturbed(net: UNet) -> UNet:
    """The network away from its start, where the last convolutions are zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return net


def inputs(count: int = 4, size: int = 8, channels: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, channels, size, size, generator=generator)
    return x, torch.randn(count, generator=generator), torch.arange(count)


@pytest.mark.parametrize("size", [8, 16, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_output_has_the_shape_of_the_image(size: int, channels: int) -> None:
    net = perturbed(build_unet(TINY.model_copy(update={"attention_resolutions": (size // 2,)}), (size, size, channels), 10, 0))
    x, noise, labels = inputs(2, size, channels)
    output = net(x, noise, labels)
    assert output.shape == x.shape
    assert output.std() > 0.01


def test_an_untrained_network_outputs_zero() -> None:
    assert not tiny()(*inputs()).any()


@pytest.mark.parametrize("adaptive_scale", [True, False])
def test_the_gradient_reaches_every_parameter(adaptive_scale: bool) -> None:
    net = perturbed(tiny(adaptive_scale=adaptive_scale, dropout=0.1, label_dropout=0.1))
    net(*inputs(), dropping=True).square().sum().backward()
    assert [name for name, parameter in net.named_parameters() if parameter.grad is None or not parameter.grad.any()] == []


def test_the_network_of_the_paper_for_cifar10_has_the_published_sizes() -> None:
    """Sizes in the logs that the authors' training script prints; 55,733,891 is their network without labels, of which
    9 x 128 embed augmentations, and 11 x 128 more embed ten classes."""
    params = NetworkParams(
        channels=128, multipliers=(2, 2, 2), blocks=4, attention_resolutions=(16,), dropout=0.13, adaptive_scale=False
    )
    with torch.device("meta"):
        net = build_unet(params, (32, 32, 3), 10, 0)

    def size(name: str) -> int:
        return sum(parameter.numel() for parameter in net.get_submodule(name).parameters())

    assert size("map_layer0") == 66048
    assert size("map_layer1") == 262656
    assert size("enc.16x16_down") == 1378304
    assert size("enc.8x8_block0") == 1312512
    assert size("dec.8x8_in0") == 1576192
    assert size("dec.8x8_in1") == 1312512
    assert size("dec.8x8_block4") == 2034176
    assert size("dec.16x16_up") == 1378304
    assert size("") == 55_733_891 - 9 * 128 + 11 * 128


def test_attention_is_softmax_over_all_pixels() -> None:
    block = Block(8, 8, 4, attention=True, resample="keep", joins=False, dropout=0, adaptive_scale=True).double()
    assert block.norm2 is not None
    assert block.qkv is not None
    assert block.proj is not None
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(block.proj.weight, generator=generator)
    x = torch.randn(2, 8, 3, 3, dtype=torch.float64, generator=generator)
    qkv = block.qkv(block.norm2(x)).reshape(2, 8, 3, 9)  # channel, (query, key, value), pixel
    expected = torch.empty_like(x)
    for image in range(2):
        q, k, v = qkv[image].unbind(1)
        weights = torch.softmax(q.T @ k / math.sqrt(8), dim=1)  # from each pixel to all
        mixed = (v @ weights.T).reshape(1, 8, 3, 3)
        expected[image] = (x[image] + block.proj(mixed)[0]) / math.sqrt(2)
    torch.testing.assert_close(block.attend(x), expected)


def test_down_takes_means_and_up_repeats_pixels() -> None:
    def resampled(mode: str, x: Tensor) -> Tensor:
        return Block(8, 8, 4, False, mode, False, dropout=0, adaptive_scale=True).resample(x)

    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    torch.testing.assert_close(resampled("down", x), torch.tensor([[[[2.5, 4.5], [10.5, 12.5]]]]))
    torch.testing.assert_close(resampled("up", x)[0, 0, :2, :4], torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1]]))


@pytest.mark.parametrize("adaptive_scale", [True, False])
def test_a_block_at_its_start_only_scales_its_input(adaptive_scale: bool) -> None:
    block = Block(8, 8, 4, attention=False, resample="keep", joins=False, dropout=0, adaptive_scale=adaptive_scale)
    x = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(block(x, torch.randn(2, 4, generator=torch.Generator().manual_seed(1)), False), x / math.sqrt(2))


def test_positions_are_sines_then_cosines_of_falling_frequency() -> None:
    found = positions(torch.tensor([0.7]), 6)
    angles = [0.7, 0.7 / 100, 0.7 / 10_000]
    expected = [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
    torch.testing.assert_close(found, torch.tensor([expected]))


def test_noise_level_and_label_change_the_output() -> None:
    net = perturbed(tiny())
    x, noise, labels = inputs()
    output = net(x, noise, labels)
    assert (net(x, noise + 1, labels) - output).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    assert (net(x, noise, labels + 1) - output).abs().amax(dim=(1, 2, 3)).min() > 1e-3


def test_dropped_labels_no_longer_matter_and_are_dropped_only_on_request() -> None:
    net = perturbed(tiny(label_dropout=1.0))
    x, noise, labels = inputs()
    torch.testing.assert_close(net(x, noise, labels, dropping=True), net(x, noise, labels + 1, dropping=True))
    assert not torch.equal(net(x, noise, labels), net(x, noise, labels + 1))
    assert not torch.equal(net(x, noise, labels), net(x, noise, labels, dropping=True))


def test_no_labels_are_dropped_labels() -> None:
    net = perturbed(tiny(label_dropout=1.0))
    x, noise, labels = inputs()
    torch.testing.assert_close(net(x, noise, None), net(x, noise, labels, dropping=True))


def test_label_dropout_drops_its_share() -> None:
    net = perturbed(tiny(label_dropout=0.3))
    labels, noise = torch.full((2000,), 3), torch.zeros(2000)
    with_label = net.embed(noise[:1], labels[:1], dropping=False)
    with global_stream(0, 0, "dropout", torch.device("cpu")):
        kept = torch.isclose(net.embed(noise, labels, dropping=True), with_label).all(dim=1)
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.04)


def test_dropout_is_that_of_its_stream_and_leaves_the_global_generator_alone() -> None:
    net = perturbed(tiny(dropout=0.5))
    x, noise, labels = inputs()
    before = torch.get_rng_state()
    found = []
    for position in (0, 0, 1):
        with global_stream(0, position, "dropout", torch.device("cpu")):
            found.append(net(x, noise, labels, dropping=True))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[0], net(x, noise, labels))
    assert torch.equal(before, torch.get_rng_state())


def test_group_norm_in_bf16_is_rounded_once_on_small_maps() -> None:
    x = torch.randn(4, 32, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16().to(memory_format=torch.channels_last)
    norm = group_norm(32)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 32))
        norm.bias.copy_(torch.linspace(-1, 1, 32))
    low = norm.to(torch.bfloat16)
    exact = F.group_norm(x.double(), low.num_groups, low.weight.double(), low.bias.double(), low.eps)
    torch.testing.assert_close(low(x).double(), exact, rtol=2**-8, atol=1e-5)


def test_weights_come_from_the_seed_and_leave_the_global_state_alone() -> None:
    before = torch.get_rng_state()
    one, same, other = tiny(0), tiny(0), tiny(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in one.state_dict().items())
    assert not torch.equal(one.map_layer0.weight, other.map_layer0.weight)


def test_channels_last_gives_the_same_result() -> None:
    net = perturbed(tiny())
    x, noise, labels = inputs()
    expected = net(x, noise, labels)
    found = net.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last), noise, labels)
    assert F.mse_loss(found, expected) < 1e-10


@pytest.mark.parametrize(
    ("shape", "changes", "message"),
    [
        ((28, 28, 1), {}, "square images of 8, 16, 32 or 64 pixels, got 28 x 28"),
        ((8, 16, 1), {}, "got 8 x 16"),
        ((8, 8, 1), {"multipliers": (1, 1, 1, 1)}, "halved 2 times at most, got 4 multipliers; remove 1"),
        ((8, 8, 1), {"attention_resolutions": (16, 4)}, r"wanted some of \[8, 4\] .* got \[16\]"),
    ],
)
def test_a_network_that_cannot_be_is_refused(shape: tuple[int, int, int], changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_unet(TINY.model_copy(update=changes), shape, 10, 0)
