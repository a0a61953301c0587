"""`python -m mesh.runtime`: the command line of a runtime pod. Each option can also be set in the environment, as
MESH_OPTION."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Coroutine
from typing import Annotated, Any

import typer
import uvloop

from mesh.host import cpus
from mesh.options import checked, groups, startup, tls
from mesh.options import etcd as etcdoptions
from mesh.options.logs import Logging
from mesh.process import begin_beating
from mesh.runtime.agent import options
from mesh.runtime.agent.lifecycle import Agent
from mesh.runtime.agent.serverstart import StartError
from mesh.runtime.agent.settings import SERVER, RuntimeSettings
from mesh.telemetry import logs

log = logs.get("mesh.runtime")

_SERVER_GRACE = 8.0  # seconds for the model server to end
_STOPPING = 20.0  # seconds beyond those, for the orderly end of a pod that cannot continue

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@groups.expanded
def main(
    *,
    name: Annotated[
        str, typer.Option(envvar="MESH_NAME", help="Name of this pod, unique in the mesh; default: the host name.")
    ] = "",
    addresses: options.Addresses,
    base: etcdoptions.Base = etcdoptions.DEFAULT_BASE,
    install_id: etcdoptions.InstallId = "",
    etcd: etcdoptions.Urls = etcdoptions.DEFAULT_URLS,
    login: etcdoptions.Login,
    labels: Annotated[
        str,
        typer.Option(
            envvar="MESH_LABELS",
            help="List of labels of this pod, separated by commas; cpu or gpu is added according to the hardware.",
        ),
    ] = "",
    zone: Annotated[
        str, typer.Option(envvar="MESH_ZONE", help="Zone of this pod; copies of a model are spread over zones.")
    ] = "",
    memory: options.Memory,
    storage: options.Storage,
    work: options.Work,
    server: options.ModelServer,
    membership: options.Membership,
    logging: Logging,
) -> None:
    """Runs a runtime pod: an agent, and the model server that it starts or finds. It needs the etcd of the mesh, and
    gets its calls from routers (mesh router).

    Sizes are numbers of bytes, or have a unit, such as 64MiB.

    Example: mesh runtime --etcd http://127.0.0.1:2379 --capacity 4GiB --file-root /models"""
    logging.configure("agent")
    with startup.refusals(log):
        memory.check()
        server.check()
        reached, base = login.reach(etcd, base=base)
        address = server.address()
        models, limit = memory.split(foreign=server.foreign, at_hand=server.at_hand())
        device, disk, rate = memory.device_capacity, storage.disk_budget, storage.pull_bandwidth
        settings = RuntimeSettings(
            name=name or socket.gethostname(),
            base=base,
            install_id=install_id,
            data=checked.address(addresses.data, "--data"),
            control=checked.address(addresses.control, "--control"),
            probe=checked.address(addresses.probe, "--probe"),
            internal_tls=tls.check(addresses.internal_tls),
            advertise=addresses.advertise,
            capacity=models,
            memory_limit=limit,
            etcd=reached,
            labels=tuple(label.strip() for label in labels.split(",") if label.strip()),
            zone=zone,
            model_dir=storage.model_dir.absolute() if storage.model_dir else None,
            file_roots=tuple(root.absolute() for root in storage.file_root or ()),
            http_allow_private=storage.http_allow_private,
            storage_config=storage.storage_config.absolute() if storage.storage_config else None,
            storage_ca=checked.content(storage.storage_ca, "--storage-ca"),
            proxies=storage.proxies(),
            pvc_root=storage.pvc_root.absolute() if storage.pvc_root else None,
            disk_budget=None if disk == "auto" else checked.size(disk, "--disk-budget"),
            pull_bandwidth=0 if rate == "0" else checked.size(rate, "--pull-bandwidth"),
            pull_connections=storage.pull_connections,
            load_timeout=work.load_timeout,
            load_concurrency=work.load_concurrency or max(2, cpus.available()),
            threads=work.threads or cpus.available(),
            device=memory.device,
            device_capacity=0 if device == "auto" else checked.size(device, "--device-capacity"),
            lease_ttl=membership.lease_ttl,
            serve_without_etcd=checked.span(membership.serve_without_etcd, "--serve-without-etcd", unlimited="forever"),
            demand_window=memory.demand_window,
            drain_timeout=work.drain_timeout,
            eviction=memory.eviction,
            max_message=checked.size(work.max_message, "--max-message"),
            max_body_bytes=work.body_bytes(),
            hang_timeout=work.hang_timeout,
            server_module=work.server_module,
            server=address,
            types=server.served(ours=not server.foreign and work.server_module == SERVER),
            server_command=server.server_command,
            server_calls=server.calls(),
            server_rest=server.rest(),
            adapter=server.adapter,
            server_models=server.server_models.absolute() if server.server_models else None,
            allow_code=server.allow_code,
            server_metrics=server.metrics(),
            egress=server.carrier(),
            direct_calls=server.direct_calls,
            server_memory=server.server_memory,
            server_memory_limit=server.memory_limit(),
            check_interval=membership.check_interval,
            log_format=logging.log_format,
            log_level=logging.log_level,
        )
    raise typer.Exit(uvloop.run(serve(settings)))


async def serve(settings: RuntimeSettings) -> int:
    """Runs the pod until a signal, or until it cannot continue. SIGTERM or SIGINT drains it, and a second signal ends
    it immediately. Returns the exit status: 0 after a signal, and 1 if the pod could not start or continue."""
    loop = asyncio.get_running_loop()
    leave, at_once = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (at_once if leave.is_set() else leave).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    begin_beating()
    try:
        agent = Agent(settings)
    except (OSError, ValueError) as error:
        log.error("the pod cannot start", why=str(error))
        return 1
    status, grace = 0, _SERVER_GRACE
    ends, left, hurried = (
        asyncio.ensure_future(known) for known in (agent.ending.wait(), leave.wait(), at_once.wait())
    )
    try:
        if await _until(agent.start(), left, ends):
            await asyncio.wait({left, ends}, return_when=asyncio.FIRST_COMPLETED)
            if not ends.done() and not await _until(agent.drain(), hurried, ends):
                grace = 0.0
        elif not ends.done():
            grace = 0.0
    except StartError as error:
        log.error("the pod cannot start", why=str(error))
        status = 1
    finally:
        for known in (ends, left, hurried):
            known.cancel()
        status = await agent.ending.close(agent.close(grace=grace), within=grace + _STOPPING) or status
    return status


async def _until(work: Coroutine[Any, Any, None], *ends: asyncio.Future[Any]) -> bool:
    """Awaits `work`, but cancels it as soon as one of `ends` is done. Returns whether the work was finished. Raises the
    work's errors."""
    task = asyncio.ensure_future(work)
    await asyncio.wait({task, *ends}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
        return True
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    return False


if __name__ == "__main__":
    app(prog_name="mesh runtime")
