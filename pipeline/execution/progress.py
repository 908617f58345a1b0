"""Progress of long work: a bar on a terminal, a plain line now and then in a log."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from pipeline.execution.store import RunStore

LOG_EVERY_S = 20.0
WATCH_EVERY_S = 60.0


class Report(Protocol):
    """Call with how many images are done, of how many in all, and the latest figures."""

    def __call__(self, done: int, total: int, figures: dict[str, float] | None = None) -> None: ...


@contextmanager
def progress(label: str) -> Iterator[Report]:
    """Yield a `Report` that draws on stderr."""
    with Line(label, LOG_EVERY_S) as line:

        def report(done: int, total: int, figures: dict[str, float] | None = None) -> None:
            line.draw(done, total, as_text(figures))

        yield report


class Line:
    """One bar, or one line every now and then, about work that is counted in images."""

    def __init__(self, label: str, every_s: float) -> None:
        self.label, self.every_s = label, every_s
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console) if console.is_terminal else None
        self.started = self.last = time.monotonic()
        self.first: float | None = None  # what was done when this began: a resumed run does not start at zero

    def __enter__(self) -> Self:
        if self.bar:
            self.bar.start()
            self.task = self.bar.add_task(self.label, total=None)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar:
            self.bar.stop()

    def draw(self, done: float, total: float, text: str) -> None:
        now = time.monotonic()
        self.first = done if self.first is None else self.first
        rate = (done - self.first) / max(now - self.started, 1e-9)
        told = f"{rate:.{1 if 0 < rate < 10 else 0}f} images/s {text}".rstrip()
        if self.bar:
            self.bar.update(self.task, completed=done, total=total, description=f"{self.label} {told}")
        elif now - self.last >= self.every_s or done == total:
            self.last = now
            left = f"{(total - done) / rate:.0f} s left, " if rate > 0 else ""
            print(f"{self.label}: {done:.0f}/{total:.0f} images, {left}{told}", file=sys.stderr, flush=True)


class Watch:
    """Progress of the tasks of a run that execute elsewhere."""

    def __init__(self, store: RunStore, tasks: list[str]) -> None:
        self.store, self.tasks = store, tasks
        self.line = Line(store.stage, WATCH_EVERY_S)

    def __enter__(self) -> Self:
        self.line.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.line.__exit__(kind, error, trace)

    def show(self, states: dict[str, str]) -> None:
        """states: task -> state of its job in the queue."""
        self.line.draw(*summarise(self.store, self.tasks, states))


def summarise(store: RunStore, tasks: list[str], states: dict[str, str]) -> tuple[float, float, str]:
    """Images done and in all (estimated where tasks have not begun), and a text that counts the tasks."""
    finished = [name for name in tasks if store.is_done(name)]
    counts = [(n, n) for n in (store.size(name) for name in finished)]
    others = (store.progress(name) for name in tasks if name not in finished)
    counts += [(int(note["done"]), int(note["total"])) for note in others if note]
    known = sum(total for _, total in counts)
    total = known * len(tasks) / len(counts) if counts else 1.0
    running = sum(state == "RUNNING" for state in states.values())
    text = f"{len(finished)} tasks done, {running} running, {len(states) - running} pending"
    return float(sum(done for done, _ in counts)), total, text


def as_text(figures: dict[str, float] | None) -> str:
    return " ".join(f"{name} {value:.3g}" for name, value in (figures or {}).items())
