"""The loss of one batch: its adversarial examples, then the loss of the recipe on them."""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.attacks import pgd
from pipeline.balls import Ball
from pipeline.losses import cross_entropy, kl_divergence, mart, trades
from pipeline.ranks import any_rank
from pipeline.training.batch import Batch
from pipeline.training.batchnorm import AttackNorms, unmoved_statistics
from pipeline.training.recipe import TrainingParams

Forward = Callable[[Tensor], Tensor]  # images (B, C, H, W) -> logits (B, K)


def unit_noise(x: Tensor, ball: Ball, generator: torch.Generator, *, part: NDArray[np.int64], batch_size: int) -> Tensor:
    """Samples of the unit ball for images x (B, ...), the places part of a batch of batch_size."""
    noise = ball.uniform(x.new_empty((batch_size, *x.shape[1:])), generator)
    return noise if len(part) == batch_size else noise[torch.from_numpy(part).to(x.device, non_blocking=True)]


def batch_loss(
    model: nn.Module,
    batch: Batch,
    params: TrainingParams,
    *,
    ball: Ball,
    threat_eps: float,
    start: Tensor,
) -> Tensor:
    """Mean loss of one batch; samples of radius 0 take no attack steps and enter as their own adversarial example. start
    (B, C, H, W) are points of the unit ball, from which the attack begins."""
    smoothing = params.label_smoothing
    forward = in_precision(model, params.precision, batch.x.device)
    if params.loss == "standard":
        return cross_entropy(forward(batch.x), batch.y, label_smoothing=smoothing).mean()
    device = batch.x.device
    some_attacked, some_rest = any_rank([len(batch.attacked) > 0, len(batch.rest) > 0], device)
    norms = AttackNorms(model, params.attack_batchnorm, batch.rest.to(device, non_blocking=True), some_rest)

    def attacked(reference: Tensor | None = None) -> Tensor:
        if not some_attacked:
            return batch.x
        return attack_batch(
            forward, batch, params, norms, ball=ball, threat_eps=threat_eps, start=start, reference=reference
        )  # fmt: skip

    if params.loss == "pgd_at":
        if norms.wants_clean_pass:
            with torch.no_grad(), norms.noting(), unmoved_statistics(norms.norms):
                forward(batch.x)
        return cross_entropy(forward(attacked()), batch.y, label_smoothing=smoothing).mean()
    with norms.noting():
        clean_logits = forward(batch.x)  # of the loss; the attack needs the same
    # Against mixed labels the published code attacks the label, not the clean prediction.
    reference = clean_logits.detach() if params.loss == "trades" and batch.y.ndim == 1 else None
    adv_logits = forward(attacked(reference))
    if params.loss == "mart":
        return mart(clean_logits, adv_logits, batch.y, beta=params.beta).mean()
    return trades(clean_logits, adv_logits, batch.y, beta=params.beta, label_smoothing=smoothing).mean()


def in_precision(model: nn.Module, precision: Literal["float32", "bf16"], device: torch.device) -> Forward:
    """The model, whose logits are float32 whatever it computes in."""

    def forward(x: Tensor) -> Tensor:
        # A context for each call: autocast keeps the weights that it casts, also those it cast where no gradient is wanted.
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits: Tensor = model(x)
        return logits.float() if precision == "bf16" else logits

    return forward


def attack_batch(
    forward: Forward,
    batch: Batch,
    params: TrainingParams,
    norms: AttackNorms,
    *,
    ball: Ball,
    threat_eps: float,
    start: Tensor,
    reference: Tensor | None = None,
) -> Tensor:
    """Adversarial examples (B, C, H, W): of the KL to the reference logits (B, K) where there are any (TRADES), else of the
    cross-entropy. The step of a sample is scaled by eps_i / eps."""
    device = batch.x.device
    x, y, eps = batch.x, batch.y, batch.eps.to(device, non_blocking=True)
    chosen = batch.attacked.to(device, non_blocking=True) if len(batch.rest) else None
    if chosen is not None:
        x, y, eps, start = (part[chosen] for part in (x, y, eps, start))
        reference = None if reference is None else reference[chosen]

    def loss(z: Tensor) -> Tensor:
        return cross_entropy(forward(z), y) if reference is None else kl_divergence(forward(z), reference)

    step_size = eps * (params.attack.step_size_255 / 255 / threat_eps)
    with norms.frozen():
        if reference is not None and norms.mode == "running":
            with torch.no_grad():
                reference = forward(x)  # what the same network says of the clean image
        x_adv = pgd(
            loss, x, ball=ball, eps=eps, step_size=step_size, num_steps=params.attack.num_steps, start=start, check=False
        )  # fmt: skip
    return x_adv if chosen is None else batch.x.index_copy(0, chosen, x_adv)
