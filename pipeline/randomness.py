"""Reproducible random streams: every draw comes from a generator named by (seed, position, purpose), never a global one."""

from typing import Literal, get_args

import numpy as np
import torch

Stream = Literal[
    "real_order", "synthetic_draw", "augmentation", "attack", "holdout", "selection", "cutmix", "reference", "quality",
    "calibration",
]  # fmt: skip
_STREAMS: tuple[Stream, ...] = get_args(Stream)  # new ones go to the end: the place is part of the seed


def numpy_stream(seed: int, position: int, stream: Stream) -> np.random.Generator:
    """A NumPy generator for one purpose at one position (a step, an epoch)."""
    return np.random.default_rng([seed, position, _STREAMS.index(stream)])


def torch_stream(seed: int, position: int, stream: Stream, device: torch.device) -> torch.Generator:
    """As `numpy_stream`, a torch generator on device."""
    state = np.random.SeedSequence([seed, position, _STREAMS.index(stream)]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0] >> np.uint64(1)))
