"""Selection by cuts gives what a full sort gives, ties in a seeded order included."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import selection
from pipeline.hashing import hashed, uniform
from pipeline.selection import extremes


def sorted_extremes(values: Any, groups: Any, candidates: Any, low: Any, high: Any, seed: int) -> tuple[set[int], set[int]]:
    """The definition: sort the candidates of each group by (value, seeded order)."""
    order = hashed(np.arange(len(values)), seed, 0).tolist()
    lows, highs = set(), set()
    for group in range(len(low)):
        rows = [row for row in range(len(values)) if candidates[row] and groups[row] == group]
        rows.sort(key=lambda row: (values[row], order[row]))
        lows |= set(rows[: low[group]])
        highs |= set(rows[len(rows) - high[group] :])
    return lows, highs


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    n=st.integers(1, 60),
    num_groups=st.integers(1, 4),
    num_values=st.integers(1, 8),
    seed=st.integers(0, 9),
    sample_rows=st.integers(1, 60),
)
def test_extremes_are_those_of_a_full_sort_with_many_ties(
    data: st.DataObject, n: int, num_groups: int, num_values: int, seed: int, sample_rows: int
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    values = rng.choice(np.array([-np.inf, -2.5, -0.0, 0.0, 1e-30, 1, 2, np.inf][:num_values], np.float32), n)
    groups = rng.integers(0, num_groups, n).astype(np.int16)
    candidates = rng.random(n) < 0.8
    counts = np.bincount(groups[candidates], minlength=num_groups)
    low = np.array([data.draw(st.integers(0, int(count))) for count in counts])
    high = np.array([data.draw(st.integers(0, int(count - taken))) for count, taken in zip(counts, low, strict=True)])
    values[~candidates] = np.nan  # what is no candidate may be anything
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "CHUNK_ROWS", 7)
        patch.setattr(selection, "SAMPLE_ROWS", sample_rows)
        patch.setattr(selection, "LEADING_BITS", 2)  # so that they leave several rows to be told apart
        patch.setattr(selection, "DEVIATIONS", 0.1)  # too few now and then: what the sample says may be wrong
        is_low, is_high, _ = extremes(values, groups if num_groups > 1 else None, candidates, low, high, seed)
    wanted = sorted_extremes(values, groups, candidates, low, high, seed)
    assert (set(np.flatnonzero(is_low).tolist()), set(np.flatnonzero(is_high).tolist())) == wanted


def test_a_large_random_table_is_cut_as_a_sort_by_numpy_cuts_it() -> None:
    rng = np.random.default_rng(0)
    values = np.round(rng.normal(size=100_000), 2).astype(np.float32)  # about 150 rows share each value
    is_low, is_high, cuts = extremes(values, None, np.ones(100_000, bool), np.array([12_345]), np.array([23_456]), 5)
    order = np.lexsort((hashed(np.arange(100_000), 5, 0), values))
    np.testing.assert_array_equal(np.sort(order[:12_345]), np.flatnonzero(is_low))
    np.testing.assert_array_equal(np.sort(order[-23_456:]), np.flatnonzero(is_high))
    assert cuts.low[0] == values[order[12_344]]
    assert cuts.high[0] == values[order[-23_456]]


def test_equal_values_are_drawn_evenly_and_another_seed_draws_others() -> None:
    values = np.zeros(40_000, np.float32)
    drawn = [extremes(values, None, values == 0, np.array([10_000]), np.array([0]), seed)[0] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert abs(np.count_nonzero(drawn[0] & drawn[2]) - 2500) < 5 * np.sqrt(40_000 / 16)  # independent: a quarter of a quarter
    for part in np.split(drawn[0], 8):
        assert abs(np.count_nonzero(part) - 1250) < 5 * np.sqrt(5000 * 3 / 16)


def test_uniform_numbers_are_uniform_and_do_not_depend_on_what_else_is_drawn() -> None:
    numbers = uniform(np.arange(100_000), 3, 1)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert np.abs(np.histogram(numbers, 10, (0, 1))[0] - 10_000).max() < 5 * np.sqrt(9000)
    np.testing.assert_array_equal(uniform(np.array([99_999, 5]), 3, 1), numbers[[99_999, 5]])
    assert len(np.unique(hashed(np.arange(100_000), 3, 0))) == 100_000
