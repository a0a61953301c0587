"""Values of options, read with an error that names the option. All raise BadParameter."""

from pathlib import Path

import typer

from mesh.options import values


def size(text: str, option: str) -> int:
    """Returns the bytes that a text such as `64MiB` stands for."""
    try:
        return values.parse_bytes(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def address(text: str, option: str) -> str:
    """Returns an address to listen on in its full form, `HOST:PORT`."""
    try:
        return values.format_address(*values.parse_address(text))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def span(text: str, option: str, *, unlimited: str) -> float | None:
    """Returns seconds; None for the word that stands for no limit."""
    try:
        return values.parse_span(text, unlimited)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def content(path: Path | None, option: str) -> bytes | None:
    """Returns the content of the file that an option names; None where it names none."""
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror}", param_hint=option) from error
