"""The minder of an Envoy process: it starts Envoy, waits until it is ready, restarts it when it dies, and drains it at
the end.

Envoy is a tethered child: it ends with this process, however this process ends. Its output appears in this process's
log. A start that fails raises an error with the reason in one sentence, most often that the port is taken. A later
death is only logged, and Envoy is restarted, so that clients can reconnect within a second.

`mesh.envoy.config` writes Envoy's configuration; `mesh.process` starts and tethers child processes.
"""

import asyncio
import contextlib
import json
import os
import re
import resource
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp

from mesh import process
from mesh.envoy import certificates, config, duties
from mesh.options import values as addresses
from mesh.process import ports
from mesh.process.supervisor import ChildLife, Ended, Program, StartFailed, State, Supervisor
from mesh.process.tasks import Tasks
from mesh.telemetry import logs, metrics

log = logs.get(__name__)

_LINE = re.compile(r"\[(trace|debug|info|warning|error|critical)\] ?(.*)", re.DOTALL)
_START_TIMEOUT = 20.0  # seconds; 0.1 when measured, but a machine that starts everything at once is slow
_ADMIN_TIMEOUT = 5.0
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
        "gRPC calls sent to another worker because the first took no connection.",
    ),
    (
        f"cluster.{config.GRPC_CLUSTER}.upstream_rq_pending_overflow",
        "mesh_edge_refused_calls_total",
        "counter",
        "gRPC calls refused over the bound of calls in flight.",
    ),
)


class EnvoyError(Exception):
    """An Envoy that does not start or does not answer. The text says why."""


@dataclass(frozen=True, slots=True)
class MinderStatistics:
    """The state of Envoy's process."""

    pid: int | None
    port: int
    ready: bool
    restarts: int
    last_death: str


class Minder:
    """One Envoy process and its restarts. Writes Envoy's configuration to `run_dir`, which must be private to this
    user.

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
        self._config_path = run_dir / f"{name}.json"
        self._binary = binary
        self._name = name
        self._log_level = log_level
        self._session: aiohttp.ClientSession | None = None
        self._tasks = Tasks(on_lost)
        self._supervisor = Supervisor(
            Program(
                name,
                self._spawn,
                missing=self._missing,
                ask=self._answers,  # Envoy has no heartbeat
                start_timeout=_START_TIMEOUT,
                grace=1.0,
                explain=self._explain,
            ),
            on_death=self._died,
            on_hung=on_hung,
        )
        tls = settings.tls
        self._certificates = None if tls is None else certificates.Certificates(tls, run_dir)
        self._complaints: deque[str] = deque(maxlen=5)  # its latest important lines, for the reason of a death
        self._stopping = False
        self._last_death = ""

    @property
    def port(self) -> int:
        """The port that clients use; 0 before the first start if the settings ask for any free port."""
        return self._settings.port

    @property
    def why_not_ready(self) -> str | None:
        """None if clients are served, or else the reason why they are not."""
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
        """Starts Envoy, waits until it takes calls, and returns the port. Raises EnvoyError after cleaning up."""
        try:
            settings = replace(
                self._settings,
                host=await _address_of(self._settings.host),
                secrets_dir=str(self._config_path.parent),
            )
            try:
                ports.check_free(settings.host, settings.port)
            except ports.Unusable as error:
                raise EnvoyError(f"{error}: choose another address (--listen)") from error
            self._settings = config.fit(settings, _open_files())
            self._write_config()
            self._session = aiohttp.ClientSession(
                "http://envoy",
                connector=aiohttp.UnixConnector(path=settings.admin_socket),
                timeout=aiohttp.ClientTimeout(total=_ADMIN_TIMEOUT),
            )
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
        self._stopping = True
        self._supervisor.leave()
        await self._tasks.close()
        if self._supervisor.pid is not None and grace > 0:
            try:
                async with asyncio.timeout(grace):
                    # A failed health check makes Envoy end each connection with its next reply: GOAWAY, connection:
                    # close.
                    await self._admin("POST", "/healthcheck/fail")
                    await self._admin("POST", "/drain_listeners")
                    while (await self._stats((_ACTIVE,))).get(_ACTIVE, 0):  # noqa: ASYNC110  it can only be polled
                        await asyncio.sleep(0.05)
            except TimeoutError:
                log.warning("calls in flight were cut", grace=grace)
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
            stats = await self._stats(tuple(theirs for theirs, *_ in _STATS))
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
        self._config_path.write_bytes(text)

    async def _spawn(self, _: ChildLife) -> process.Process:
        self._complaints.clear()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._settings.admin_socket)  # left by a former process: Envoy would not bind
        if self._binary is None:
            self._binary = process.find_binary("envoy")
        argv = [
            self._binary,
            *("--config-path", str(self._config_path)),
            *("--concurrency", str(self._settings.concurrency)),
            "--disable-hot-restart",  # shared memory and ids of several meshes on one machine would collide
            *("--log-level", self._log_level),
            *("--log-format", "[%l] %v"),
            "--log-format-escaped",
            *("--drain-time-s", "1"),
        ]
        child = await process.spawn(argv, name=self._name, on_line=self._on_line)
        _raise_open_files(child.pid)
        return child

    async def _missing(self) -> str:
        try:
            if (state := (await self._admin("GET", "/ready")).strip()) != "LIVE":
                return f"it says {state}"
            if self._settings.port == 0:
                port = await self._bound_port()
                self._settings = replace(self._settings, port=port)
                self._write_config()
        except EnvoyError as error:
            return str(error)  # it does not listen yet, or starts
        return ""

    async def _bound_port(self) -> int:
        listeners = json.loads(await self._admin("GET", "/listeners?format=json"))
        return int(listeners["listener_statuses"][0]["local_address"]["socket_address"]["port_value"])

    async def _answers(self) -> bool:
        try:
            await self._admin("GET", "/ready")
        except EnvoyError:
            return False
        return True

    def _explain(self, how: str, lines: tuple[str, ...]) -> str:
        why = f"Envoy {how}: {self._complained()}" if lines else f"Envoy {how}"
        if self._supervisor.starts > 1:
            self._last_death = why
        return why

    def _died(self, ended: Ended) -> None:
        self._last_death = f"it {ended.how}" if ended.hung is not None else f"{self._complained()} ({ended.how})"

    def _complained(self) -> str:
        return "; ".join(self._complaints) or "it gave no reason"

    async def _end(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()
        await self._supervisor.stop(2.0)

    async def _admin(self, method: str, path: str) -> str:
        if self._session is None:
            raise EnvoyError("Envoy is not running")
        try:
            async with self._session.request(method, path) as answer:
                text = await answer.text()
                if answer.status != 200:
                    raise EnvoyError(f"Envoy's admin interface answered {answer.status} to {path}: {text.strip()}")
                return text
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise EnvoyError(f"Envoy's admin socket does not answer: {error!r}") from error

    async def _stats(self, names: tuple[str, ...]) -> dict[str, int]:
        pattern = "|".join(re.escape(name).replace("\\", "%5C") for name in names)
        text = await self._admin("GET", f"/stats?filter=%5E({pattern})$")
        pairs = (line.rpartition(": ") for line in text.splitlines())
        return {name: int(value) for name, _, value in pairs if value.isdigit()}

    def _on_line(self, line: str) -> None:
        match = _LINE.match(line)
        level, text = (match[1], match[2]) if match else ("warning", line)
        if level in ("warning", "error", "critical"):
            self._complaints.append(text)
        if self._stopping:
            level = "debug"  # Envoy warns about each signal that we send
        getattr(log, "debug" if level == "trace" else level)("envoy says", text=text)


async def _address_of(host: str) -> str:
    """Returns an IP address of the host, because Envoy's static listener takes no names."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise EnvoyError(f"cannot listen on {host}: {error.strerror}") from error
    return str(sorted(found, key=lambda info: info[0] != socket.AF_INET)[0][4][0])


def _open_files() -> int:
    """Returns how many files Envoy may have open: the hard limit, to which `_raise_open_files` raises Envoy's limit."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1] % (1 << 31) or 1 << 20


def _raise_open_files(pid: int) -> None:
    try:
        hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))
    except OSError as error:  # Envoy has died, or a sandbox forbids the change: its limit stays as it was
        log.debug("envoy's limit on open files cannot be raised", error=str(error))
