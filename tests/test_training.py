import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from pipeline.attacks import PGDParams, pgd
from pipeline.balls import BALLS
from pipeline.checkpoints import Checkpoint
from pipeline.csv_tables import read_csv
from pipeline.ema import EMA
from pipeline.execution.live import live_table
from pipeline.images import ImageStore
from pipeline.losses import kl_divergence
from pipeline.models import build_network
from pipeline.params import InputError
from pipeline.threat import ThreatParams
from pipeline.training import TrainingParams, TrainingResult, train
from pipeline.training.augmentation import AugmentationParams
from pipeline.training.batch import Batch
from pipeline.training.batchnorm import AttackNorms, first_statistics
from pipeline.training.heldout import Selector
from pipeline.training.loop import micro_batches
from pipeline.training.objective import batch_loss
from pipeline.training.optimisation import make_optimizer, make_schedule
from pipeline.training.pools import full_pool
from pipeline.training.state import CURVE
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


def run(
    stores: dict[str, ImageStore],
    params: TrainingParams,
    seed: int = 0,
    share: float = 1.0,
    checkpoint: Checkpoint | None = None,
    norm: bool = True,
) -> TrainingResult:
    pools = {source: full_pool(store, THREAT.eps) for source, store in stores.items()}
    net = build_network(TINY, (8, 8, 1), 10, seed) if norm else plain_network(seed)
    return train(
        net, pools, params, threat=THREAT, steps_share=share, seed=seed, device=CPU, progress=lambda step, of, figures: None,
        checkpoint=checkpoint,
    )  # fmt: skip


def plain_network(seed: int) -> nn.Module:
    """A network without BatchNorm."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 8, 3), nn.SiLU(), nn.Flatten(), nn.Linear(8 * 36, 10))


def weights(result: TrainingResult) -> list[torch.Tensor]:
    return list(result.last.state_dict().values())


def batch(eps: list[float]) -> Batch:
    x = torch.rand(len(eps), 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return Batch(x, torch.arange(len(eps)) % 10, torch.tensor(eps))


def noise(given: Batch) -> torch.Tensor:
    return BALLS["linf"].uniform(given.x, torch.Generator().manual_seed(0))


def attack(model: nn.Module, given: Batch, params: TrainingParams, seen: list[torch.Tensor] | None = None) -> torch.Tensor:
    """The adversarial examples that the loss of a batch is of: the last images that the model is called with."""
    seen = [] if seen is None else seen
    hook = model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    batch_loss(model, given, params, ball=BALLS["linf"], threat_eps=0.1, start=noise(given))
    hook.remove()
    return seen[-1]


@pytest.mark.parametrize("mode", ["batch", "clean", "running"])
@pytest.mark.parametrize("loss", ["trades", "pgd_at", "mart"])
def test_each_sample_is_attacked_in_its_own_ball_and_eps_0_gives_exactly_x(loss: str, mode: str) -> None:
    given = batch([0.0, 0.02, 0.1, 0.0, 0.05])
    x_adv = attack(untrained().train(), given, recipe(loss=loss, attack_batchnorm=mode))
    moved = BALLS["linf"].norm(x_adv - given.x)
    assert torch.equal(x_adv[[0, 3]], given.x[[0, 3]])
    assert bool((moved <= given.eps + 1e-7).all())
    assert bool((moved[given.eps > 0] > 0.9 * given.eps[given.eps > 0]).all())


@pytest.mark.parametrize("loss", ["trades", "pgd_at"])
def test_rows_of_radius_0_cost_no_attack_step(loss: str) -> None:
    for eps, sizes in (([0.0, 0.1, 0.0], [3, 1, 1, 3]), ([0.1, 0.1], [2, 2, 2, 2]), ([0.0, 0.0], [2, 2])):
        seen: list[torch.Tensor] = []
        attack(untrained().train(), batch(eps), recipe(loss=loss), seen)
        # Once clean, two steps, once adversarial; PGD-AT has no use for a clean pass but where it gives statistics.
        idle = loss == "pgd_at" and eps == [0.1, 0.1]
        assert [len(x) for x in seen] == (sizes[1:] if idle else sizes)


@pytest.mark.parametrize("mode", ["batch", "clean", "running"])
@pytest.mark.parametrize("attacked", [[True, False, True, True], [True] * 4])
def test_an_attack_moves_no_statistics_and_restores_every_module(mode: Any, attacked: list[bool]) -> None:
    model = untrained().train()
    x = torch.rand(4, 1, 8, 8)
    rest = (~torch.tensor(attacked)).nonzero().squeeze(1)
    norms = AttackNorms(model, mode, rest, some_rest=len(rest) > 0)
    with norms.noting():
        model(x)
    before = copy.deepcopy(model.state_dict())
    chosen = x[torch.tensor(attacked)]
    with norms.frozen():
        inside, other = model(chosen), model(torch.cat([chosen, 1 - chosen]))[: len(chosen)]
    assert torch.allclose(inside, other, atol=1e-6) == (mode != "batch")  # statistics of the attacked couple the samples
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model(x)
    assert not torch.equal(model.state_dict()["net.norm.running_mean"], before["net.norm.running_mean"])
    assert not any("forward" in vars(module) for module in model.modules())


def recipe_attack(model: nn.Module, given: Batch, params: TrainingParams) -> torch.Tensor:
    """The attack of the published step: all images, BatchNorm by the batch, radius 0 where a row has it."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
    with torch.no_grad():
        reference = model(given.x)
    x_adv = pgd(
        lambda z: kl_divergence(model(z), reference), given.x, ball=BALLS["linf"], eps=given.eps, start=noise(given),
        step_size=given.eps * params.attack.step_size_255 / 255 / 0.1, num_steps=params.attack.num_steps,
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = True
    return x_adv


def strength(model: nn.Module, given: Batch, x_adv: torch.Tensor) -> float:
    """Mean KL over the attacked rows, in the network that is trained."""
    with torch.no_grad():
        return kl_divergence(model(x_adv), model(given.x))[given.eps > 0].mean().item()


def test_where_all_rows_are_attacked_the_attack_is_that_of_the_recipe_to_the_last_bit() -> None:
    given = batch([0.1, 0.05, 0.1, 0.02])
    assert torch.equal(attack(untrained().train(), given, recipe()), recipe_attack(untrained().train(), given, recipe()))


@pytest.mark.parametrize("mode", ["batch", "clean"])
def test_few_attacked_rows_are_attacked_as_strongly_as_in_the_whole_batch(mode: str) -> None:
    given = batch([0.1] * 3 + [0.0] * 61)
    params = recipe(attack=PGDParams(num_steps=8, step_size_255=8), attack_batchnorm=mode)
    model = untrained().train()
    whole = strength(model, given, recipe_attack(model, given, params))
    ours = strength(model, given, attack(model, given, params))
    few = Batch(given.x[:3], given.y[:3], given.eps[:3])
    alone = strength(model, given, torch.cat([recipe_attack(model, few, params), given.x[3:]]))
    assert ours > 0.95 * whole
    assert alone < 0.9 * whole  # normalised by the attacked rows alone it is weaker


@pytest.mark.parametrize("loss", ["trades", "pgd_at"])
def test_mixed_images_are_attacked_against_their_mixed_labels(loss: str) -> None:
    given = batch([0.1, 0.1, 0.0, 0.05])
    one_hot = nn.functional.one_hot(given.y, 10).float()
    soft = Batch(given.x, 0.75 * one_hot + 0.25 * one_hot.flip(0), given.eps)
    model = untrained().train()
    x_adv = attack(model, soft, recipe(loss=loss, attack_batchnorm="running"))
    model.eval()
    with torch.no_grad():
        clean, adversarial = (nn.functional.cross_entropy(model(x), soft.y, reduction="none") for x in (soft.x, x_adv))
    assert bool((adversarial[[0, 1, 3]] > clean[[0, 1, 3]]).all())
    with pytest.raises(ValidationError, match="cutmix: wanted false with the loss mart"):
        recipe(loss="mart", augmentation=AugmentationParams(crop_padding=0, flip=False, cutmix=True).model_dump())
    with pytest.raises(ValidationError, match="label_smoothing: wanted 0 with the loss mart"):
        recipe(loss="mart", label_smoothing=0.1)


@pytest.mark.parametrize("loss", ["standard", "trades", "pgd_at", "mart"])
def test_bf16_gives_nearly_the_loss_and_the_gradient_of_float32(loss: str) -> None:
    given = batch([0.0] * 3 + [0.02] * 9)
    found = []
    for precision in ("float32", "bf16"):
        model = untrained().train()
        value = batch_loss(
            model, given, recipe(loss=loss, precision=precision), ball=BALLS["linf"], threat_eps=0.1, start=noise(given)
        )  # fmt: skip
        value.backward()
        assert value.dtype == torch.float32
        found.append((value.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    (exact, gradient), (rough, other) = found
    assert rough == pytest.approx(exact, rel=0.02)
    assert len(gradient) == len(other)
    assert torch.cosine_similarity(gradient, other, dim=0) > 0.97


@pytest.mark.parametrize("mode", ["batch", "clean", "running"])
@pytest.mark.parametrize("loss", ["standard", "trades", "pgd_at", "mart"])
@pytest.mark.parametrize("eps", [[0.1, 0.1, 0.1], [0.1, 0.0, 0.05], [0.0, 0.0, 0.0]])
def test_a_step_never_waits_for_a_value_from_the_device(
    loss: str, mode: str, eps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tensors on "meta" have no values: whatever asks for one, as a mask that picks rows does, raises an error.
    monkeypatch.setattr("pipeline.training.objective.in_precision", lambda model, *_: model)
    given, model = batch(eps), untrained().train().to("meta")
    on_device = Batch(given.x.to("meta"), given.y.to("meta"), given.eps)
    start = torch.empty_like(on_device.x)
    params = recipe(loss=loss, attack_batchnorm=mode)
    batch_loss(model, on_device, params, ball=BALLS["linf"], threat_eps=0.1, start=start).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_trades_loss_of_a_batch_of_radius_0_is_the_cross_entropy() -> None:
    model = untrained().eval()
    given = batch([0.0] * 6)
    params = recipe(label_smoothing=0.1)
    loss = batch_loss(model, given, params, ball=BALLS["l2"], threat_eps=0.1, start=noise(given))
    expected = nn.functional.cross_entropy(model(given.x), given.y, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)


def test_ema_equals_its_closed_form_and_keeps_statistics_of_its_own() -> None:
    linear = nn.Linear(1, 1, bias=False)
    model = nn.Sequential(linear, nn.BatchNorm1d(1))
    ema = EMA(model, decay=0.9, warmup=4)
    expected = linear.weight.item()
    for step in range(30):
        with torch.no_grad():
            linear.weight.fill_(float(step))
        model.train()(torch.full((4, 1), 3.0) + torch.arange(4)[:, None])
        ema.update(model, step)
        decay = 0 if step < 4 else min(0.9, (step - 3) / (step + 6))
        expected = decay * expected + (1 - decay) * step
    assert ema.model.get_parameter("0.weight").item() == pytest.approx(expected, rel=1e-5)
    own, theirs = (m.get_buffer("1.running_mean") for m in (ema.model, model))
    assert own.data_ptr() != theirs.data_ptr()
    assert not torch.equal(own, theirs)


def test_weights_with_two_names_are_averaged_once() -> None:
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    ema = EMA(nn.Sequential(first, nn.SiLU(), second), decay=0.75)
    before = first.weight.detach().clone()
    with torch.no_grad():
        first.weight.add_(1)
    ema.update(nn.Sequential(first, nn.SiLU(), second), step=1000)
    averaged, again = (ema.model.state_dict()[f"{place}.weight"] for place in (0, 2))
    assert averaged.data_ptr() == again.data_ptr()
    torch.testing.assert_close(averaged, before + 0.25)


def test_weight_decay_spares_normalisation_layers_alone() -> None:
    model = untrained()
    decayed, plain = make_optimizer(model, recipe()).param_groups
    assert [group["weight_decay"] for group in (decayed, plain)] == [5e-4, 0]
    names = {parameter: name for name, parameter in model.named_parameters()}
    norms = {name for name in names.values() if "norm" in name}
    assert norms
    assert {names[parameter] for parameter in plain["params"]} == norms
    assert {names[parameter] for parameter in decayed["params"]} == set(names.values()) - norms


def test_one_cycle_follows_its_closed_form() -> None:
    params = recipe(lr=0.4, warmup_fraction=0.25)
    optimizer = make_optimizer(untrained(), params)
    schedule = make_schedule(optimizer, params, steps=39)
    found = []
    for _ in range(40):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(found) < 40:
            schedule.step()
    peak, low, end = 0.4, 0.4 / 25, 0.4 / 25 / 1e4
    top = 0.25 * 40 - 1  # the step at which the warm-up ends
    for step, lr in enumerate(found):
        share, first, last = (step / top, low, peak) if step <= top else ((step - top) / (39 - top), peak, end)
        assert lr == pytest.approx(last + (first - last) * (1 + np.cos(np.pi * share)) / 2, rel=1e-9)


def test_running_statistics_begin_as_those_of_the_first_batch() -> None:
    norm = nn.BatchNorm2d(1, momentum=0.25)
    x = torch.randn(5, 1, 3, 3, generator=torch.Generator().manual_seed(0)) * 3 + 7
    for step, image in enumerate((x, x + 1)):
        with first_statistics(nn.Sequential(norm), step):
            norm(image)
    assert norm.running_mean is not None
    assert norm.running_mean.item() == pytest.approx(x.mean().item() + 0.25, rel=1e-5)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(stores: dict[str, ImageStore]) -> None:
    first, again, other = run(stores, recipe()), run(stores, recipe()), run(stores, recipe(), seed=1)
    assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(again), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights(first), weights(other), strict=True))
    assert first.history == again.history


def test_a_share_of_the_steps(stores: dict[str, ImageStore]) -> None:
    # 400 / 64 images, those held out included, make 7 steps an epoch.
    assert run(stores, recipe()).cost["steps"] == 14
    cost = run(stores, recipe(), share=0.5).cost
    assert cost == {"steps": 7, "images_seen": 448, "images_attacked": 448}


def test_training_on_digits_learns_to_be_accurate_and_robust(stores: dict[str, ImageStore]) -> None:
    result = run(stores, recipe(epochs=30, select_every=10, lr=0.2))
    last = result.history[-1]
    assert 0.75 < last["clean_accuracy"] < 0.95  # of 60 images; 0.82 to 0.92 with seeds 0 to 3
    assert 0.38 < last["robust_accuracy"] < 0.6  # 0.45 to 0.50
    assert last["loss"] < result.history[0]["loss"]
    assert max(row["robust_accuracy"] for row in result.history) >= last["robust_accuracy"]
    assert last["lr"] < 1e-3


def test_a_loss_that_turns_nan_stops_at_once_with_the_step_and_keeps_the_last_good_checkpoint(
    stores: dict[str, ImageStore], tmp_path: Path
) -> None:
    checkpoint = Checkpoint(tmp_path / "state", every_s=0)
    with pytest.raises(InputError, match=r"at step (\d+) of 21; lower training.lr") as stopped:
        run(stores, recipe(lr=1e20, epochs=3), checkpoint=checkpoint)
    saved = checkpoint.load()
    assert saved is not None
    assert f"at step {saved['step']} of" in str(stopped.value) or f"at step {saved['step'] + 1} of" in str(stopped.value)
    assert all(bool(torch.isfinite(value).all()) for value in saved["model"].values())


def test_the_curve_has_a_row_for_every_step_and_the_history_is_its_means(stores: dict[str, ImageStore]) -> None:
    result = run(stores, recipe(warmup_fraction=0.25))
    assert [row["step"] for row in result.curve] == list(range(1, 15))
    for number, row in enumerate(result.history):
        part = result.curve[7 * number : 7 * number + 7]
        assert row["loss"] == pytest.approx(np.mean([step["loss"] for step in part]))
        assert row["mean_eps"] == pytest.approx(THREAT.eps)
    assert all(row["attacked"] == 64 for row in result.curve)


def test_the_live_table_of_a_training_shows_the_accuracy_after_every_selection(
    stores: dict[str, ImageStore], tmp_path: Path
) -> None:
    pools = {source: full_pool(store, THREAT.eps) for source, store in stores.items()}
    with live_table(tmp_path / "live.csv") as report:
        result = train(plain_network(0), pools, recipe(), threat=THREAT, seed=0, device=CPU, progress=report)
    rows = read_csv(tmp_path / "live.csv", ["images", "images_per_s", *CURVE[:3], "clean_accuracy", "robust_accuracy"])
    assert len(rows) == 14
    for number, row in enumerate(rows):
        assert float(row["loss"]) > 0
        for name in ("clean_accuracy", "robust_accuracy"):
            expected = "" if number < 6 else f"{result.history[number // 13][name]:.6g}"
            assert row[name] == expected


def test_micro_batches_split_a_batch_evenly_and_without_batchnorm_change_nothing(stores: dict[str, ImageStore]) -> None:
    part = np.arange(0, 12, 2)
    assert [piece.tolist() for piece in micro_batches(part, 4)] == [[0, 4, 8], [2, 6, 10]]
    assert [piece.tolist() for piece in micro_batches(part, None)] == [part.tolist()]
    params = recipe(epochs=1)
    whole, parts = (run(stores, params.model_copy(update={"micro_batch_size": size}), norm=False) for size in (None, 20))
    torch.testing.assert_close(weights(whole), weights(parts), rtol=1e-3, atol=1e-4)
    assert whole.cost == parts.cost


def test_a_batch_that_does_not_fit_in_memory_names_the_parameter_to_change(
    stores: dict[str, ImageStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr("pipeline.training.loop.batch_loss", full)
    with pytest.raises(InputError, match="training.micro_batch_size: 64 images at a time do not fit .* set it to 32"):
        run(stores, recipe())


class Noting(nn.Module):
    """A network that notes the images it is called with in eval mode."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            self.seen.append(x.detach())
        logits: torch.Tensor = self.net(x)
        return logits


@pytest.mark.parametrize("norm", BALLS)
def test_selection_in_pieces_counts_the_hits_of_one_batch(stores: dict[str, ImageStore], norm: Any) -> None:
    model = run(stores, recipe(epochs=8, lr=0.2, select_every=8)).last
    eps = THREAT.eps if norm == "linf" else 0.5
    attack = PGDParams(num_steps=3, step_size_255=eps * 100)
    found, starts = [], []
    for size in (100, 32, 1):
        noting = Noting(model).eval()
        found.append(Selector(stores["real"], np.arange(100), attack, BALLS[norm], eps, size, CPU).score(noting))
        assert max(map(len, noting.seen)) == size
        starts.append(torch.cat(noting.seen[::5]))  # of three steps, a clean and an attacked pass
    assert found == [found[0]] * 3
    assert torch.equal(starts[0], starts[1])
    assert torch.equal(starts[0], starts[2])
    clean, robust = found[0]
    assert 0.1 < robust < clean < 1  # neither is trivial
    assert (100 * clean, 100 * robust) == pytest.approx((round(100 * clean), round(100 * robust)))


@pytest.mark.parametrize("size", [None, 16])
def test_selection_never_takes_more_images_at_a_time_than_training(stores: dict[str, ImageStore], size: int | None) -> None:
    pools = {source: full_pool(store, THREAT.eps) for source, store in stores.items()}
    net = Noting(plain_network(0))
    result = train(
        net, pools, recipe(epochs=1, batch_size=20, micro_batch_size=size, holdout=60), threat=THREAT, seed=0, device=CPU,
        progress=lambda step, of, figures: None,
    )  # fmt: skip
    assert isinstance(result.last.net, Noting)
    seen = list(map(len, result.last.net.seen))
    assert max(seen) == (size or 20)
    assert sum(seen) == 60 * 4  # two attack steps, clean and attacked


def test_a_selection_that_does_not_fit_in_memory_names_the_parameter_to_change(
    stores: dict[str, ImageStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr("pipeline.training.heldout.pgd", full)
    with pytest.raises(InputError, match="training.micro_batch_size: 64 images at a time do not fit .* set it to 32"):
        run(stores, recipe())


def test_normalisation_comes_from_the_images(stores: dict[str, ImageStore]) -> None:
    model = run(stores, recipe(epochs=1)).best
    pixels = stores["real"].batch(np.arange(400)) / 255
    assert model.mean.item() == pytest.approx(pixels.mean(), abs=0.03)
    assert model.std.item() == pytest.approx(pixels.std(), abs=0.03)
