"""Seeded permutations and stratified subsets."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.sources import rows
from pipeline.sources.rows import hold_out, permuted, stratified


@given(count=st.integers(1, 3000), seed=st.integers(0, 2**63))
@settings(max_examples=60, deadline=None)
def test_permuted_is_a_permutation_and_its_parts_agree_with_it(count: int, seed: int) -> None:
    whole = permuted(np.arange(count), count, seed)
    assert sorted(whole.tolist()) == list(range(count))
    np.testing.assert_array_equal(permuted(np.arange(count // 3, count), count, seed), whole[count // 3 :])


def test_a_permutation_made_in_pieces_is_that_of_all_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "PIECE", 7)
    for count in (1, 7, 50):
        np.testing.assert_array_equal(rows.permutation(count, 50, 3), permuted(np.arange(count), 50, 3))
    assert len(rows.permutation(0, 50, 3)) == 0


def test_permuted_sends_every_position_everywhere_alike() -> None:
    counts = np.zeros((7, 7))
    for seed in range(700):
        counts[np.arange(7), permuted(np.arange(7), 7, seed)] += 1
    chi_square = ((counts - 100) ** 2 / 100).sum()
    assert chi_square < 70  # 36 degrees of freedom: 4 standard deviations


def test_permuted_positions_of_a_huge_range_need_no_more_than_themselves() -> None:
    rows = permuted(np.arange(10**12, 10**12 + 1000), 10**13, 0)
    assert len(set(rows.tolist())) == 1000
    assert 0 <= rows.min() < rows.max() < 10**13
    assert abs(rows.mean() / 10**13 - 0.5) < 0.04


@given(labels=st.lists(st.integers(0, 5), min_size=1, max_size=200), num_rows=st.integers(1, 250), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_stratified_subset_keeps_the_share_of_every_class(labels: list[int], num_rows: int, seed: int) -> None:
    classes = np.array(labels)
    rows = stratified(classes, num_rows, seed)
    assert len(rows) == min(num_rows, len(labels))
    assert np.all(np.diff(rows) > 0)
    exact = np.bincount(classes, minlength=6) * len(rows) / len(labels)
    assert np.all(np.abs(np.bincount(classes[rows], minlength=6) - exact) < 1)


def test_hold_out_parts_the_rows_in_two() -> None:
    labels = np.repeat(np.arange(10), 50)
    train, test = hold_out(labels, 0.2, seed=3)
    assert np.bincount(labels[test]).tolist() == [10] * 10
    assert sorted([*train, *test]) == list(range(500))
    assert not np.array_equal(test, hold_out(labels, 0.2, seed=4)[1])
