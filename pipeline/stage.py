"""How a stage starts: its main becomes a command line, and bad input ends in one line on stderr and exit status 1."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

from pipeline.params import InputError


def run(main: Callable[..., None]) -> None:
    """Call main with the arguments of the command line (paths and items); `InputError` is reported without a traceback."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    with one_line_errors():
        app()


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn an `InputError` into one line on stderr and exit status 1."""
    try:
        yield
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
