"""Training: what a step draws, that it learns, that it repeats, that it stops when it fails."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from pipeline.edm import training
from pipeline.edm.network import NetworkParams, build_unet
from pipeline.edm.training import TrainingState, start, train_generator
from pipeline.image_writing import write_store
from pipeline.images import Images, ImageStore
from pipeline.params import InputError

NETWORK = NetworkParams(channels=8, multipliers=(1, 2), blocks=1, attention_resolutions=(), dropout=0.1, label_dropout=0.1)
SETTINGS: dict[str, Any] = {
    "batch_size": 32,
    "lr": 4e-3,
    "warmup_steps": 4,
    "p_mean": -1.2,
    "p_std": 1.2,
    "flip": False,
    "seed": 0,
    "sigma_data": 0.5,
}


def store_of(path: Path, images: Images) -> ImageStore:
    """A store of two classes in turn."""
    labels = np.arange(len(images)) % 2
    shape = (images.shape[1], images.shape[2], images.shape[3])
    return write_store(path, [(images, labels)], classes=("a", "b"), shape=shape, shard_rows=100, origin={})


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    pixels, labels = load_digits(return_X_y=True)
    images = np.round(pixels[:500] / 16 * 255).astype(np.uint8).reshape(-1, 8, 8, 1)
    path = tmp_path_factory.mktemp("digits") / "train"
    classes = tuple("0123456789")
    return write_store(path, [(images, labels[:500])], classes=classes, shape=(8, 8, 1), shard_rows=200, origin={})


def fresh(store: ImageStore, ema_decay: float = 0.9) -> TrainingState:
    return start(build_unet(NETWORK, store.shape, len(store.classes), 0), ema_decay)


def trained(store: ImageStore, steps: int, **changes: Any) -> TrainingState:
    state = fresh(store)
    train_generator(state, store, steps=steps, **{**SETTINGS, **changes})
    return state


def weights(state: TrainingState) -> list[bytes]:
    """Bytes of every parameter of the network and of its average."""
    return [value.numpy().tobytes() for net in (state.net, state.ema.model) for value in net.state_dict().values()]


def test_the_loss_falls_from_one_on_digits(digits: ImageStore) -> None:
    losses = [loss for _, loss in trained(digits, 60).curve]
    assert losses[0] > 0.9
    assert np.mean(losses[-10:]) < 0.75 * np.mean(losses[:5])


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(digits: ImageStore) -> None:
    assert weights(trained(digits, 3)) == weights(trained(digits, 3))
    assert weights(trained(digits, 3)) != weights(trained(digits, 3, seed=1))


def test_compile_trains_the_compiled_network(digits: ImageStore, compiled_calls: list[Any]) -> None:
    assert weights(trained(digits, 3, compile=True)) == weights(trained(digits, 3))
    assert len(compiled_calls) == 3


def test_every_step_and_rank_draws_its_own_dropout(digits: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def loss(net: torch.nn.Module, clean: Tensor, *_: object, dropping: bool) -> Tensor:
        assert dropping
        seeds.append(torch.initial_seed())
        return next(net.parameters()).sum().expand(len(clean))

    monkeypatch.setattr(training, "denoising_loss", loss)
    trained(digits, 3)
    monkeypatch.setattr(training, "world_size", lambda: 2)
    for number in range(2):
        monkeypatch.setattr(training, "rank", lambda number=number: number)
        trained(digits, 3)
    assert len(set(seeds[:3])) == 3
    assert len(set(seeds[3:])) == 6


def test_a_continued_run_repeats_the_one_that_was_not_stopped(digits: ImageStore) -> None:
    stopped, continued = trained(digits, 3), fresh(digits)
    continued.net.load_state_dict(stopped.net.state_dict())
    continued.ema.model.load_state_dict(stopped.ema.model.state_dict())
    continued.optimizer.load_state_dict(stopped.optimizer.state_dict())
    continued.step, continued.curve = stopped.step, stopped.curve
    train_generator(continued, digits, steps=6, **SETTINGS)
    whole = trained(digits, 6)
    assert weights(continued) == weights(whole)
    assert continued.curve == whole.curve


def test_bf16_trains_nearly_as_float32_does_and_keeps_float32_weights(digits: ImageStore) -> None:
    plain, low = trained(digits, 20), trained(digits, 20, bf16=True)
    assert weights(plain) != weights(low)
    assert all(value.dtype == torch.float32 for value in low.ema.model.state_dict().values())
    for (_, one), (_, other) in zip(plain.curve, low.curve, strict=True):
        assert other == pytest.approx(one, rel=0.05)


def test_training_leaves_the_global_random_state_alone(digits: ImageStore) -> None:
    before = torch.get_rng_state()
    trained(digits, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_average_lies_between_start_and_end(digits: ImageStore) -> None:
    first, state = fresh(digits).net.map_layer0.weight, trained(digits, 20)
    last, average = state.net.map_layer0.weight, state.ema.model.map_layer0.weight
    assert 0 < (average - last).norm() < (first - last).norm()
    without = fresh(digits, ema_decay=0.0)
    train_generator(without, digits, steps=2, **SETTINGS)
    assert torch.equal(without.net.map_layer0.weight, without.ema.model.map_layer0.weight)


@pytest.mark.parametrize(("steps", "expected"), [(1, 1e-3), (2, 2e-3), (4, 4e-3), (6, 4e-3)])
def test_the_learning_rate_rises_linearly_then_stays(digits: ImageStore, steps: int, expected: float) -> None:
    assert trained(digits, steps).optimizer.param_groups[0]["lr"] == pytest.approx(expected)


def test_a_loss_that_is_not_finite_names_its_step_and_what_to_change(digits: ImageStore) -> None:
    with pytest.raises(InputError, match=r"the loss of step [2-5] is (nan|inf); lower generator.training.lr \(now 1e\+30\)"):
        trained(digits, 5, lr=1e30, warmup_steps=0)


def test_the_curve_has_some_hundred_points_that_average_all_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(tmp_path / "train", np.zeros((4, 8, 8, 1), np.uint8))
    monkeypatch.setattr(training, "CURVE_POINTS", 3)
    calls: list[tuple[int, int, dict[str, float]]] = []
    fine = trained(store, 3)
    state = trained(store, 7, progress=lambda *call: calls.append(call))
    assert [step for step, _ in state.curve] == [3, 6, 7]
    assert state.curve[0][1] == pytest.approx(np.mean([loss for _, loss in fine.curve]))
    assert calls == [(32 * step, 32 * 7, {"loss": loss}) for step, loss in state.curve]


def test_a_step_draws_images_with_their_labels_noise_levels_and_flips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.zeros((6, 8, 8, 1), np.uint8)
    images[:, :, 4:] = 255  # dark left half
    images[1::2, 0] = 51  # top row of class b: -0.6
    store = store_of(tmp_path / "train", images)
    drawn: list[tuple[Tensor, ...]] = []

    def loss(
        net: torch.nn.Module, clean: Tensor, noise: Tensor, sigma: Tensor, labels: Tensor, *_: float, dropping: bool
    ) -> Tensor:
        assert dropping
        drawn.append((clean, noise, sigma, labels))
        return next(net.parameters()).sum().expand(len(clean))

    monkeypatch.setattr(training, "denoising_loss", loss)
    trained(store, 2, batch_size=4000, flip=True)
    trained(store, 1, batch_size=4000)
    clean, noise, sigma, labels = drawn[0]
    assert clean.shape == noise.shape == (4000, 1, 8, 8)
    torch.testing.assert_close(clean[:, 0, 0, 0] == clean.new_tensor(-0.6), labels == 1)
    flipped = clean[:, 0, 5, 0] == 1
    assert flipped.float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert (clean[flipped][:, 0, 5, 7] == -1).all()
    assert labels.float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert sigma.log().mean().item() == pytest.approx(-1.2, abs=0.08)
    assert sigma.log().std().item() == pytest.approx(1.2, abs=0.06)
    assert noise.std().item() == pytest.approx(1, abs=0.01)
    independent = torch.corrcoef(torch.stack([flipped.float(), labels.float(), sigma.log(), noise[:, 0, 0, 0]]))
    torch.testing.assert_close(independent, torch.eye(4), atol=0.07, rtol=0)
    assert not torch.equal(drawn[1][2], sigma)
    assert (drawn[2][0][:, 0, 5, 7] == 1).all()
