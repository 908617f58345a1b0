"""Which rows: seeded permutations of any length in constant memory, and stratified subsets."""

import numpy as np
from numpy.typing import NDArray

from pipeline.hashing import shuffled
from pipeline.images import Labels

Rows = NDArray[np.int64]  # (n,)

ROUNDS = 8
PIECE = 2**20


def permuted(positions: Rows, count: int, seed: int) -> Rows:
    """Rows (B,) that a seeded permutation of range(count) puts at the given positions (B,): any part of the order stands
    alone."""
    return shuffled(positions, count, np.random.SeedSequence(seed).generate_state(ROUNDS, np.uint64).astype(np.uint64))


def permutation(num_rows: int, count: int, seed: int) -> Rows:
    """The first num_rows of `permuted`, made piece by piece, so that they alone are in memory."""
    rows = np.empty(num_rows, np.int64)
    for first in range(0, num_rows, PIECE):
        positions = np.arange(first, min(first + PIECE, num_rows))
        rows[positions[0] : positions[-1] + 1] = permuted(positions, count, seed)
    return rows


def stratified(labels: Labels, num_rows: int, seed: int) -> Rows:
    """num_rows of the rows of labels (n,), ascending: drawn at random within each class, classes as frequent as in labels.

    Exact shares are rounded by the largest remainder. All rows if there are no more than num_rows.
    """
    if num_rows >= len(labels):
        return np.arange(len(labels))
    counts = np.bincount(labels)
    quota, remainder = np.divmod(counts * num_rows, len(labels))
    quota[np.argsort(-remainder, kind="stable")[: num_rows - quota.sum()]] += 1
    order = permutation(len(labels), len(labels), seed)
    by_class = order[np.argsort(labels[order], kind="stable")]
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.sort(by_class[rank < np.repeat(quota, counts)])


def hold_out(labels: Labels, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Rows to train on and rows to test on, ascending: a stratified fraction of labels (n,) is held out for the test."""
    test = stratified(labels, round(len(labels) * fraction), seed)
    return np.setdiff1d(np.arange(len(labels)), test, assume_unique=True), test
