"""The attacks that papers report beside AutoAttack: FGSM and PGD, each run alone on what is classified correctly."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.attacks import Loss, pgd
from pipeline.balls import BALLS, Ball
from pipeline.losses import cross_entropy, cw_margin
from pipeline.randomness import torch_stream
from pipeline.threat import ThreatParams

ReferenceAttack = Literal["fgsm", "pgd-20-ce", "pgd-20-cw", "pgd-40-ce", "pgd-40-cw"]


def reference_outcomes(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attacks: Sequence[ReferenceAttack],
    *,
    rows: NDArray[np.int64],
    threat: ThreatParams,
    seed: int,
) -> dict[str, NDArray[np.bool_]]:
    """Attack -> which of the images x (B, C, H, W), labels y (B,), are classified correctly without and under it. The
    start of a row is drawn from (seed, row) alone, rows (B,) being places in the test store: batches change nothing."""
    if not attacks:
        return {}
    start = uniform_starts(x, rows, BALLS[threat.norm], seed)
    with torch.no_grad():
        clean = model(x).argmax(dim=1) == y
    outcomes: dict[str, NDArray[np.bool_]] = {}
    for attack in attacks:
        x_adv = reference_attack(model, x, y, attack, threat, start)
        with torch.no_grad():
            outcomes[attack] = (clean & (model(x_adv).argmax(dim=1) == y)).cpu().numpy()
    return outcomes


def reference_attack(
    model: nn.Module, x: Tensor, y: Tensor, attack: ReferenceAttack, threat: ThreatParams, start: Tensor
) -> Tensor:
    """Adversarial images (B, C, H, W). `fgsm` is one step of eps from x (Goodfellow et al., arXiv:1412.6572), "pgd-N-L"
    N steps of eps / 4 from the start (B, ...), a point of the unit ball, on the loss L: ce, or cw (arXiv:1608.04644)."""
    ball, eps = BALLS[threat.norm], torch.full((len(x),), threat.eps, device=x.device)
    if attack == "fgsm":
        return pgd(loss_of("ce", model, y), x, ball=ball, eps=eps, step_size=eps, num_steps=1)
    _, num_steps, loss = attack.split("-")
    return pgd(loss_of(loss, model, y), x, ball=ball, eps=eps, step_size=eps / 4, num_steps=int(num_steps), start=start)


def loss_of(name: str, model: nn.Module, y: Tensor) -> Loss:
    return (lambda z: cross_entropy(model(z), y)) if name == "ce" else (lambda z: cw_margin(model(z), y))


def uniform_starts(x: Tensor, rows: NDArray[np.int64], ball: Ball, seed: int) -> Tensor:
    """One point of the unit ball per row (B, ...), the same on every device."""
    cpu = torch.device("cpu")
    return torch.cat([ball.uniform(x[i : i + 1], torch_stream(seed, int(row), "reference", cpu)) for i, row in enumerate(rows)])
