"""What ends the start of a process that runs by itself: a line of its log, as whatever else it says.

A wrong option on a terminal is shown by typer, in a box as wide as the terminal. In a pod that would be five lines of
80 columns that nobody can search, so there it is one line of the log.
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
    """Logs a BadParameter from within where nobody watches, and ends the process with the status that it has."""
    try:
        yield
    except typer.BadParameter as error:
        if sys.stderr.isatty():
            raise
        log.error("cannot start", option=str(error.param_hint or ""), why=error.message)
        raise typer.Exit(error.exit_code) from error
