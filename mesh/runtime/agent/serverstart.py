"""The first start of the pod's model server: its command line, its port, and the device that it finds.

The listening socket of a relay's data port belongs to the agent, and each relay inherits it. After a relay has died,
connections wait in the socket's queue for the next relay, and are not refused.
"""

import socket
from pathlib import Path

from mesh import process
from mesh.options.values import format_address, format_bytes, parse_address
from mesh.process import ports
from mesh.process.supervisor import StartFailed
from mesh.runtime.agent.settings import RuntimeSettings
from mesh.runtime.blame.earlier import BOARD
from mesh.runtime.cache.assembly import Cache
from mesh.runtime.cache.disk.optimising import Optimising
from mesh.runtime.cache.evictions import capacity
from mesh.runtime.servers import adapted
from mesh.runtime.servers.commandline import OnnxLine, RelayLine
from mesh.runtime.servers.foreign import ForeignServer
from mesh.runtime.servers.serverprocess import Plan, ServerFailed, ServerProcess
from mesh.runtime.servers.spi import Status
from mesh.telemetry import logs
from placement.account import stated

log = logs.get(__name__)

JOURNAL = "relay"
"""Name of the file, beside the use board, from which a new relay continues the work of one that has died."""

RELAY = "mesh.runtime.relay"

_BACKLOG = 4096  # connections that may wait for a relay; the kernel cuts it to its own limit
_PORT_TRIES = 3  # attempts if another process takes the chosen port meanwhile


class StartError(Exception):
    """A failed start of a pod. The text says why."""


class ServerStart:
    """The start of one pod's model server."""

    def __init__(
        self,
        settings: RuntimeSettings,
        server: ServerProcess,
        cache: Cache,
        optimising: Optimising,
        *,
        incarnation: str,
        run_dir: Path,
        foreign: ForeignServer | None,
        address: str,
        calls: str,
    ) -> None:
        """Makes a start that has not begun. `run_dir` contains the use board, and will contain the server's socket.
        `address` is the address of a foreign server, `calls` its address for inference calls. `foreign` is the foreign
        server if this pod starts it, otherwise None."""
        self._settings = settings
        self._server = server
        self._cache = cache
        self._optimising = optimising
        self._incarnation = incarnation
        self._run_dir = run_dir
        self._foreign = foreign
        self._address = address
        self._calls = calls
        self._listening: socket.socket | None = None  # the relay's data port

    async def start(self) -> tuple[str, str]:
        """Starts the server. Returns the address of its data port, and the device that it uses: "cpu", "cuda", or "" if
        it reports none. Raises StartError."""
        settings = self._settings
        host, port = parse_address(settings.data)
        if settings.foreign:
            return await self._start_relay(host, port)
        for attempt in range(1, _PORT_TRIES + 1):
            data = format_address(host, port or process.free_port(host))
            try:
                status = await self._server.start(self._plan(data, settings.device))
            except (ServerFailed, OSError) as error:
                if port or attempt == _PORT_TRIES or "listen" not in str(error):
                    raise StartError(str(error)) from error
                continue
            device = status.told.get("mesh-device", "")
            # The pod keeps the device that "auto" has found: a server that no longer finds its GPU has failed. It must
            # not continue as a slow one whose memory is counted on a device.
            self._server.plan = self._plan(data, device or settings.device)
            self._optimising.server(status.version, device)
            self._equip(*status.device_memory)
            return data, device
        raise AssertionError("not reached")

    async def _start_relay(self, host: str, port: int) -> tuple[str, str]:
        """Starts the relay, and before it the foreign server if this pod has one as a child. Returns the address of the
        data port, and the device: "cuda" if the server reports a device's memory, or else ""."""
        if self._foreign is not None:
            try:
                await self._foreign.start()
            except StartFailed as error:
                raise StartError(str(error)) from error
        self._listening = listening = _listen(host, port)
        data = format_address(host, listening.getsockname()[1])
        plan = Plan(
            self._relay_line(data, listening.fileno()).argv(),
            self._run_dir,
            self._settings.hang_timeout,
            relays=True,
            name="relay",
            pass_fds=(listening.fileno(),),
        )
        try:
            status = await self._server.start(plan)
        except (ServerFailed, OSError) as error:
            raise StartError(str(error)) from error
        await self._adopt(status)
        self._equip(*status.device_memory)
        return data, "cuda" if self._cache.ledger.has_device else ""

    def stop_listening(self) -> None:
        """Closes this process's socket of the relay's data port, so that connections are refused once the relay closes
        its own."""
        if self._listening is not None:
            self._listening.close()

    def _plan(self, data: str, device: str) -> Plan:
        settings = self._settings
        line = OnnxLine(
            module=settings.server_module,
            data=data,
            incarnation=self._incarnation,
            board=self._run_dir / BOARD,
            capacity=settings.capacity,
            threads=settings.threads,
            load_timeout=settings.load_timeout,
            load_concurrency=settings.load_concurrency,
            device=device,
            max_message=settings.max_message,
            max_body_bytes=settings.max_body_bytes,
            internal_tls=settings.internal_tls,
            memory_limit=self._cache.memory.limit_bytes,
            log_format=settings.log_format,
            log_level=settings.log_level,
        )
        return Plan(line.argv(), self._run_dir, settings.hang_timeout)

    def _relay_line(self, data: str, listening: int) -> RelayLine:
        settings = self._settings
        return RelayLine(
            module=RELAY,
            data=data,
            incarnation=self._incarnation,
            board=self._run_dir / BOARD,
            max_message=settings.max_message,
            max_body_bytes=settings.max_body_bytes,
            internal_tls=settings.internal_tls,
            log_format=settings.log_format,
            log_level=settings.log_level,
            server=self._address,
            calls=self._calls,
            journal=self._run_dir / JOURNAL,
            egress=settings.egress,
            direct_calls=settings.direct_calls,
            data_socket=listening,
            load_timeout=settings.load_timeout if settings.adapter else 0.0,
            hang_timeout=settings.hang_timeout,
            adapter=settings.adapter,
            server_models=settings.server_models or self._run_dir / adapted.MODELS,
            metrics=settings.server_metrics,
            allow_code=settings.allow_code,
            server_rest=settings.server_rest,
        )

    async def _adopt(self, status: Status) -> None:
        """Applies what a foreign server reports about itself. Raises StartError."""
        capacity_bytes = self._settings.capacity or stated(status.capacity_bytes)
        if not capacity_bytes:
            text = f"the model server at {self._address} reports no capacity"
            raise StartError(f"{text}: set --capacity, or --server-memory-limit for a server with an adapter")
        load_timeout = status.load_timeout or self._settings.load_timeout
        concurrency = max(1, status.load_concurrency)
        await self._cache.adopt(
            capacity_bytes=capacity_bytes,
            load_concurrency=concurrency,
            load_timeout=load_timeout,
            default_bytes=max(1, stated(status.default_bytes)),
        )
        log.info("model server in use", version=status.version, capacity=format_bytes(capacity_bytes))

    def _equip(self, used: int, total: int) -> None:
        """Gives models the memory of a device of `total` bytes, of which `used` are in use. Does nothing if `total` is
        0. Raises StartError."""
        wanted = self._settings.device_capacity
        if not total:
            if wanted:
                log.warning("--device-capacity has no effect: the model server reports no device memory")
            return
        try:
            models = capacity.device_capacity(wanted, used, total)
        except ValueError as error:
            raise StartError(f"--device-capacity: {error}" if wanted else str(error)) from error
        self._cache.ledger.equip(models)
        self._cache.device_memory.limit_bytes = total
        log.info("device in use", capacity=format_bytes(models), of=format_bytes(total))


def _listen(host: str, port: int) -> socket.socket:
    """Listens on an address. Port 0 means any free port. Raises StartError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for attempt in range(1, _PORT_TRIES + 1):
        chosen = port or process.free_port(host)
        try:
            return socket.create_server((host, chosen), family=family, backlog=_BACKLOG)
        except OSError as error:
            if port or attempt == _PORT_TRIES:
                address = format_address(host, chosen)
                raise StartError(
                    f"cannot listen on {address} (--data): {ports.reason(error)}; choose another address"
                ) from error
    raise AssertionError("not reached")
