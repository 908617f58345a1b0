"""Held-out real images: they select the best checkpoint and give the normalisation, and never enter training."""

import numpy as np
import torch
from torch import nn

from pipeline.attacks import PGDParams, pgd
from pipeline.balls import Ball
from pipeline.batches import to_tensor
from pipeline.images import ImageStore
from pipeline.losses import cw_margin
from pipeline.randomness import torch_stream


class Selector:
    """Clean and PGD accuracy (CW loss) on the held-out images, the same attack every time."""

    def __init__(
        self, store: ImageStore, rows: np.ndarray, attack: PGDParams, ball: Ball, eps: float, device: torch.device
    ) -> None:
        self.x = to_tensor(store.batch(rows), device)
        self.y = torch.from_numpy(store.labels[rows]).to(device)
        self.attack, self.ball = attack, ball
        self.eps = torch.full((len(rows),), eps, device=device)

    def score(self, model: nn.Module) -> tuple[float, float]:
        """(clean, robust) accuracy of a model in eval mode."""
        start = self.ball.uniform(self.x, torch_stream(0, 0, "selection", self.x.device))
        step_size = torch.full_like(self.eps, self.attack.step_size_255 / 255)
        x_adv = pgd(
            lambda z: cw_margin(model(z), self.y),
            self.x, ball=self.ball, eps=self.eps, step_size=step_size, num_steps=self.attack.num_steps, start=start,
        )  # fmt: skip
        with torch.no_grad():
            clean, robust = ((model(z).argmax(dim=1) == self.y).float().mean().item() for z in (self.x, x_adv))
        return clean, robust


def channel_statistics(store: ImageStore, rows: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of the given images, pixel range; a constant channel has std 1."""
    pixels = store.batch(rows).reshape(-1, store.shape[2]) / 255
    std = pixels.std(axis=0)
    return pixels.mean(axis=0).tolist(), np.where(std > 1e-3, std, 1.0).tolist()
