"""The option that routers and runtime pods share for TLS between them, and what comes of it."""

from pathlib import Path
from typing import Annotated

import typer

from mesh.identity import Identity, IdentityError

Internal = Annotated[
    Path | None,
    typer.Option(
        "--internal-tls",
        envvar="MESH_INTERNAL_TLS",
        metavar="DIR",
        help="Folder with ca.crt, tls.crt, tls.key, read anew when they change (`mesh certificates` makes them): "
        "routers and runtime pods speak only mutual TLS with each other. All of a mesh have it, or none.",
    ),
]


def check(folder: Path | None) -> Path | None:
    """The folder, if its files work. Raises BadParameter."""
    if folder is None:
        return None
    folder = folder.absolute()
    try:
        Identity(folder)
    except IdentityError as error:
        raise typer.BadParameter(str(error), param_hint="--internal-tls") from error
    return folder
