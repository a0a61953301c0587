"""`mesh certificates`: makes the certificates for TLS inside a mesh, and renews them when they are due."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mesh.cli import options
from mesh.cli.exits import CommandError

if TYPE_CHECKING:  # cryptography takes its time: not for `mesh --help`
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
            help="A Secret that exists in this pod's namespace: kept up to date as the pod's ServiceAccount.",
        ),
    ] = "",
    folder: Annotated[
        Path | None, typer.Option("--dir", metavar="DIR", help="A folder instead, on machines without Kubernetes.")
    ] = None,
    days: Annotated[int, typer.Option("--days", min=2, help="For so long a certificate is valid.")] = 365,
    renew_before: Annotated[
        int, typer.Option("--renew-before", min=1, metavar="DAYS", help="With less than that left it is renewed.")
    ] = 60,
    dns: Annotated[
        list[str] | None,
        typer.Option("--dns", metavar="NAME", help="A further name in it, such as a member of etcd; may be repeated."),
    ] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", min=0.1, help="For the API of Kubernetes to answer.")
    ] = 60.0,
    namespace: Annotated[
        str, typer.Option("--namespace", metavar="NAME", help="Of the Secret, if it is not the pod's.")
    ] = "",
    kube_api: Annotated[str, typer.Option("--kube-api", metavar="URL", hidden=True, help="For tests.")] = "",
    kube_account: Annotated[
        Path | None, typer.Option("--kube-account", metavar="DIR", hidden=True, help="For tests: token, ca.crt.")
    ] = None,
    log_format: Annotated[
        str,
        typer.Option("--log-format", envvar="MESH_LOG_FORMAT", metavar="text|json", help="How it says what it did."),
    ] = "text",
    log_level: Annotated[
        str, typer.Option("--log-level", envvar="MESH_LOG_LEVEL", metavar="debug|info|warning|error")
    ] = "info",
) -> None:
    """Makes the certificates for TLS inside a mesh (`--internal-tls`), and renews what is due.

    There come to be: ca.crt, the authorities that the mesh trusts; ca.key, their keys, which no process of the mesh
    needs; tls.crt and tls.key, which all of them show, for the name mesh.internal and each --dns. Run it as often as
    you like, once a day is enough: what is not due stays as it is. Content that it did not make is left alone.

    Examples: `mesh certificates --dir ./tls`, `mesh certificates --secret mesh-internal --dns mesh-etcd-0.mesh-etcd`
    """
    if bool(secret) == (folder is not None):
        raise typer.BadParameter("give either --secret or --dir", param_hint="--secret")
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
    """Renews what is due, and says what it was. Raises CommandError."""
    from mesh.certificates import keeping, renewal
    from mesh.telemetry import logs

    log = logs.get(__name__)
    try:
        done = await keeping.keep(make(), wanted)
    except renewal.Foreign as error:
        raise CommandError(
            f"{where} is left as it is: {error}. To have certificates made there, empty it first; to use your own, "
            "tell the mesh where they are (internalTLS.existingSecret of the chart) and do without this command"
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
