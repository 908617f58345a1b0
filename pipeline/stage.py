"""How a stage starts: its main becomes a command line, and bad input ends in one line on stderr and exit status 1."""

import ctypes
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer

from pipeline.params import InputError

PR_SET_PDEATHSIG = 1
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def run(main: Callable[..., None]) -> None:
    """Call main with the arguments of the command line (paths and items); `InputError` is reported without a traceback."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(one_line_errors()(main))
    end_with_parent()
    interruption.listen()
    app()


def end_with_parent(parent: int | None = None) -> None:
    """Ask the kernel for SIGTERM when the parent dies: `dvc` that is killed leaves its stage behind, and the next run would
    be a second writer of the same files. Ends at once if it is dead already; parent is its process, where that is known.
    (Elsewhere than on Linux this does nothing.)"""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != (parent or interruption.parent) or was_adopted():
        sys.exit(128 + signal.SIGTERM)


def was_adopted() -> bool:
    """Whether this process has lost its parent: that of any process but the leader of a session is of the same session."""
    try:
        return os.getsid(0) != os.getpid() and os.getsid(os.getppid()) != os.getsid(0)
    except ProcessLookupError:
        return True


class Interruption:
    """What asks this process to end: Ctrl-C, SIGTERM, SIGHUP, or the death of its parent."""

    def __init__(self) -> None:
        self.came, self.parent = False, os.getppid()

    def listen(self) -> None:
        """Make the signals raise KeyboardInterrupt. (A shell has what it starts in the background ignore SIGINT.)"""
        for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(kind) != signal.SIG_IGN:
                signal.signal(kind, self.handle)

    def handle(self, *_: Any) -> None:
        """The first signal counts: a killed dvc sends one for each of its threads, and the second must not break off the
        clean-up."""
        self.came = True
        for kind in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(kind, signal.SIG_IGN)
        raise KeyboardInterrupt

    def check(self) -> None:
        """For loops that wait: Python drops a KeyboardInterrupt that comes while it runs a destructor.

        Raises:
            KeyboardInterrupt: one came, or the parent is gone.
        """
        if self.came or os.getppid() != self.parent:
            raise KeyboardInterrupt


interruption = Interruption()


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn an `InputError`, and a disk that is full, into one line on stderr and exit status 1."""
    try:
        yield
    except InputError as error:
        fail(str(error), error.exit_status)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno not in FULL:
            raise
        where = f" at {error.filename}" if error.filename else ""
        fail(f"no space is left on the disk{where} ({error.strerror}); nothing was published: make room and run this again")


def fail(message: str, status: int = 1) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
