"""Errors in options, logged as one line.

On a terminal, typer shows a wrong option in a box as wide as the terminal. In the log of a pod, the box would be five
lines that are hard to search, so the error is logged as one line.
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
    """Logs a BadParameter that the block raises as one line, and exits with its code. On a terminal, leaves the error
    to typer."""
    try:
        yield
    except typer.BadParameter as error:
        if sys.stderr.isatty():
            raise
        log.error("cannot start", option=str(error.param_hint or ""), why=error.message)
        raise typer.Exit(error.exit_code) from error
