"""The lowest and highest values of every group, exactly as a full sort would find them, in a few passes and little memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.hashing import hashed
from pipeline.threads import on_all_cores

CHUNK_ROWS = 2**18  # what a core works on at a time stays in its cache
SAMPLE_ROWS = 2**18
DEVIATIONS = 4  # of the sample's ranks, on either side of the rank that is sought
LEADING_BITS = 24  # as many as a float32 holds

Mask = NDArray[np.bool_]
Groups = NDArray[np.int16] | None
Counts = NDArray[np.int64]
Values = NDArray[np.float32]
Order = Callable[[Counts], NDArray[np.uint64]]  # rows (n,) -> what they are sorted by (n,), all different


@dataclass(frozen=True)
class Cuts:
    """Of each group (K,): all values below `low` and above `high` are in, and of those equal to them `low_ties` and
    `high_ties`. Where a group gives nothing at an end, its cut is infinite."""

    low: Values
    high: Values
    low_ties: Counts
    high_ties: Counts


def extremes(values: Values, groups: Groups, candidates: Mask, low: Counts, high: Counts, seed: int) -> tuple[Mask, Mask, Cuts]:
    """Which of the candidates among values (n,) are the low[k] lowest and the high[k] highest of their group k.

    As in a sort of each group by value and then by an order of the rows that the seed draws. `groups` (n,) are numbers
    below K; None is one group. low[k] + high[k] must not exceed the candidates of a group, and none of them may be NaN.
    """
    cuts = find_cuts(values, groups, candidates, low, high)

    def order(rows: Counts) -> NDArray[np.uint64]:
        return hashed(rows, seed, 0)

    is_low = beyond(np.less, cuts.low, cuts.low_ties, values, groups, candidates, order)
    is_high = beyond(np.greater, cuts.high, cuts.high_ties, values, groups, candidates, lambda rows: ~order(rows))
    return is_low, is_high, cuts


def chunks(count: int) -> Iterator[slice]:
    return (slice(first, min(first + CHUNK_ROWS, count)) for first in range(0, max(count, 1), CHUNK_ROWS))


def count_groups(mask: Mask, groups: Groups, num_groups: int) -> Counts:
    """How many rows of mask (n,) each group has (K,)."""
    counts = on_all_cores(lambda part: tally(mask[part], rows_of(groups, part), num_groups), chunks(len(mask)))
    return np.sum(counts, axis=0)


def tally(mask: Mask, groups: Groups, num_groups: int) -> Counts:
    if groups is None:
        return np.array([np.count_nonzero(mask)])
    return np.bincount(groups[mask], minlength=num_groups)


def rows_of(groups: Groups, part: slice) -> Groups:
    return None if groups is None else groups[part]


def of_row(of_group: Values, groups: Groups) -> Values:
    """What each row (n,) has by its group, of what the groups have (K,)."""
    return of_group if groups is None else of_group[groups]


def find_cuts(values: Values, groups: Groups, candidates: Mask, low: Counts, high: Counts) -> Cuts:
    counts = count_groups(candidates, groups, len(low))
    rank = counts - high
    low_cut, below, _ = at_rank(values, groups, candidates, counts, low - 1, low > 0)
    low_ties = np.where(low > 0, low - below, 0)
    high_cut, below, equal = at_rank(values, groups, candidates, counts, rank, high > 0)
    high_ties = np.where(high > 0, below + equal - rank, 0)
    inf = np.float32(np.inf)
    return Cuts(np.where(low > 0, low_cut, -inf), np.where(high > 0, high_cut, inf), low_ties, high_ties)


def at_rank(
    values: Values, groups: Groups, candidates: Mask, counts: Counts, rank: Counts, wanted: Mask
) -> tuple[Values, Counts, Counts]:
    """The value at a rank, from 0, among the ascending candidates, counts[k] of them, of each wanted group (K,), how many of
    them are below it, and how many equal it.

    Only what lies between two values of a sample is sorted (Floyd & Rivest 1975), or all where these do not enclose it.
    """
    value, below, equal = np.zeros(len(rank), np.float32), np.zeros(len(rank), np.int64), np.zeros(len(rank), np.int64)
    if not wanted.any():
        return value, below, equal
    todo = wanted.copy()
    inf = np.full(len(rank), np.inf, np.float32)
    for low, high in (enclose(values, groups, candidates, counts, rank), (-inf, inf)):
        lower, pieces = divide(values, groups, candidates, np.where(todo, low, inf), np.where(todo, high, -inf))
        for k in np.flatnonzero(todo):
            between, at = pieces[k], rank[k] - lower[k]
            if 0 <= at < len(between):
                between.partition(at)
                value[k], todo[k] = between[at], False
                below[k] = lower[k] + np.count_nonzero(between < value[k])
                equal[k] = np.count_nonzero(between == value[k])
        if not todo.any():
            return value, below, equal
    raise ValueError(f"wanted ranks below the numbers of candidates, none of them NaN, got {rank[todo]} of {counts[todo]}")


def enclose(values: Values, groups: Groups, candidates: Mask, counts: Counts, rank: Counts) -> tuple[Values, Values]:
    """Two values (K,) between which that of the rank in each group lies, as far as a sample can tell."""
    sample = slice(None, None, len(values) // SAMPLE_ROWS + 1)
    chosen = candidates[sample]
    drawn = values[sample][chosen]
    group = np.zeros(len(drawn), np.int16) if groups is None else groups[sample][chosen]
    drawn = np.concatenate([drawn[np.lexsort((drawn, group))], [np.float32(np.nan)]])  # never read, but there
    sizes = np.bincount(group, minlength=len(rank))
    share = (rank + 0.5) / np.maximum(1, counts)
    spread = 1 + DEVIATIONS * np.sqrt(np.maximum(0, sizes * share * (1 - share)))
    first, last = np.floor(sizes * share - spread).astype(np.int64), np.ceil(sizes * share + spread).astype(np.int64)
    starts = np.cumsum(sizes) - sizes
    low = np.where(first >= 0, drawn[starts + np.clip(first, 0, sizes)], np.float32(-np.inf))
    high = np.where(last < sizes, drawn[starts + np.clip(last, 0, sizes)], np.float32(np.inf))
    return low, high


def divide(values: Values, groups: Groups, candidates: Mask, low: Values, high: Values) -> tuple[Counts, list[Values]]:
    """Of each group (K,): how many candidates are below low, and those from low to high."""

    def look(part: slice) -> tuple[Counts, Values, NDArray[np.int16]]:
        value, group = values[part], rows_of(groups, part)
        lower = value < of_row(low, group)
        inside = candidates[part] & ~lower & (value <= of_row(high, group))
        found = value[inside]
        return (
            tally(candidates[part] & lower, group, len(low)),
            found,
            np.zeros(len(found), np.int16) if group is None else group[inside],
        )

    counts, found, of_group = zip(*on_all_cores(look, chunks(len(values))), strict=True)
    between, group = np.concatenate(found), np.concatenate(of_group)
    del found, of_group
    if groups is not None:
        between = between[np.argsort(group, kind="stable")]
    return np.sum(counts, axis=0), np.split(between, np.cumsum(np.bincount(group, minlength=len(low)))[:-1])


def beyond(
    compare: np.ufunc, cuts: Values, ties: Counts, values: Values, groups: Groups, candidates: Mask, order: Order
) -> Mask:
    """The candidates (n,) beyond the cut of their group k, and the first ties[k] at it in order."""
    found, tied = np.zeros(len(values), bool), np.zeros(len(values), bool)
    if not ties.any():
        return found

    def mark(part: slice) -> None:
        cut = of_row(cuts, rows_of(groups, part))
        found[part] = candidates[part] & compare(values[part], cut)
        tied[part] = candidates[part] & (values[part] == cut)

    on_all_cores(mark, chunks(len(values)))
    add_first(found, tied, groups, ties, order)
    return found


def add_first(found: Mask, tied: Mask, groups: Groups, wanted: Counts, order: Order) -> None:
    """Mark in found (n,) the first wanted[k] of the tied rows (n,) of each group k in order. Where they are many, the leading
    bits of the order decide most of them."""
    if np.count_nonzero(tied) > SAMPLE_ROWS:
        leading = np.zeros(len(tied), np.float32)

        def lead(part: slice) -> None:
            rows = part.start + np.flatnonzero(tied[part])
            leading[rows] = order(rows) >> np.uint64(64 - LEADING_BITS)

        on_all_cores(lead, chunks(len(tied)))
        counts = count_groups(tied, groups, len(wanted))
        cuts, below, _ = at_rank(leading, groups, tied, counts, wanted - 1, wanted > 0)
        wanted = np.where(wanted > 0, wanted - below, 0)

        def decide(part: slice) -> None:
            cut = of_row(cuts, rows_of(groups, part))
            found[part] |= tied[part] & (leading[part] < cut)
            tied[part] &= leading[part] == cut

        on_all_cores(decide, chunks(len(tied)))
    rows = np.flatnonzero(tied)
    group = np.zeros(len(rows), np.int16) if groups is None else groups[rows]
    ranked = np.lexsort((order(rows), group))
    sizes = np.bincount(group, minlength=len(wanted))
    rank = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    found[rows[ranked[rank < np.repeat(wanted, sizes)]]] = True
