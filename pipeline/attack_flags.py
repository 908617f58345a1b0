"""AutoAttack's checks of the model it attacks, row by row, so that they can be sharded; thresholds are the package's."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.losses import cw_margin

FLAGS = ("random_output", "probability_output", "zero_gradient")
NUM_CALLS = 5
RANDOM_OUTPUT = 1e-4  # distance of two outputs of unit length
PROBABILITY = 1e-5
SQUARE_GAIN = 0.002


def row_flags(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, NDArray[np.bool_]]:
    """Column -> (B,), for images x (B, C, H, W) with labels y (B,): does the output change from call to call, is it a
    probability distribution, is the gradient of the logit margin (which, unlike cross-entropy, cannot vanish by being
    right with certainty) zero."""
    with torch.no_grad():
        logits = torch.stack([model(x) for _ in range(NUM_CALLS)])
    z = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(cw_margin(model(z), y).sum(), z)
    found = (is_random(logits, y), is_probability(logits[0]), grad.flatten(1).abs().sum(dim=1) == 0)
    return {name: flag.cpu().numpy() for name, flag in zip(FLAGS, found, strict=True)}


def is_random(logits: Tensor, y: Tensor) -> Tensor:
    """(calls, B, K) -> (B,)."""
    unit = logits / (torch.linalg.vector_norm(logits, dim=2, keepdim=True) + 1e-10)
    correct = logits.argmax(dim=2) == y
    return (torch.linalg.vector_norm(unit - unit[:1], dim=2) > RANDOM_OUTPUT).any(dim=0) | (correct != correct[:1]).any(dim=0)


def is_probability(logits: Tensor) -> Tensor:
    """(B, K) -> (B,)."""
    low, high, total = logits.amin(dim=1), logits.amax(dim=1), logits.sum(dim=1)
    return (high < 1 + PROBABILITY) & (low > -PROBABILITY) & ((total - 1).abs() < PROBABILITY)


def summarise_flags(samples: pa.Table, correct: Mapping[str, float]) -> dict[str, Any]:
    """Of the whole evaluation: rows with random output, whether all outputs are probabilities, rows without gradient, and
    whether Square beat the attacks before it (None if it was not run after others); correct: accuracy after each attack."""
    columns = {name: samples[name].to_numpy() for name in FLAGS}
    return {
        "random_outputs": int(columns["random_output"].sum()),
        "probability_outputs": bool(columns["probability_output"].all()),
        "zero_gradients": int(columns["zero_gradient"].sum()),
        "square_stronger": square_is_stronger(correct),
    }


def square_is_stronger(correct: Mapping[str, float]) -> bool | None:
    others = [accuracy for attack, accuracy in correct.items() if attack != "square"]
    return correct["square"] < min(others) - SQUARE_GAIN if others and "square" in correct else None
