"""The output of commands: tables for people, JSON for programs, errors on standard error.

Only the answer goes to standard output, so that it can be piped. Remarks and errors go to standard error. Tables fit
the width of a terminal. In a pipe, nothing is cut or wrapped.
"""

import json
import sys
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mesh.cli.exits import CommandError
from mesh.local.lines import one_line
from mesh.options.values import format_bytes
from mesh.schema.modelstatus import ModelStatus, VModelStatus

PIPE_WIDTH = 4000
"""Columns without a terminal: wider than any line, because rich would cut at 80."""

STATUS_STYLES = {
    ModelStatus.LOADED: "green",
    ModelStatus.LOADING: "yellow",
    ModelStatus.NOT_LOADED: "dim",
    ModelStatus.LOADING_FAILED: "red",
    ModelStatus.NOT_FOUND: "red",
    VModelStatus.DEFINED: "green",
    VModelStatus.TRANSITIONING: "yellow",
    VModelStatus.TRANSITION_FAILED: "red",
    "UNKNOWN": "yellow",
    "ready": "green",
    "leaving": "yellow",
    "starting": "yellow",
}


def console() -> Console:
    """Returns the console for the answer."""
    return _console(stderr=False)


def remarks() -> Console:
    """Returns the console for remarks and errors."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, width=None if stream.isatty() else PIPE_WIDTH)


def print_json(answer: Any) -> None:
    """Prints one JSON document on standard output, indented on a terminal."""
    sys.stdout.write(json.dumps(answer, indent=2 if sys.stdout.isatty() else None) + "\n")


def print_error(error: CommandError, *, as_json: bool = False) -> None:
    """Prints the error's text on standard error. With `as_json`, also prints a JSON document on standard output."""
    if as_json and not error.answered:
        print_json({"error": error.text, "reason": error.reason, "exit": int(error.code)})
    remarks().print(f"[bold red]error:[/] {plain(error.text)}", soft_wrap=True)


def table(*columns: str, title: str | None = None) -> Table:
    """Returns a table without rules. A column whose name begins with `>` is right-aligned."""
    made = Table(box=None, pad_edge=False, title=title, title_justify="left", header_style="bold")
    for column in columns:
        name = column.removeprefix(">")
        made.add_column(name, justify="right" if name != column else "left", overflow="fold")
    return made


def status(text: str) -> str:
    """Returns a status with rich's markup for its colour."""
    style = STATUS_STYLES.get(text)
    return f"[{style}]{plain(text)}[/]" if style else plain(text)


def size(count: Any) -> str:
    """Formats a number of bytes for people. Returns "" if there is no number."""
    return format_bytes(count) if isinstance(count, int | float) and count > 0 else ""


def plain(text: str) -> str:
    """Escapes untrusted text for rich. The result contains neither markup nor control characters."""
    return escape("\n".join(one_line(line) for line in text.split("\n")))


def duration(milliseconds: Any) -> str:
    """Formats a duration for people: `12 ms`, `3.4 s`, `5 min`, `2 h`, `9 d`. Returns "" if there is no number."""
    if not isinstance(milliseconds, int | float) or milliseconds < 0:
        return ""
    if milliseconds < 1000:
        return f"{milliseconds:.3g} ms"
    seconds = milliseconds / 1000
    for limit, unit, divisor in ((120, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / divisor:.{1 if divisor == 1 and seconds < 10 else 0}f} {unit}"
    return f"{seconds / 86_400:.0f} d"
