"""FGSM and PGD against the exact worst case of a linear model, and against each other where they must differ."""

from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.balls import BALLS
from pipeline.reference_attacks import ReferenceAttack, reference_attack, reference_outcomes, uniform_starts
from pipeline.threat import NormName, ThreatParams

ATTACKS: tuple[ReferenceAttack, ...] = get_args(ReferenceAttack)
ROWS = np.arange(200)


class Linear(nn.Module):
    """Two classes, logits 0 and scale (w . x - b), the boundary in the middle of the images."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.w = torch.randn(12, generator=torch.Generator().manual_seed(1))
        self.b = self.w.sum() / 2
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        value = self.scale * (x.flatten(1) @ self.w - self.b)
        return torch.stack([torch.zeros_like(value), value], dim=1)


def images() -> Tensor:
    """Far enough from 0 and 1 that the box does not bind."""
    return 0.3 + 0.4 * torch.rand(len(ROWS), 3, 2, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("norm", "eps_255", "dual"), [("linf", 10.0, 1), ("l2", 30.0, 2)])
@pytest.mark.parametrize("attack", ATTACKS)
def test_every_attack_breaks_exactly_what_can_be_broken_of_a_linear_model(
    norm: NormName, eps_255: float, dual: int, attack: ReferenceAttack
) -> None:
    model, x, threat = Linear(), images(), ThreatParams(norm=norm, eps_255=eps_255)
    signed = x.flatten(1) @ model.w - model.b
    y = (signed > 0).long()
    y[:20] = 1 - y[:20]  # wrong before any attack
    expected = (signed.abs() > threat.eps * model.w.norm(p=dual)).numpy() & (np.arange(len(x)) >= 20)
    found = reference_outcomes(model, x, y, [attack], rows=ROWS, threat=threat, seed=0)[attack]
    assert np.array_equal(found, expected)
    assert 20 < expected.sum() < 160


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_adversarial_images_stay_in_the_ball_and_in_the_box(norm: NormName, attack: ReferenceAttack) -> None:
    x = torch.rand(30, 3, 2, 2, generator=torch.Generator().manual_seed(2)).round(decimals=1)  # some on the edge
    threat, y = ThreatParams(norm=norm, eps_255=40.0), torch.zeros(30, dtype=torch.int64)
    start = uniform_starts(x, np.arange(30), BALLS[norm], 0)
    x_adv = reference_attack(Linear(), x, y, attack, threat, start)
    assert 0 <= float(x_adv.min()) <= float(x_adv.max()) <= 1
    assert float(BALLS[norm].norm(x_adv - x).max()) <= threat.eps * (1 + 1e-5)


def test_saturated_logits_stop_the_cross_entropy_and_not_the_logit_margin() -> None:
    model, x, threat = Linear(scale=1e5), images(), ThreatParams(norm="linf", eps_255=80.0)
    y = (x.flatten(1) @ model.w > model.b).long()
    found = reference_outcomes(model, x, y, ["pgd-20-ce", "pgd-20-cw"], rows=ROWS, threat=threat, seed=0)
    assert found["pgd-20-cw"].mean() < 0.1 < 0.3 < found["pgd-20-ce"].mean()


def test_neither_shards_nor_batches_change_an_outcome_and_the_seed_changes_the_start() -> None:
    model, x, threat = Linear(), images(), ThreatParams(norm="linf", eps_255=10.0)
    y = (x.flatten(1) @ model.w > model.b).long()
    whole = reference_outcomes(model, x, y, ATTACKS, rows=ROWS, threat=threat, seed=3)
    parts = [
        reference_outcomes(model, x[part], y[part], ATTACKS, rows=ROWS[part], threat=threat, seed=3)
        for part in (slice(0, 90), slice(90, 200))
    ]
    for attack in ATTACKS:
        assert np.array_equal(whole[attack], np.concatenate([part[attack] for part in parts]))
    ball = BALLS["linf"]
    starts = uniform_starts(x, ROWS, ball, 3)
    assert torch.equal(starts[90:], uniform_starts(x[90:], ROWS[90:], ball, 3))
    assert not torch.equal(starts, uniform_starts(x, ROWS, ball, 4))
    assert 0.95 < float(starts.abs().max()) <= 1


def test_no_attack_asked_for_is_no_work_and_no_column() -> None:
    x = images()
    labels = torch.zeros(200, dtype=torch.int64)
    threat = ThreatParams(norm="l2", eps_255=1.0)
    assert reference_outcomes(Linear(), x, labels, [], rows=ROWS, threat=threat, seed=0) == {}
