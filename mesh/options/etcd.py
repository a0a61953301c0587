"""How a process is told where etcd is: the options shared by routers, runtime pods and admins' commands."""

from pathlib import Path
from typing import Annotated

import typer

from mesh.options.etcdsettings import EtcdFiles, EtcdSettings
from mesh.options.values import parse_urls

Base = Annotated[str, typer.Option(envvar="MESH_BASE", help="Prefix of the mesh's keys in etcd.")]
InstallId = Annotated[
    str,
    typer.Option(
        envvar="MESH_INSTALL_ID",
        help="Of this installation, the same for all its processes: another's prefix in etcd is then left alone.",
    ),
]
Urls = Annotated[str, typer.Option(envvar="MESH_ETCD", help="URLs of etcd's members, separated by commas.")]
Config = Annotated[
    Path | None,
    typer.Option(
        envvar="MESH_ETCD_CONFIG",
        help="ModelMesh's JSON with endpoints, credentials and root prefix, instead of all --etcd options.",
    ),
]
User = Annotated[str, typer.Option(envvar="MESH_ETCD_USER", help="Of etcd, where it asks for one.")]
PasswordFile = Annotated[
    Path | None, typer.Option(envvar="MESH_ETCD_PASSWORD_FILE", help="File with that user's password.")
]
Ca = Annotated[
    Path | None, typer.Option(envvar="MESH_ETCD_CA", help="PEM file: whom to trust with https. Else the system's.")
]
Cert = Annotated[
    Path | None, typer.Option(envvar="MESH_ETCD_CERT", help="PEM file: who this process is, where etcd asks.")
]
Key = Annotated[Path | None, typer.Option(envvar="MESH_ETCD_KEY", help="PEM file: the key of --etcd-cert.")]

DEFAULT_BASE = "mm/mesh"
DEFAULT_URLS = "http://127.0.0.1:2379"


def read_file(path: Path | None, option: str) -> bytes | None:
    """What is in the file that an option names. Raises BadParameter."""
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror}", param_hint=option) from error


def _path(path: Path | None) -> str:
    return str(path.absolute()) if path is not None else ""


def reach(
    *,
    base: str,
    urls: str,
    config: Path | None,
    user: str,
    password_file: Path | None,
    ca: Path | None,
    cert: Path | None,
    key: Path | None,
) -> tuple[EtcdSettings, str]:
    """How etcd is reached, and the prefix of all keys without slashes around it. Raises BadParameter."""
    base = base.strip("/")
    try:
        password = (read_file(password_file, "--etcd-password-file") or b"").decode().strip()
    except UnicodeDecodeError as error:  # whose own text would show a part of it
        raise typer.BadParameter(f"{password_file} is not text", param_hint="--etcd-password-file") from error
    given = EtcdSettings(
        endpoints=parse_urls(urls),
        user=user,
        password=password,
        ca=read_file(ca, "--etcd-ca"),
        certificate=read_file(cert, "--etcd-cert"),
        private_key=read_file(key, "--etcd-key"),
        files=EtcdFiles(password=_path(password_file), ca=_path(ca), certificate=_path(cert), private_key=_path(key)),
    )
    if config is None:
        return given, base
    from mesh.etcd import secret  # it brings gRPC, a quarter of a second that `mesh --help` should not take

    try:
        found = secret.read(config)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--etcd-config") from error
    return found.settings, f"{found.root_prefix}/{base}".strip("/")
