"""The lowest and highest values of every group, exactly as a full sort would find them, in a few passes and little memory."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.hashing import hashed

CHUNK_ROWS = 2**20

Mask = NDArray[np.bool_]
Counts = NDArray[np.int64]
Values = NDArray[np.float32]


@dataclass(frozen=True)
class Cuts:
    """Of each group (K,): all values below `low` and above `high` are in, and of those equal to them `low_ties` and
    `high_ties`. Where a group gives nothing at an end, its cut is infinite."""

    low: Values
    high: Values
    low_ties: Counts
    high_ties: Counts


def extremes(
    values: Values, groups: NDArray[np.int16] | None, candidates: Mask, low: Counts, high: Counts, seed: int
) -> tuple[Mask, Mask, Cuts]:
    """Which of the candidates among values (n,) are the low[k] lowest and the high[k] highest of their group k.

    As in a sort of each group by value and then by an order of the rows that the seed draws. `groups` (n,) are numbers
    below K; None is one group. low[k] + high[k] must not exceed the candidates of a group, and none of them may be NaN.
    """
    grouped, starts = by_group(values, groups, candidates, len(low))
    cuts = find_cuts(grouped, starts, low, high)
    is_low, is_high = np.zeros(len(values), bool), np.zeros(len(values), bool)
    low_ties, high_ties = [], []
    for part in chunks(len(values)):
        group = slice(None) if groups is None else groups[part]
        low_cut, high_cut = (cuts.low[0], cuts.high[0]) if groups is None else (cuts.low[group], cuts.high[group])
        is_low[part] = candidates[part] & (values[part] < low_cut)
        is_high[part] = candidates[part] & (values[part] > high_cut)
        low_ties.append(part.start + np.flatnonzero(candidates[part] & (values[part] == low_cut)))
        high_ties.append(part.start + np.flatnonzero(candidates[part] & (values[part] == high_cut)))
    is_low[first_of(np.concatenate(low_ties), groups, cuts.low_ties, seed, from_end=False)] = True
    is_high[first_of(np.concatenate(high_ties), groups, cuts.high_ties, seed, from_end=True)] = True
    return is_low, is_high, cuts


def chunks(count: int) -> Iterator[slice]:
    return (slice(first, min(first + CHUNK_ROWS, count)) for first in range(0, max(count, 1), CHUNK_ROWS))


def by_group(
    values: Values, groups: NDArray[np.int16] | None, candidates: Mask, num_groups: int
) -> tuple[Values, NDArray[np.int64]]:
    """The candidates' values, group after group, and where each group starts, and the end (K + 1,). A copy of the values is
    all the memory it takes."""
    if groups is None:
        chosen = values[candidates]
        return chosen, np.array([0, len(chosen)])
    counts = np.zeros(num_groups, np.int64)
    for part in chunks(len(values)):
        counts += np.bincount(groups[part][candidates[part]], minlength=num_groups)
    starts = np.concatenate([[0], np.cumsum(counts)])
    grouped, filled = np.empty(starts[-1], np.float32), starts[:-1].copy()
    for part in chunks(len(values)):
        group = groups[part][candidates[part]]
        order = np.argsort(group, kind="stable")
        here = np.bincount(group, minlength=num_groups)
        within = np.arange(len(group)) - np.repeat(np.cumsum(here) - here, here)
        grouped[np.repeat(filled, here) + within] = values[part][candidates[part]][order]
        filled += here
    return grouped, starts


def find_cuts(grouped: Values, starts: NDArray[np.int64], low: Counts, high: Counts) -> Cuts:
    """The cuts of each group; reorders the values within the groups."""
    num_groups = len(low)
    cuts = Cuts(
        np.full(num_groups, -np.inf, np.float32),
        np.full(num_groups, np.inf, np.float32),
        np.zeros(num_groups, np.int64),
        np.zeros(num_groups, np.int64),
    )
    for k in range(num_groups):
        group = grouped[starts[k] : starts[k + 1]]
        at = [*([low[k] - 1] if low[k] else []), *([len(group) - high[k]] if high[k] else [])]
        if at:
            group.partition(at)
        if low[k]:
            cuts.low[k] = group[low[k] - 1]
            cuts.low_ties[k] = low[k] - np.count_nonzero(group[: low[k]] < cuts.low[k])
        if high[k]:
            cuts.high[k] = group[len(group) - high[k]]
            cuts.high_ties[k] = high[k] - np.count_nonzero(group[len(group) - high[k] :] > cuts.high[k])
    return cuts


def first_of(
    positions: NDArray[np.int64], groups: NDArray[np.int16] | None, wanted: Counts, seed: int, *, from_end: bool
) -> NDArray[np.int64]:
    """Of the rows at positions the first wanted[k] of each group k in the order that the seed draws, or the last."""
    order = hashed(positions, seed, 0)
    if from_end:
        order = ~order
    group = np.zeros(len(positions), np.int16) if groups is None else groups[positions]
    ranked = np.lexsort((order, group))
    sizes = np.bincount(group, minlength=len(wanted))
    rank = np.arange(len(positions)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return positions[ranked[rank < np.repeat(wanted, sizes)]]
