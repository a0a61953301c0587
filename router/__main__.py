"""`python -m router`: the command line of a router pod. Each option can also be set by an environment variable, such as
MESH_WORKERS for `--workers`."""

import os
import socket
from typing import Annotated

import typer
import uvloop

from mesh.options import checked, groups, startup, tls
from mesh.options import etcd as etcdoptions
from mesh.options.logs import Logging
from mesh.telemetry import logs
from router.process import options, pod
from router.settings import RouterSettings

log = logs.get("router")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@groups.expanded
def main(
    *,
    edge: options.Edge,
    workers: Annotated[
        str, typer.Option(envvar="MESH_WORKERS", help="Number of worker processes; auto: one for every two CPUs.")
    ] = "auto",
    name: Annotated[str, typer.Option(envvar="MESH_NAME", help="Name of this router; default: the host name.")] = "",
    base: etcdoptions.Base = etcdoptions.DEFAULT_BASE,
    install_id: etcdoptions.InstallId = "",
    etcd: etcdoptions.Urls = etcdoptions.DEFAULT_URLS,
    login: etcdoptions.Login,
    run_dir: Annotated[
        str,
        typer.Option(
            envvar="MESH_RUN_DIR",
            help="Folder for sockets, with a short path and for this user only; default: a temporary one.",
        ),
    ] = "",
    default_vmodel_owner: Annotated[
        str,
        typer.Option(
            envvar=["MESH_DEFAULT_VMODEL_OWNER", "MM_DEFAULT_VMODEL_OWNER"],
            help="Owner of aliases that are created without one; default: none.",
        ),
    ] = "",
    methods: options.Methods,
    access: options.AccessControl,
    tokens: options.TokenOptions,
    limits: options.RouterLimits,
    logging: Logging,
) -> None:
    """Runs a router: one endpoint in front of all models of a mesh. It needs the etcd of the mesh, and forwards calls
    to runtime pods (mesh runtime).

    Sizes are numbers of bytes, or have a unit, such as 64MiB.

    Example: mesh router --etcd http://127.0.0.1:2379 --listen 0.0.0.0:8033 --auth required --admin-key-file
    admin.key"""
    edge.check()
    methods.check()
    access.check()
    tokens.check(access.auth)
    logging.configure("router")
    with startup.refusals(log):
        internal = tls.check(edge.internal_tls)
        reached, base = login.reach(etcd, base=base)
        settings = RouterSettings(
            name=name or socket.gethostname(),
            base=base,
            install_id=install_id,
            listen=checked.address(edge.listen, "--listen"),
            management_listen=edge.management_listen and checked.address(edge.management_listen, "--management-listen"),
            edge=edge.edge,
            tls_certificate=str(edge.tls_cert.absolute()) if edge.tls_cert else "",
            tls_key=str(edge.tls_key.absolute()) if edge.tls_key else "",
            tls_client_ca=str(edge.tls_client_ca.absolute()) if edge.tls_client_ca else "",
            tls_client_auth=edge.tls_client_auth or "require",
            internal_tls=str(internal) if internal else "",
            connection_age=edge.connection_age,
            rest_listen=checked.address(edge.rest_listen, "--rest-listen"),
            probe=checked.address(edge.probe, "--probe"),
            workers=options.workers(workers),
            run_dir=run_dir and os.path.abspath(run_dir),
            etcd=reached,
            max_message=checked.size(limits.max_message, "--max-message"),
            max_forwarded_message=checked.size(limits.max_forwarded_message, "--max-forwarded-message"),
            max_body_bytes=limits.body_bytes(),
            min_body_rate=checked.size(limits.min_body_rate, "--min-body-rate"),
            edge_memory=checked.size(limits.edge_memory, "--edge-memory"),
            max_connections_per_pod=limits.max_connections_per_pod,
            load_wait=limits.load_wait,
            unload_wait=limits.unload_wait,
            max_waiters=limits.max_waiters,
            max_waiters_per_model=limits.max_waiters_per_model,
            max_waiting_bytes=checked.size(limits.max_waiting_bytes, "--max-waiting-bytes"),
            reregister_after=checked.span(limits.reregister_after, "--reregister-after", unlimited="never"),
            multi_parallelism=methods.multi_parallelism,
            dataplane=methods.dataplane_config,
            dataplane_path=str(methods.dataplane_config_path.absolute()) if methods.dataplane_config_path else "",
            default_vmodel_owner=default_vmodel_owner,
            auth=access.auth,
            audit=access.trail(),
            grants_file=str(access.grants_file.absolute()) if access.grants_file else "",
            admin_key_file=str(access.admin_key_file.absolute()) if access.admin_key_file else "",
            tokens=tokens.settings(),
            drain=limits.drain_timeout,
            log_format=logging.log_format,
            log_level=logging.log_level,
        )
    if warning := access.warning(edge.listen, *((edge.rest_listen,) if edge.edge == "grpc" else ())):
        log.warning(warning)
    try:
        status = uvloop.run(pod.run(settings))
    except (pod.StartError, ValueError) as error:
        typer.echo(f"router: {error}", err=True)
        raise typer.Exit(1) from error
    raise typer.Exit(status)


if __name__ == "__main__":
    app(prog_name="mesh router")
