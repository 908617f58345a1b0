"""Which rows make the batch of a step: a function of (seed, step), so that any step can be resumed, in memory that does not
grow with the number of rows."""

import numpy as np
from numpy.typing import NDArray

from pipeline.hashing import shuffled
from pipeline.params import InputError
from pipeline.randomness import numpy_stream

Places = NDArray[np.int64]

ROUNDS = 6


def draw(num_real: int, num_synthetic: int, step: int, *, batch_size: int, synthetic_fraction: float, seed: int) -> Places:
    """The places (batch_size,) of the batch of a step among num_real real rows and the num_synthetic synthetic ones behind
    them; real rows are first. They come in a new random order every epoch, each once; synthetic rows are drawn with
    replacement.

    Raises:
        InputError: there are no rows.
    """
    if not num_real and not num_synthetic:
        raise InputError("training: no image is left to train on; keep more, or hold out fewer")
    fraction = synthetic_fraction if num_real and num_synthetic else float(num_synthetic > 0)
    drawn = round(fraction * batch_size)
    turns = np.arange(step * (batch_size - drawn), (step + 1) * (batch_size - drawn))
    epochs = turns // max(1, num_real)
    real = np.empty(len(turns), np.int64)
    for epoch in np.unique(epochs):
        now = epochs == epoch
        real[now] = permuted(turns[now] % num_real, num_real, numpy_stream(seed, int(epoch), "real_order"))
    synthetic = numpy_stream(seed, step, "synthetic_draw").integers(0, max(1, num_synthetic), drawn)
    return np.concatenate([real, num_real + synthetic])


def permuted(turns: Places, count: int, generator: np.random.Generator) -> Places:
    """What stands at the turns (n,) of a random order of 0 ... count - 1 that generator draws."""
    return shuffled(turns, count, generator.integers(0, 2**64, ROUNDS, np.uint64))
