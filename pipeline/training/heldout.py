"""Held-out real images: they select the best checkpoint and give the normalisation, and never enter training."""

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.attacks import PGDParams, pgd
from pipeline.balls import Ball
from pipeline.batches import to_tensor
from pipeline.images import ImageStore
from pipeline.losses import cw_margin
from pipeline.randomness import torch_stream
from pipeline.ranks import rank, sum_over_ranks, world_size
from pipeline.training.objective import unit_noise


class Selector:
    """Clean and PGD accuracy (CW loss) on the held-out images, the same attack every time. The ranks share the images, and
    each takes at most `at_once` of its own at a time."""

    def __init__(
        self, store: ImageStore, rows: np.ndarray, attack: PGDParams, ball: Ball, eps: float, at_once: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.part, self.count = np.arange(rank(), len(rows), world_size()), len(rows)
        self.x = to_tensor(store.batch(rows[self.part]), device)
        self.y = torch.from_numpy(store.labels[rows[self.part]]).to(device)
        self.attack, self.ball, self.eps, self.at_once = attack, ball, eps, at_once

    def score(self, model: nn.Module) -> tuple[float, float]:
        """(clean, robust) accuracy of a model in eval mode; all ranks must ask."""
        noise = torch_stream(0, 0, "selection", self.x.device)
        start = unit_noise(self.x, self.ball, noise, part=self.part, batch_size=self.count)
        hits = torch.zeros(2, dtype=torch.int64, device=self.x.device)
        for piece in zip(*(values.split(self.at_once) for values in (self.x, self.y, start)), strict=True):
            hits += self.hits(model, *piece)
        clean, robust = (sum_over_ranks(hits).double() / self.count).tolist()
        return clean, robust

    def hits(self, model: nn.Module, x: Tensor, y: Tensor, start: Tensor) -> Tensor:
        """How many of the images are classified as they should be, clean and attacked: (2,)."""
        eps = torch.full((len(x),), self.eps, device=x.device)
        step_size = torch.full_like(eps, self.attack.step_size_255 / 255)
        x_adv = pgd(
            lambda z: cw_margin(model(z), y),
            x, ball=self.ball, eps=eps, step_size=step_size, num_steps=self.attack.num_steps, start=start, check=False,
        )  # fmt: skip
        with torch.no_grad():
            return torch.stack([(model(z).argmax(dim=1) == y).sum() for z in (x, x_adv)])


def channel_statistics(store: ImageStore, rows: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of the given images, pixel range; a constant channel has std 1."""
    pixels = store.batch(rows).reshape(-1, store.shape[2]) / 255
    std = pixels.std(axis=0)
    return pixels.mean(axis=0).tolist(), np.where(std > 1e-3, std, 1.0).tolist()
