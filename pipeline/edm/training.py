"""Training of an EDM denoiser (Karras et al. 2022, arXiv:2206.00364, section 5 and table 7)."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from pipeline.checkpoints import Checkpoint, restore_optimizer
from pipeline.edm.network import UNet
from pipeline.edm.preconditioning import Network, denoising_loss
from pipeline.ema import EMA
from pipeline.images import Images, ImageStore
from pipeline.params import InputError, Section
from pipeline.randomness import global_stream, numpy_stream, torch_stream
from pipeline.ranks import average_gradients, mean_over_ranks, my_part, rank, world_size

CURVE_POINTS = 200
Progress = Callable[[int, int, dict[str, float]], None]  # (images seen, images in all, figures)


class GeneratorTrainingParams(Section):
    """Adam with a linear warm-up. The paper's CIFAR-10: 390,000 steps of 512, warm-up 20,000 steps, EMA decay 0.9993. `bf16`
    computes the network in bfloat16; weights, their updates and the loss stay float32. `compile` is torch.compile: a minute to
    begin with, then faster on a GPU, and rounded in another way."""

    steps: PositiveInt
    batch_size: PositiveInt
    lr: PositiveFloat = 1e-3
    warmup_steps: NonNegativeInt
    ema_decay: float = Field(ge=0, lt=1)
    p_mean: float = -1.2
    p_std: NonNegativeFloat = 1.2
    flip: bool
    bf16: bool = False
    compile: bool = False
    seed: NonNegativeInt


@dataclass
class TrainingState:
    """What a run is between two steps. `curve` holds (steps done, mean loss since the point before)."""

    net: UNet
    ema: EMA[UNet]
    optimizer: torch.optim.Optimizer
    step: int = 0
    curve: list[tuple[int, float]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)

    def saved(self) -> dict[str, Any]:
        """All of it, for a checkpoint."""
        states = {"net": self.net.state_dict(), "ema": self.ema.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return states | {"step": self.step, "curve": self.curve, "losses": self.losses}

    def restore(self, saved: dict[str, Any]) -> None:
        """Become what `saved` was."""
        self.net.load_state_dict(saved["net"])
        self.ema.model.load_state_dict(saved["ema"])
        restore_optimizer(self.optimizer, saved["optimizer"])
        device = next(self.net.parameters()).device
        self.step, self.losses = saved["step"], [loss.to(device) for loss in saved["losses"]]
        self.curve = [(int(step), float(loss)) for step, loss in saved["curve"]]


def start(net: UNet, ema_decay: float) -> TrainingState:
    """The state before the first step; net is on its device already."""
    net = net.to(memory_format=torch.channels_last)
    return TrainingState(net, EMA(net, ema_decay), torch.optim.Adam(net.parameters(), fused=True))


def train_generator(
    state: TrainingState,
    store: ImageStore,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    warmup_steps: int,
    p_mean: float,
    p_std: float,
    flip: bool,
    seed: int,
    sigma_data: float,
    bf16: bool = False,
    compile: bool = False,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> None:
    """Advance state in place to `steps` steps on the images of store: eq. 8 with ln sigma ~ N(p_mean, p_std^2).

    What a step draws depends on (seed, step) alone, so a run that goes on from checkpoint repeats the one that was never
    stopped, and several ranks that share each batch compute what one would, but for dropout.

    Raises:
        InputError: the loss is no longer a finite number.
    """
    net, device = state.net, next(state.net.parameters()).device
    network: Network = torch.compile(net) if compile else net
    every = math.ceil(steps / CURVE_POINTS)
    part = my_part(batch_size)
    mine = torch.from_numpy(part).to(device)
    if checkpoint and (saved := checkpoint.load()):
        state.restore(saved)
    while state.step < steps:
        rng = torch_stream(seed, state.step, "augmentation", device)
        rows = numpy_stream(seed, state.step, "real_order").integers(len(store), size=batch_size)[part]
        clean = from_uint8(store.batch(rows), device)
        labels = torch.from_numpy(store.labels[rows]).to(device)
        if flip:
            mirrored = (torch.rand(batch_size, 1, 1, 1, generator=rng, device=device) < 0.5)[mine]
            clean = torch.where(mirrored, clean.flip(3), clean)
        sigma = (p_mean + p_std * torch.randn(batch_size, generator=rng, device=device)).exp()[mine]
        noise = clean.new_empty((batch_size, *clean.shape[1:])).normal_(generator=rng)[mine]
        noise = noise.contiguous(memory_format=torch.channels_last)
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
        with autocast, global_stream(seed, state.step * world_size() + rank(), "dropout", device):
            loss = denoising_loss(network, clean, noise, sigma, labels, sigma_data, dropping=True).mean()

        for group in state.optimizer.param_groups:
            group["lr"] = lr * min((state.step + 1) / max(warmup_steps, 1), 1)
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(net.parameters())
        state.optimizer.step()
        state.ema.update(net, state.step)
        state.step += 1

        state.losses.append(mean_over_ranks(loss.detach()))
        if state.step % every == 0 or state.step == steps:
            state.curve.append((state.step, mean_loss(state.losses, state.step, lr)))
            state.losses = []
            if progress is not None:
                progress(state.step * batch_size, steps * batch_size, {"loss": state.curve[-1][1]})
        if checkpoint and rank() == 0 and checkpoint.due() and state.step < steps:
            checkpoint.save(state.saved())


def from_uint8(images: Images, device: torch.device) -> Tensor:
    """Images (B, H, W, C) uint8 -> (B, C, H, W) in [-1, 1], channels last in memory."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def mean_loss(losses: list[Tensor], step: int, lr: float) -> float:
    """Mean of the losses () of the steps up to step; one look at the device for all of them.

    Raises:
        InputError: one of them is not finite.
    """
    values = torch.stack(losses).double()
    finite = values.isfinite()
    if not finite.all():
        first = step - len(losses) + 1 + int((~finite).int().argmax())
        raise InputError(
            f"generator.training: the loss of step {first} is {values[~finite][0].item()}; "
            f"lower generator.training.lr (now {lr:g}) or raise generator.training.warmup_steps"
        )
    return values.mean().item()
