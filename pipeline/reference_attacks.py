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
    batch_size: int,
) -> dict[str, NDArray[np.bool_]]:
    """Attack -> which of the images x (N, C, H, W), labels y (N,), are classified correctly without and under it. The
    start of a row is drawn from (seed, row) alone, rows (N,) being places in the test store: shards change nothing."""
    outcomes: dict[str, list[Tensor]] = {attack: [] for attack in attacks}
    for batch in torch.arange(len(x)).split(batch_size) if attacks else ():
        x_batch, y_batch = x[batch], y[batch]
        start = uniform_starts(x_batch, rows[batch.numpy()], BALLS[threat.norm], seed)
        for attack in attacks:
            x_adv = reference_attack(model, x_batch, y_batch, attack, threat, start)
            with torch.no_grad():
                correct = (model(x_batch).argmax(dim=1) == y_batch) & (model(x_adv).argmax(dim=1) == y_batch)
            outcomes[attack].append(correct.cpu())
    return {attack: torch.cat(parts).numpy() for attack, parts in outcomes.items()}


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
