"""Threads for work in NumPy and Arrow, which leave the interpreter to others while they compute."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def num_cores() -> int:
    """Cores this process may use (on SLURM: those of the job)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def on_all_cores(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """The result of work for each item, in their order."""
    with ThreadPoolExecutor(num_cores()) as pool:
        return list(pool.map(work, items))


def one_behind(work: Callable[[T], object], items: Iterable[T]) -> None:
    """Work on each item in order, on a thread of its own, while the next item is made; at most two items are held."""
    with ThreadPoolExecutor(1) as behind:
        last: Future[object] | None = None
        for item in items:
            if last:
                last.result()
            last = behind.submit(work, item)
        if last:
            last.result()
