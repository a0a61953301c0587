"""The first start of the pod's model server: its command line, its port, and the device that it finds."""

from pathlib import Path

from mesh import process
from mesh.options.values import format_address, format_bytes, parse_address
from mesh.process.supervisor import StartFailed
from mesh.runtime.agent.settings import RuntimeSettings
from mesh.runtime.blame.earlier import BOARD
from mesh.runtime.cache.assembly import Cache
from mesh.runtime.cache.disk.optimising import Optimising
from mesh.runtime.cache.evictions import capacity
from mesh.runtime.servers.commandline import OnnxLine, RelayLine
from mesh.runtime.servers.foreign import ForeignServer
from mesh.runtime.servers.serverprocess import Plan, ServerFailed, ServerProcess
from mesh.runtime.servers.spi import Status
from mesh.telemetry import logs

log = logs.get(__name__)

JOURNAL = "relay"
"""Name of the file, beside the use board, from which a new relay continues after the former one died."""

RELAY = "mesh.runtime.relay"

_PORT_TRIES = 3  # attempts if another process takes the chosen port meanwhile


class StartError(Exception):
    """A failed start of a pod. The text says what to do."""


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
    ) -> None:
        """Takes `run_dir`, which holds the use board and will hold the server's socket. A server that is not ours has
        an `address`; it is `foreign` if it is this pod's child."""
        self._settings = settings
        self._server = server
        self._cache = cache
        self._optimising = optimising
        self._incarnation = incarnation
        self._run_dir = run_dir
        self._foreign = foreign
        self._address = address

    async def start(self) -> tuple[str, str]:
        """Starts the server. Returns its address, and the device that it uses: "cpu" or "cuda". Raises StartError."""
        settings = self._settings
        host, port = parse_address(settings.data)
        if self._foreign is not None:
            try:
                await self._foreign.start()
            except StartFailed as error:
                raise StartError(f"--server-command: {error}") from error
        for attempt in range(1, _PORT_TRIES + 1):
            data = format_address(host, port or process.free_port(host))
            try:
                status = await self._server.start(self._plan(data, settings.device))
            except (ServerFailed, OSError) as error:
                if port or attempt == _PORT_TRIES or "listen" not in str(error):
                    raise StartError(str(error)) from error
                continue
            if settings.foreign:
                self._adopt(status)
                return data, ""
            device = status.told.get("mesh-device", "")
            # The pod keeps the device that "auto" has found: a server that no longer finds its GPU has failed. It must
            # not continue as a slow one whose memory is counted on a device.
            self._server.plan = self._plan(data, device or settings.device)
            self._optimising.server(status.version, device)
            self._equip(*status.device_memory)
            return data, device
        raise AssertionError("not reached")

    def _plan(self, data: str, device: str) -> Plan:
        settings = self._settings
        if settings.foreign:
            return Plan(self._relay_line(data).argv(), self._run_dir, settings.hang_timeout, relays=True, name="relay")
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

    def _relay_line(self, data: str) -> RelayLine:
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
            journal=self._run_dir / JOURNAL,
            load_timeout=0.0,
            hang_timeout=settings.hang_timeout,
        )

    def _adopt(self, status: Status) -> None:
        """Takes over what a server that is not ours reports about itself. Raises StartError."""
        capacity_bytes = self._settings.capacity or status.capacity_bytes
        if not capacity_bytes:
            raise StartError(f"the model server at {self._address} reports no capacity: set --capacity")
        load_timeout = status.load_timeout or self._settings.load_timeout
        concurrency = max(1, status.load_concurrency)
        self._cache.adopt(
            capacity_bytes=capacity_bytes,
            load_concurrency=concurrency,
            load_timeout=load_timeout,
            default_bytes=max(1, status.default_bytes),
        )
        log.info("model server in use", version=status.version, capacity=format_bytes(capacity_bytes))

    def _equip(self, used: int, total: int) -> None:
        """Makes the device's memory, as the model server reports it, available to models. Raises StartError."""
        wanted = self._settings.device_capacity
        if not total:
            if wanted:
                log.warning("--device-capacity has no effect: the model server reports no device memory")
            return
        try:
            models = capacity.device_capacity(wanted, used, total)
        except ValueError as error:
            raise StartError(f"--device-capacity: {error}") from error
        self._cache.ledger.equip(models)
        self._cache.device_memory.limit_bytes = total
        log.info("device in use", capacity=format_bytes(models), of=format_bytes(total))
