"""The operator's command line: `python -m pipeline`."""

from pipeline.cli import app
from pipeline.stage import one_line_errors

if __name__ == "__main__":
    with one_line_errors():
        app()
