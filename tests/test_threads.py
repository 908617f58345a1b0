"""Work on threads: results in order, errors told, and no more held than promised."""

import threading
import time
from collections.abc import Iterator

import pytest

from pipeline.threads import on_all_cores, one_behind


def test_results_come_in_the_order_of_the_items_whatever_is_done_first() -> None:
    def work(item: int) -> int:
        time.sleep(0.002 * (item % 3 == 0))
        return item * item

    assert on_all_cores(work, range(20)) == [item * item for item in range(20)]


def test_an_error_in_any_thread_is_raised() -> None:
    def work(item: int) -> None:
        if item == 3:
            raise ValueError("item 3")

    with pytest.raises(ValueError, match="item 3"):
        on_all_cores(work, range(10))
    made: list[int] = []
    with pytest.raises(ValueError, match="item 3"):
        one_behind(work, (made.append(item) or item for item in range(10)))  # type: ignore[func-returns-value]
    assert made[-1] <= 5  # nothing is made long after it


def test_items_are_worked_on_in_order_beside_the_making_of_the_next_one_and_two_are_held_at_most() -> None:
    done: list[int] = []
    held: list[int] = []
    threads: set[int] = set()
    made = 0

    def items() -> Iterator[int]:
        nonlocal made
        for item in range(12):
            made += 1
            held.append(made - len(done))
            yield item

    def work(item: int) -> None:
        threads.add(threading.get_ident())
        time.sleep(0.003)
        done.append(item)

    one_behind(work, items())
    assert done == list(range(12))
    assert max(held) <= 2
    assert threads.isdisjoint({threading.get_ident()})
    one_behind(work, iter(()))
    assert len(done) == 12
