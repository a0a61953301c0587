"""Options for the connection to etcd, shared by routers, runtime pods and admins' commands."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from mesh.options import checked, etcdsecret
from mesh.options.etcdsettings import EtcdFiles, EtcdSettings
from mesh.options.values import parse_urls

Base = Annotated[str, typer.Option(envvar="MESH_BASE", help="Prefix of the mesh's keys in etcd.")]
InstallId = Annotated[
    str,
    typer.Option(
        envvar="MESH_INSTALL_ID",
        help=(
            "Name of this mesh, the same for all its processes. They refuse a prefix in etcd that belongs to another "
            "mesh. Default: no check."
        ),
    ),
]
Urls = Annotated[str, typer.Option(envvar="MESH_ETCD", help="URLs of etcd's members, separated by commas.")]

DEFAULT_BASE = "mm/mesh"
DEFAULT_URLS = "http://127.0.0.1:2379"


@dataclass(frozen=True, slots=True)
class Login:
    """The credentials for etcd, and the authorities that etcd's certificate is checked against."""

    etcd_config: Annotated[
        Path | None,
        typer.Option(
            envvar="MESH_ETCD_CONFIG",
            help=(
                "JSON file in ModelMesh's format: endpoints, credentials and root prefix. Replaces all other --etcd "
                "options."
            ),
        ),
    ] = None
    etcd_user: Annotated[str, typer.Option(envvar="MESH_ETCD_USER", help="User name for etcd, if it requires one.")] = (
        ""
    )
    etcd_password_file: Annotated[
        Path | None, typer.Option(envvar="MESH_ETCD_PASSWORD_FILE", help="File with the password of --etcd-user.")
    ] = None
    etcd_ca: Annotated[
        Path | None,
        typer.Option(
            envvar="MESH_ETCD_CA", help="PEM file with the authorities to trust with https; default: the system's."
        ),
    ] = None
    etcd_cert: Annotated[
        Path | None,
        typer.Option(envvar="MESH_ETCD_CERT", help="PEM file with this process's certificate, if etcd requires one."),
    ] = None
    etcd_key: Annotated[
        Path | None, typer.Option(envvar="MESH_ETCD_KEY", help="PEM file with the key of --etcd-cert.")
    ] = None

    def reach(self, urls: str, *, base: str) -> tuple[EtcdSettings, str]:
        """Returns the settings for etcd, and the prefix of all keys without slashes around it. Raises BadParameter."""
        base = base.strip("/")
        try:
            password = (checked.content(self.etcd_password_file, "--etcd-password-file") or b"").decode().strip()
        except UnicodeDecodeError as error:  # the error's own text would show a part of it
            text = f"{self.etcd_password_file} is not UTF-8 text: write the password to it again"
            raise typer.BadParameter(text, param_hint="--etcd-password-file") from error
        if self.etcd_config is None:
            files = (self.etcd_password_file, self.etcd_ca, self.etcd_cert, self.etcd_key)
            given = EtcdSettings(
                endpoints=parse_urls(urls),
                user=self.etcd_user,
                password=password,
                ca=checked.content(self.etcd_ca, "--etcd-ca"),
                certificate=checked.content(self.etcd_cert, "--etcd-cert"),
                private_key=checked.content(self.etcd_key, "--etcd-key"),
                files=EtcdFiles("", "", *(str(path.absolute()) if path else "" for path in files)),
            )
            return given, base
        try:
            found = etcdsecret.read(self.etcd_config)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--etcd-config") from error
        return found.settings, f"{found.root_prefix}/{base}".strip("/")
