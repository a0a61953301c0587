"""`mesh keys admin`: makes the admin's key of an installed mesh, in a Secret that routers mount.

A Job of the chart runs this command. A template of the chart could not create the key: Helm would create another key at
each upgrade, or, if it renders without the cluster, at each rendering.
"""

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from mesh.cli import options
from mesh.cli.exits import CommandError

if TYPE_CHECKING:  # cryptography is slow to import, and `mesh --help` does not need it
    from mesh.certificates.keeping import Store

ENTRY = "admin.key"
"""The entry of the Secret. The chart mounts it as the file that `--admin-key-file` names."""

ATTEMPTS = 8


def admin(
    secret: Annotated[
        str,
        typer.Option(
            "--secret",
            metavar="NAME",
            help=(
                f"Name of an existing Secret. The command writes the key into its entry {ENTRY}, with the rights of "
                "this pod's ServiceAccount."
            ),
            show_default=False,
        ),
    ],
    timeout: options.KubeTimeout = 60.0,
    namespace: options.SecretNamespace = "",
    kube_api: options.KubeApi = "",
    kube_account: options.KubeAccount = None,
) -> None:
    """Creates the admin's key in a Kubernetes Secret, unless the Secret has one. The key itself is not printed.

    The chart runs this command in a Job. The holder of the key may do everything in the mesh.

    Example: `mesh keys admin --secret mesh-admin-key`
    """

    async def command() -> None:
        from mesh.certificates import secret as secrets
        from mesh.certificates.keeping import StoreError

        try:
            cluster = secrets.Cluster.of_pod(kube_api, kube_account or secrets.ACCOUNT)
            made = await filled(secrets.Secret(cluster, secret, namespace=namespace, timeout=timeout))
        except StoreError as error:
            raise CommandError(str(error)) from error
        typer.echo(f"the Secret {secret} {'now has' if made else 'already has'} an admin's key")

    options.guarded(lambda: asyncio.run(command()), as_json=False)


async def filled(store: "Store") -> bool:
    """Puts a new key into a Secret. Returns False if the Secret already has a key. Raises StoreError."""
    from mesh.certificates.keeping import StoreError
    from mesh.schema import auth

    for _ in range(ATTEMPTS):
        content: Mapping[str, bytes]
        content, version = await store.read()
        if content.get(ENTRY, b"").strip():
            return False
        if await store.write({**content, ENTRY: auth.fresh().encode()}, version):
            return True
    raise StoreError(f"another process changed the Secret during each of {ATTEMPTS} attempts to write it: try again")
