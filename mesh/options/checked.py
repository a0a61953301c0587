"""Parsing of option values. All functions raise BadParameter, which names the option."""

from pathlib import Path

import typer

from mesh.options import values


def size(text: str, option: str) -> int:
    """Returns the bytes of a size such as `64MiB`."""
    try:
        return values.parse_bytes(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def body_bytes(text: str, *, least: int, max_message: str) -> int:
    """Returns the total size of bodies that `--max-body-bytes` sets, in bytes. `auto` means `least`, or four times
    `--max-message` if that is more."""
    message = size(max_message, "--max-message")
    if text == "auto":
        return max(least, 4 * message)
    total, needed = size(text, "--max-body-bytes"), 2 * message + 1024  # half of it is for large requests
    if total < needed:
        says = f"{values.format_bytes(total)} is too small for one message of --max-message"
        says += f": give {values.format_bytes(needed)} or more"
        raise typer.BadParameter(says, param_hint="--max-body-bytes")
    return total


def address(text: str, option: str) -> str:
    """Returns an address to listen on in its full form, `HOST:PORT`."""
    try:
        return values.format_address(*values.parse_address(text))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def span(text: str, option: str, *, unlimited: str) -> float | None:
    """Returns a number of seconds, or None if the text is `unlimited`, the word for no limit."""
    try:
        return values.parse_span(text, unlimited)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def content(path: Path | None, option: str) -> bytes | None:
    """Returns the content of the file that an option names, or None if the option was not given."""
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be read: {error.strerror}", param_hint=option) from error
