"""How a stage starts: its main becomes a command line, and bad input ends in one line on stderr and exit status 1."""

import ctypes
import errno
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from pipeline.params import InputError

PR_SET_PDEATHSIG = 1
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def run(main: Callable[..., None]) -> None:
    """Call main with the arguments of the command line (paths and items); `InputError` is reported without a traceback."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    end_with_parent()
    with one_line_errors():
        app()


def end_with_parent() -> None:
    """Ask the kernel for SIGTERM when the parent dies: `dvc` that is killed leaves its stage behind, and the next run would
    be a second writer of the same files. (Elsewhere than on Linux this does nothing.)"""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


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
