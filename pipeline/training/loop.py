"""The loop: one batch after the other, until the budget is spent."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline.balls import BALLS
from pipeline.batchnorm import share_batchnorm
from pipeline.checkpoints import Checkpoint
from pipeline.models import Classifier
from pipeline.params import InputError
from pipeline.randomness import torch_stream
from pipeline.ranks import my_part, rank, world_size
from pipeline.threat import ThreatParams
from pipeline.training.batch import Plan
from pipeline.training.batchnorm import first_statistics
from pipeline.training.feed import Placement, feed, place_pools
from pipeline.training.heldout import Selector, channel_statistics
from pipeline.training.objective import batch_loss, unit_noise
from pipeline.training.pools import Pool, split_holdout
from pipeline.training.recipe import TrainingParams
from pipeline.training.state import TrainingResult, TrainingState

Progress = Callable[[int, int, dict[str, float]], None]  # images seen, of images, latest figures


def train(
    net: nn.Module,
    pools: dict[str, Pool],
    params: TrainingParams,
    *,
    threat: ThreatParams,
    steps_share: float = 1.0,
    seed: int,
    device: torch.device,
    progress: Progress,
    checkpoint: Checkpoint | None = None,
    placement: Placement = "auto",
) -> TrainingResult:
    """Train net on the pools of real and synthetic rows; a function of its arguments alone on one kind of device. Several
    ranks share each batch, and the first one's result counts. From checkpoint a stopped run goes on as if it never had.
    `placement` is where the images lie, which changes no number.

    Raises:
        InputError: the loss becomes NaN or infinite (the last good checkpoint stays), nothing is left to train on, the
            ranks cannot share a batch, or a micro-batch does not fit in memory.
    """
    store, ball = pools["real"].store, BALLS[threat.norm]
    real, held_out = split_holdout(pools["real"], params.holdout, params.holdout_seed)
    pools = {**pools, "real": real}
    mean, std = channel_statistics(store, held_out)
    model = Classifier(net, mean, std).to(device).to(memory_format=torch.channels_last).train()
    steps_per_epoch = math.ceil(len(store) / params.batch_size)
    steps = max(1, round(steps_per_epoch * params.epochs * steps_share))
    state = TrainingState(share_batchnorm(model), params, steps)
    if checkpoint and (saved := checkpoint.load()):
        state.restore(saved)
    selector = Selector(store, held_out, params.selection_attack, ball, threat.eps, at_once(params), device)
    parts = micro_batches(my_part(params.batch_size), params.micro_batch_size)
    plan = Plan(params.augmentation, params.batch_size, len(store.classes), seed)
    batches = feed(
        place_pools(pools, device, placement), plan, (len(pools["real"]), len(pools["synthetic"])), parts=parts,
        synthetic_fraction=params.synthetic_fraction, steps=range(state.step, steps), device=device,
    )  # fmt: skip
    for micro in batches:
        state.optimizer.zero_grad(set_to_none=True)
        mean_loss, mean_eps, attacked = torch.zeros((), device=device), 0.0, 0  # of the images of this rank
        with explained_memory(params), first_statistics(model, state.step):
            for part, batch in zip(parts, micro, strict=True):
                noise = torch_stream(seed, state.step, "attack", device)
                start = unit_noise(batch.x, ball, noise, part=part, batch_size=params.batch_size)
                loss = batch_loss(model, batch, params, ball=ball, threat_eps=threat.eps, start=start)
                share = len(part) / sum(map(len, parts))
                (loss * share).backward()
                mean_loss += loss.detach() * share
                mean_eps += batch.eps.mean().item() * share
                attacked += len(batch.attacked) if params.loss != "standard" else 0
            state.update(mean_loss, mean_eps, attacked)
        if state.step % (steps_per_epoch * params.select_every) == 0 or state.step == steps:
            with explained_memory(params):
                state.select(selector, state.step / steps_per_epoch)
        progress(state.step * params.batch_size, steps * params.batch_size, state.figures)
        if checkpoint and rank() == 0 and checkpoint.due() and state.step < steps:
            checkpoint.save(state.saved())
    return state.result(params.batch_size)


def micro_batches(part: NDArray[np.int64], size: int | None) -> list[NDArray[np.int64]]:
    """The places part of a batch in as few pieces of at most size as it takes, each with its share of real and synthetic
    images, which follow each other in a batch."""
    count = 1 if size is None else math.ceil(len(part) / size)
    return [part[first::count] for first in range(count)]


def at_once(params: TrainingParams) -> int:
    """How many images a rank computes with at a time at most."""
    return params.micro_batch_size or math.ceil(params.batch_size / world_size())


@contextmanager
def explained_memory(params: TrainingParams) -> Iterator[None]:
    """
    Raises:
        InputError: the device has not the memory for a step.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        size = at_once(params)
        raise InputError(
            f"training.micro_batch_size: {size} images at a time do not fit in the memory of the device; set it to "
            f"{max(1, size // 2)} (BatchNorm then sees that many at a time), or share the batch among more ranks"
        ) from error
