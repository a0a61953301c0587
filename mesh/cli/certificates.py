"""`mesh certificates`: issues the certificates for TLS inside a mesh, and renews them when they are due."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mesh.cli import options
from mesh.cli.exits import CommandError

if TYPE_CHECKING:  # cryptography is slow to import, and `mesh --help` does not need it
    from mesh.certificates import keeping
    from mesh.certificates.issuing import Wanted


def add(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command("certificates", rich_help_panel=options.PROCESSES)(certificates)


def certificates(
    secret: Annotated[
        str,
        typer.Option(
            "--secret",
            metavar="NAME",
            help="Name of the Secret to write. It must exist, and be empty before the first run. The command uses the "
            "rights of this pod's ServiceAccount.",
        ),
    ] = "",
    folder: Annotated[
        Path | None,
        typer.Option(
            "--dir", metavar="DIR", help="Folder to use instead of a Secret, for machines without Kubernetes."
        ),
    ] = None,
    days: Annotated[int, typer.Option("--days", min=2, help="Validity of a certificate, in days.")] = 365,
    renew_before: Annotated[
        int,
        typer.Option(
            "--renew-before",
            min=1,
            metavar="DAYS",
            help="Remaining validity below which a certificate is renewed, in days.",
        ),
    ] = 60,
    dns: Annotated[
        list[str] | None,
        typer.Option(
            "--dns",
            metavar="NAME",
            help="Further DNS name of the certificate, such as that of a member of etcd; may be repeated.",
        ),
    ] = None,
    timeout: options.KubeTimeout = 60.0,
    namespace: options.SecretNamespace = "",
    kube_api: options.KubeApi = "",
    kube_account: options.KubeAccount = None,
    log_format: Annotated[
        str,
        typer.Option("--log-format", envvar="MESH_LOG_FORMAT", metavar="text|json", help="Format of the log lines."),
    ] = "text",
    log_level: Annotated[
        str,
        typer.Option(
            "--log-level",
            envvar="MESH_LOG_LEVEL",
            metavar="debug|info|warning|error",
            help="Lowest level that is logged.",
        ),
    ] = "info",
) -> None:
    """Issues the certificates for TLS inside a mesh (`--internal-tls`), and renews those that are due.

    Give --secret on Kubernetes, or else --dir. The command writes four entries of the Secret, or files in the folder.
    ca.crt contains the authorities that the mesh trusts, and ca.key their keys, which no process of the mesh needs.
    Every process presents the certificate tls.crt, with the key tls.key. This certificate is valid for the name
    mesh.internal and for each --dns. Run the command once a day: certificates that are not due stay unchanged. The
    command changes nothing if the Secret or the folder contains certificates or keys that it did not issue.

    Examples:

    - `mesh certificates --dir ./tls`
    - `mesh certificates --secret mesh-internal --dns mesh-etcd-0.mesh-etcd`
    """
    if bool(secret) == (folder is not None):
        raise typer.BadParameter("give exactly one of --secret and --dir", param_hint="--secret")
    from mesh.certificates.issuing import Wanted
    from mesh.telemetry import logs

    try:
        logs.configure(level=log_level, fmt=log_format, process="certificates")  # type: ignore[arg-type]
        wanted = Wanted.of(dns or (), days=days, renew_before=renew_before)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error

    def store() -> "keeping.Store":
        from mesh.certificates import folder as folders
        from mesh.certificates import secret as secrets

        if folder is not None:
            return folders.Folder(folder.absolute())
        cluster = secrets.Cluster.of_pod(kube_api, kube_account or secrets.ACCOUNT)
        return secrets.Secret(cluster, secret, namespace=namespace, timeout=timeout)

    where = f"the Secret {secret}" if folder is None else str(folder)
    options.guarded(lambda: asyncio.run(_keep(store, wanted, where)), as_json=log_format == "json")


async def _keep(make: Callable[[], "keeping.Store"], wanted: "Wanted", where: str) -> None:
    """Renews the certificates that are due, and logs each renewal. Raises CommandError."""
    from mesh.certificates import keeping, renewal
    from mesh.telemetry import logs

    log = logs.get(__name__)
    try:
        done = await keeping.keep(make(), wanted)
    except renewal.Foreign as error:
        raise CommandError(
            f"{where} was left unchanged: {error}. To have certificates issued there, empty it first; to use your own, "
            "name them to the mesh (internalTLS.existingSecret of the chart) and do not run this command"
        ) from error
    except keeping.StoreError as error:
        raise CommandError(str(error)) from error
    for why in done.why:
        log.info(why, where=where)
    log.info(
        "the certificates are written" if done.changed else "nothing is due",
        where=where,
        days_left=round((done.expires - keeping.now()).total_seconds() / 86400, 1),
        expires=done.expires.isoformat(),
        authority_expires=done.authority_expires.isoformat(),
        names=",".join(wanted.names),
    )
