import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.attacks import PGDParams
from pipeline.batches import AugmentationParams, Batch, full_pool
from pipeline.ema import EMA
from pipeline.images import ImageStore
from pipeline.models import build_network
from pipeline.params import InputError
from pipeline.threat import BALLS, ThreatParams
from pipeline.training import TrainingParams, TrainingResult, attack_batch, batch_loss, frozen_statistics, make_optimizer, train
from tests.conftest import TINY, untrained

THREAT = ThreatParams(norm="linf", eps_255=24)
CPU = torch.device("cpu")


def recipe(**fields: Any) -> TrainingParams:
    attack = PGDParams(num_steps=2, step_size_255=12)
    augmentation = AugmentationParams(crop_padding=1, flip=False)
    values: dict[str, Any] = {
        "loss": "trades", "attack": attack, "epochs": 2, "batch_size": 64, "synthetic_fraction": 0.5, "lr": 0.1,
        "augmentation": augmentation, "holdout": 60, "select_every": 1, "selection_attack": attack,
    }  # fmt: skip
    return TrainingParams.model_validate(values | fields)


def run(stores: dict[str, ImageStore], params: TrainingParams, seed: int = 0, kept: float = 1.0) -> TrainingResult:
    pools = {source: full_pool(store, THREAT.eps) for source, store in stores.items()}
    net = build_network(TINY, (8, 8, 1), 10, seed)
    return train(
        net, pools, params, threat=THREAT, fraction_kept=kept, seed=seed, device=CPU, progress=lambda step, of, figures: None
    )


def weights(result: TrainingResult) -> list[torch.Tensor]:
    return list(result.last.state_dict().values())


def batch(eps: list[float]) -> Batch:
    x = torch.rand(len(eps), 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return Batch(x, torch.arange(len(eps)) % 10, torch.tensor(eps))


@pytest.mark.parametrize("loss", ["trades", "pgd_at", "mart"])
def test_each_sample_is_attacked_in_its_own_ball_and_eps_0_gives_exactly_x(loss: str) -> None:
    model = untrained().train()
    given = batch([0.0, 0.02, 0.1, 0.0, 0.05])
    start = torch.Generator().manual_seed(0)
    x_adv = attack_batch(model, given, recipe(loss=loss), ball=BALLS["linf"], threat_eps=0.1, start=start)
    moved = BALLS["linf"].norm(x_adv - given.x)
    assert torch.equal(x_adv[[0, 3]], given.x[[0, 3]])
    assert bool((moved <= given.eps + 1e-7).all())
    assert bool((moved[given.eps > 0] > 0.9 * given.eps[given.eps > 0]).all())


def test_rows_of_radius_0_cost_no_attack_step() -> None:
    seen: list[int] = []
    model = untrained().train()
    model.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    start = torch.Generator().manual_seed(0)
    attack_batch(model, batch([0.0, 0.1, 0.0]), recipe(), ball=BALLS["linf"], threat_eps=0.1, start=start)
    assert seen == [1, 1, 1]  # the clean prediction and two steps, for one row
    attack_batch(model, batch([0.0, 0.0]), recipe(), ball=BALLS["linf"], threat_eps=0.1, start=start)
    assert seen == [1, 1, 1]


@pytest.mark.parametrize("mode", ["batch", "running"])
def test_an_attack_moves_no_statistics_and_restores_every_mode(mode: Any) -> None:
    model = untrained().train()
    before = copy.deepcopy(model.state_dict())
    x = torch.rand(8, 1, 8, 8)
    with frozen_statistics(model, mode):
        inside = model(x)
        other = model(torch.cat([x, 1 - x]))[:8]
    assert torch.allclose(inside, other) == (mode == "running")  # batch statistics couple the samples
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    model(x)
    assert not torch.equal(model.state_dict()["net.norm.running_mean"], before["net.norm.running_mean"])


def test_the_trades_loss_of_a_batch_of_radius_0_is_the_cross_entropy() -> None:
    model = untrained().eval()
    given = batch([0.0] * 6)
    start = torch.Generator().manual_seed(0)
    loss = batch_loss(model, given, recipe(label_smoothing=0.1), ball=BALLS["l2"], threat_eps=0.1, start=start)
    expected = nn.functional.cross_entropy(model(given.x), given.y, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)


def test_ema_equals_its_closed_form_and_keeps_statistics_of_its_own() -> None:
    linear = nn.Linear(1, 1, bias=False)
    model = nn.Sequential(linear, nn.BatchNorm1d(1))
    ema = EMA(model, decay=0.9)
    expected = linear.weight.item()
    for step in range(30):
        with torch.no_grad():
            linear.weight.fill_(float(step))
        model.train()(torch.full((4, 1), 3.0) + torch.arange(4)[:, None])
        ema.update(model, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert ema.model.get_parameter("0.weight").item() == pytest.approx(expected, rel=1e-5)
    own, theirs = (m.get_buffer("1.running_mean") for m in (ema.model, model))
    assert own.data_ptr() != theirs.data_ptr()
    assert not torch.equal(own, theirs)


def test_weight_decay_spares_batchnorm_and_biases() -> None:
    model = untrained()
    decayed, plain = make_optimizer(model, recipe()).param_groups
    assert [group["weight_decay"] for group in (decayed, plain)] == [5e-4, 0]
    assert {p.ndim for p in decayed["params"]} == {2, 4}
    assert {p.ndim for p in plain["params"]} == {1}
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(stores: dict[str, ImageStore]) -> None:
    first, again, other = run(stores, recipe()), run(stores, recipe()), run(stores, recipe(), seed=1)
    assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(again), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights(first), weights(other), strict=True))
    assert first.history == again.history


def test_a_scaled_budget_takes_the_share_of_steps_that_is_kept(stores: dict[str, ImageStore]) -> None:
    # (400 - 60) / 64 images make 6 steps an epoch.
    assert run(stores, recipe()).cost["steps"] == 12
    assert run(stores, recipe(budget="scaled"), kept=0.5).cost["steps"] == 6
    cost = run(stores, recipe(budget="fixed"), kept=0.5).cost
    assert cost == {"steps": 12, "images_seen": 768, "images_attacked": 768}


def test_training_on_digits_learns_to_be_accurate_and_robust(stores: dict[str, ImageStore]) -> None:
    result = run(stores, recipe(epochs=30, select_every=10, lr=0.2))
    last = result.history[-1]
    assert last["clean_accuracy"] > 0.8
    assert last["robust_accuracy"] > 0.3
    assert last["loss"] < result.history[0]["loss"]
    assert max(row["robust_accuracy"] for row in result.history) >= last["robust_accuracy"]
    assert last["lr"] < 1e-3


def test_a_loss_that_turns_nan_stops_with_the_step_and_what_to_change(stores: dict[str, ImageStore]) -> None:
    with pytest.raises(InputError, match=r"the loss is nan before step \d+; lower training.lr"):
        run(stores, recipe(lr=1e20, epochs=3))


def test_normalisation_comes_from_the_images(stores: dict[str, ImageStore]) -> None:
    model = run(stores, recipe(epochs=1)).best
    pixels = stores["real"].batch(np.arange(400)) / 255
    assert model.mean.item() == pytest.approx(pixels.mean(), abs=0.03)
    assert model.std.item() == pytest.approx(pixels.std(), abs=0.03)
