"""Pseudo-random numbers by position: any of them alone, in any order, in no memory."""

import numpy as np
from numpy.typing import NDArray


def mix(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele et al. 2014): every bit in moves every bit out."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def hashed(positions: NDArray[np.int64], seed: int, stream: int) -> NDArray[np.uint64]:
    """64 random bits for each position (n,), different for different positions; one sequence per seed and stream."""
    key, odd = np.random.SeedSequence([seed, stream]).generate_state(2, np.uint64)
    return mix(positions.astype(np.uint64) * (odd | np.uint64(1)) + key)


def uniform(positions: NDArray[np.int64], seed: int, stream: int) -> NDArray[np.float32]:
    """A number in [0, 1) for each position (n,), a multiple of 2**-24."""
    return (hashed(positions, seed, stream) >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def shuffled(positions: NDArray[np.int64], count: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """What stands at the positions (n,) of the order of 0 ... count - 1 that keys (rounds,) give; no array of length count
    exists. A Feistel network on the even number of bits that count needs (Luby & Rackoff 1988), followed until it leads below
    count (Black & Rogaway 2002)."""
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    found = positions.astype(np.uint64)
    todo = np.ones(len(found), bool)
    while todo.any():
        left, right = found[todo] >> half, found[todo] & mask
        for key in keys:
            left, right = right, left ^ (mix(right ^ key) & mask)
        found[todo] = (left << half) | right
        todo = found >= count
    return found.astype(np.int64)
