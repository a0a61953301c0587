"""The minder of an Envoy process: it starts Envoy, waits until it is ready, restarts it when it dies, and drains it at
the end.

A start that fails raises an error with the reason in one sentence, most often that the port is taken. A later death is
only logged, and Envoy is restarted, so that clients can reconnect within a second.

`mesh.envoy.config` writes Envoy's configuration, and `mesh.envoy.child` is the process.
"""

import asyncio
import json
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mesh import process
from mesh.envoy import certificates, config, duties
from mesh.envoy.child import EnvoyChild, EnvoyError, open_files
from mesh.options import values as addresses
from mesh.process import ports
from mesh.process.supervisor import ChildLife, Ended, Program, StartFailed, State, Supervisor
from mesh.process.tasks import Tasks
from mesh.telemetry import logs, metrics

__all__ = ["EnvoyError", "Minder", "MinderStatistics"]

log = logs.get(__name__)

_START_TIMEOUT = 20.0  # seconds; 0.1 when measured, but a machine that starts everything at once is slow
_ACTIVE = f"http.{config.STAT_PREFIX}.downstream_rq_active"

# The few of Envoy's thousands of statistics that become metrics: (theirs, ours, kind, help).
_STATS = (
    (f"http.{config.STAT_PREFIX}.downstream_cx_active", "mesh_edge_connections", "gauge", "Open client connections."),
    (f"http.{config.STAT_PREFIX}.downstream_cx_total", "mesh_edge_connections_total", "counter", "Client connections."),
    (_ACTIVE, "mesh_edge_calls_in_flight", "gauge", "Calls in flight at the edge."),
    (f"http.{config.STAT_PREFIX}.downstream_rq_total", "mesh_edge_calls_total", "counter", "Calls at the edge."),
    (
        f"http.{config.STAT_PREFIX}.downstream_cx_overload_reject",
        "mesh_edge_refused_connections_total",
        "counter",
        "Connections refused over the bound.",
    ),
    (
        f"cluster.{config.GRPC_CLUSTER}.upstream_rq_retry",
        "mesh_edge_retries_total",
        "counter",
        "gRPC calls sent to another worker because the first accepted no connection.",
    ),
    (
        f"cluster.{config.GRPC_CLUSTER}.upstream_rq_pending_overflow",
        "mesh_edge_refused_calls_total",
        "counter",
        "gRPC calls refused over the bound of calls in flight.",
    ),
)


@dataclass(frozen=True, slots=True)
class MinderStatistics:
    """The state of Envoy's process."""

    pid: int | None
    port: int
    ready: bool
    restarts: int
    last_death: str


class Minder:
    """The Envoy at the edge of a router pod: one process and its restarts. Envoy's configuration is in `run_dir`, which
    must be private to this user.

    With `settings.port` 0, the first start takes a free port and restarts keep it. `name` appears in log lines.
    """

    def __init__(
        self,
        settings: config.EnvoySettings,
        *,
        run_dir: Path,
        binary: str | None = None,
        name: str = "envoy",
        log_level: str = "warning",
        on_hung: Callable[[], None] = lambda: None,
        on_lost: Callable[[str], None] = lambda why: None,
    ) -> None:
        """Makes a minder. `on_hung` is called before a hanging Envoy is killed, `on_lost` with the reason if an
        essential task of the minder ends."""
        self._settings = settings
        self._name = name
        self._run_dir = run_dir
        self._child = EnvoyChild(
            run_dir=run_dir, admin_socket=settings.admin_socket, name=name, binary=binary, log_level=log_level
        )
        self._tasks = Tasks(on_lost)
        self._supervisor = Supervisor(
            Program(
                name,
                self._spawn,
                missing=self._missing,
                ask=self._child.answers,
                start_timeout=_START_TIMEOUT,
                grace=1.0,
                explain=self._explain,
            ),
            on_death=self._died,
            on_hung=on_hung,
        )
        tls = settings.tls
        self._certificates = None if tls is None else certificates.Certificates(tls, run_dir)
        self._last_death = ""

    @property
    def port(self) -> int:
        """The port that clients use; 0 before the first start if the settings ask for any free port."""
        return self._settings.port

    @property
    def why_not_ready(self) -> str | None:
        """The reason why clients are not served, or None if they are."""
        if self._supervisor.state is State.READY:
            return self._supervisor.trouble
        return f"Envoy is not running: {self._last_death}" if self._last_death else "Envoy has not started yet"

    def statistics(self) -> MinderStatistics:
        """Returns the current state."""
        return MinderStatistics(
            pid=self._supervisor.pid,
            port=self.port,
            ready=self._supervisor.state is State.READY,
            restarts=max(0, self._supervisor.starts - 1),
            last_death=self._last_death,
        )

    async def start(self) -> int:
        """Starts Envoy, waits until it accepts calls, and returns the port. If the start fails, cleans up and raises
        EnvoyError, or OSError if the configuration cannot be written."""
        try:
            settings = replace(
                self._settings,
                host=await _address_of(self._settings.host, "--listen"),
                secrets_dir=str(self._run_dir),
            )
            try:
                ports.check_free(settings.host, settings.port)
            except ports.Unusable as error:
                raise EnvoyError(f"{error}: choose another address (--listen)") from error
            if (door := settings.management) is not None:
                door = replace(door, host=await _address_of(door.host, "--management-listen"))
                try:
                    ports.check_free(door.host, door.port)
                except ports.Unusable as error:
                    raise EnvoyError(f"{error}: choose another address (--management-listen)") from error
                settings = replace(settings, management=door)
            self._settings = config.fit(settings, open_files())
            self._write_config()
            self._child.open()
            await self._supervisor.start()
        except BaseException as error:
            await self._end()
            if isinstance(error, StartFailed):
                raise EnvoyError(str(error)) from error
            raise
        self._tasks.run(duties.EDGE, self._supervisor.run)
        if self._certificates is not None:
            self._tasks.run(duties.EDGE_CERTIFICATE, self._certificates.run)
        address = addresses.format_address(self._settings.host, self.port)
        log.info("edge listens", address=address, pid=self._supervisor.pid)
        return self.port

    async def stop(self, grace: float = 10.0) -> None:
        """Closes the listener, waits up to `grace` seconds for calls in flight to end, and stops Envoy. Never
        raises."""
        self._child.quiet = True
        self._supervisor.leave()
        await self._tasks.close()
        if self._supervisor.pid is not None and grace > 0:
            try:
                async with asyncio.timeout(grace):
                    # A failed health check makes Envoy end each connection with its next reply: GOAWAY, connection:
                    # close.
                    await self._child.admin("POST", "/healthcheck/fail")
                    await self._child.admin("POST", "/drain_listeners")
                    while (await self._child.stats((_ACTIVE,))).get(_ACTIVE, 0):  # noqa: ASYNC110  it can only be polled
                        await asyncio.sleep(0.05)
            except TimeoutError:
                log.warning("calls in flight were ended", grace=grace)
            except EnvoyError as error:
                log.warning("draining failed", error=str(error))
        await self._end()

    def follow(self, registry: metrics.Registry) -> None:
        """Adds the metrics of Envoy's certificate, if it has one."""
        if self._certificates is not None:
            self._certificates.follow(registry)

    async def snapshot(self) -> metrics.Snapshot:
        """Returns a few of Envoy's own statistics, and its memory and CPU time, to merge with the workers' metrics."""
        pid = self._supervisor.pid
        if pid is None:
            return {"metrics": []}
        try:
            stats = await self._child.stats(tuple(theirs for theirs, *_ in _STATS))
        except EnvoyError:
            stats = {}
        found: list[dict[str, Any]] = [
            {
                "name": name,
                "type": kind,
                "help": help_text,
                "labels": [],
                "merge": "sum",
                "buckets": [],
                "series": [[[], stats[theirs]]],
            }
            for theirs, name, kind, help_text in _STATS
            if theirs in stats
        ]
        return {"metrics": [*found, *metrics.process_snapshot(self._name, pid)["metrics"]]}

    def _write_config(self) -> None:
        try:
            if self._certificates is not None:
                self._certificates.start()
            text = config.encode(self._settings)
        except ValueError as error:
            raise EnvoyError(str(error)) from error
        self._child.config_path.write_bytes(text)

    async def _spawn(self, _: ChildLife) -> process.Process:
        return await self._child.spawn(self._settings.concurrency)

    async def _missing(self) -> str:
        if missing := await self._child.missing():
            return missing
        if self._settings.port == 0:
            try:
                port = await self._bound_port()
            except EnvoyError as error:
                return str(error)
            self._settings = replace(self._settings, port=port)
            self._write_config()
        return ""

    async def _bound_port(self) -> int:
        listeners = json.loads(await self._child.admin("GET", "/listeners?format=json"))
        return int(listeners["listener_statuses"][0]["local_address"]["socket_address"]["port_value"])

    def _explain(self, how: str, lines: tuple[str, ...]) -> str:
        why = f"Envoy {how}: {self._child.complained}" if lines else f"Envoy {how}"
        if self._supervisor.starts > 1:
            self._last_death = why
        return why

    def _died(self, ended: Ended) -> None:
        self._last_death = f"it {ended.how}" if ended.hung is not None else f"{self._child.complained} ({ended.how})"

    async def _end(self) -> None:
        await self._child.close()
        await self._supervisor.stop(2.0)


async def _address_of(host: str, option: str) -> str:
    """Returns an IP address of the host, because Envoy's static listener does not accept names."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        text = f"the host {host} in {option} cannot be resolved ({error.strerror}): correct it"
        raise EnvoyError(text) from error
    return str(sorted(found, key=lambda info: info[0] != socket.AF_INET)[0][4][0])
