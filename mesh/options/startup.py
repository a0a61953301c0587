"""Errors in options, logged as one line.

On a terminal, typer shows a wrong option in a box as wide as the terminal. In a pod, the box would be five lines of 80
columns that are hard to search, so the error is one log line there.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    import structlog


@contextlib.contextmanager
def refusals(log: "structlog.stdlib.BoundLogger") -> Iterator[None]:
    """Turns a BadParameter that the block raises into one log line, and exits with its code. On a terminal, leaves it
    to typer."""
    try:
        yield
    except typer.BadParameter as error:
        if sys.stderr.isatty():
            raise
        log.error("cannot start", option=str(error.param_hint or ""), why=error.message)
        raise typer.Exit(error.exit_code) from error
