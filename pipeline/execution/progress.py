"""Progress of long work: a bar on a terminal, a plain line now and then in a log."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LOG_EVERY_S = 20.0


class Report(Protocol):
    """Call with what is done, the total, and the latest figures."""

    def __call__(self, done: int, total: int, figures: dict[str, float] | None = None) -> None: ...


@contextmanager
def progress(label: str) -> Iterator[Report]:
    """Yield a `Report` that draws on stderr."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(label, total=None)

            def draw(done: int, total: int, figures: dict[str, float] | None = None) -> None:
                bar.update(task, completed=done, total=total, description=f"{label} {as_text(figures)}")

            yield draw
        return
    started = last = time.monotonic()

    def log(done: int, total: int, figures: dict[str, float] | None = None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= LOG_EVERY_S or done == total:
            last = now
            left = (now - started) * (total - done) / max(1, done)
            print(f"{label}: {done}/{total}, {left:.0f} s left {as_text(figures)}".rstrip(), file=sys.stderr, flush=True)

    yield log


def as_text(figures: dict[str, float] | None) -> str:
    return " ".join(f"{name} {value:.3g}" for name, value in (figures or {}).items())
