"""Reproducible random streams: every draw comes from a generator named by (seed, position, purpose)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import numpy as np
import torch

Stream = Literal[
    "real_order", "synthetic_draw", "augmentation", "attack", "holdout", "selection", "cutmix", "reference", "quality",
    "calibration", "dropout",
]  # fmt: skip
_STREAMS: tuple[Stream, ...] = get_args(Stream)  # new ones go to the end: the place is part of the seed


def numpy_stream(seed: int, position: int, stream: Stream) -> np.random.Generator:
    """A NumPy generator for one purpose at one position (a step, an epoch)."""
    return np.random.default_rng([seed, position, _STREAMS.index(stream)])


def torch_stream(seed: int, position: int, stream: Stream, device: torch.device) -> torch.Generator:
    """As `numpy_stream`, a torch generator on device."""
    state = np.random.SeedSequence([seed, position, _STREAMS.index(stream)]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0] >> np.uint64(1)))


@contextmanager
def global_stream(seed: int, position: int, stream: Stream, device: torch.device) -> Iterator[None]:
    """In it the global generator of device is that stream, for what can draw from no other, as compiled dropout; after it the
    generator is what it was."""
    shared = torch.default_generator
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        shared = torch.cuda.default_generators[index]
    before = shared.get_state()
    shared.manual_seed(torch_stream(seed, position, stream, device).initial_seed())
    try:
        yield
    finally:
        shared.set_state(before)
