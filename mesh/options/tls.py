"""The option for TLS between routers and runtime pods, and its check."""

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
        help="Folder with ca.crt, tls.crt and tls.key for mutual TLS between routers and runtime pods, read again when "
        "they change (`mesh certificates` creates them). Set it for all processes of a mesh or for none.",
    ),
]


def check(folder: Path | None) -> Path | None:
    """Returns the folder's absolute path, or None if no folder is given. Raises BadParameter if its files cannot be
    used."""
    if folder is None:
        return None
    folder = folder.absolute()
    try:
        Identity(folder)
    except IdentityError as error:
        raise typer.BadParameter(str(error), param_hint="--internal-tls") from error
    return folder
