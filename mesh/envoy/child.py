"""One Envoy process, for `minder` (the edge) and `egress`: its command line, its admin interface, and its output.

Envoy is a tethered child: it ends with this process, however this process ends. Its output appears in this process's
log. A supervisor decides when it is started.
"""

import contextlib
import os
import re
import resource
from collections import deque
from pathlib import Path

import aiohttp

from mesh import process
from mesh.telemetry import logs

log = logs.get(__name__)

_LINE = re.compile(r"\[(trace|debug|info|warning|error|critical)\] ?(.*)", re.DOTALL)
_ADMIN_TIMEOUT = 5.0


class EnvoyError(Exception):
    """An Envoy that does not start or does not answer. The text says why."""


class EnvoyChild:
    """An Envoy process, which can be started several times. Its configuration is in `run_dir`, which must be private to
    this user."""

    def __init__(
        self, *, run_dir: Path, admin_socket: str, name: str, binary: str | None = None, log_level: str = "warning"
    ) -> None:
        """Makes a child without starting it. `name` appears in log lines. `binary` defaults to the installed Envoy."""
        self.config_path = run_dir / f"{name}.json"
        self.quiet = False  # it is being stopped: Envoy warns about each signal that we send
        self._admin_socket = admin_socket
        self._name = name
        self._binary = binary
        self._log_level = log_level
        self._session: aiohttp.ClientSession | None = None
        self._complaints: deque[str] = deque(maxlen=5)  # its latest important lines, for the reason of a death

    def open(self) -> None:
        """Makes the client of the admin interface."""
        self._session = aiohttp.ClientSession(
            "http://envoy",
            connector=aiohttp.UnixConnector(path=self._admin_socket),
            timeout=aiohttp.ClientTimeout(total=_ADMIN_TIMEOUT),
        )

    async def close(self) -> None:
        """Closes the client of the admin interface."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def spawn(self, concurrency: int) -> process.Process:
        """Starts Envoy with its configuration. `concurrency` is the number of its threads. Raises OSError."""
        self._complaints.clear()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._admin_socket)  # left by a former process: Envoy would not bind
        if self._binary is None:
            self._binary = process.find_binary("envoy")
        argv = [
            self._binary,
            *("--config-path", str(self.config_path)),
            *("--concurrency", str(concurrency)),
            "--disable-hot-restart",  # shared memory and ids of several meshes on one machine would collide
            *("--log-level", self._log_level),
            *("--log-format", "[%l] %v"),
            "--log-format-escaped",
            *("--drain-time-s", "1"),
        ]
        child = await process.spawn(argv, name=self._name, on_line=self._on_line)
        _raise_open_files(child.pid)
        return child

    @property
    def complained(self) -> str:
        """The latest warnings and errors in Envoy's output, or a text that says that there are none."""
        return "; ".join(self._complaints) or "it gave no reason"

    async def missing(self) -> str:
        """Returns the reason why Envoy does not accept calls yet, or "" if it does."""
        try:
            state = (await self.admin("GET", "/ready")).strip()
        except EnvoyError as error:
            return str(error)  # it does not listen yet, or starts
        return "" if state == "LIVE" else f"it says {state}"

    async def answers(self) -> bool:
        """Returns whether the admin interface answers. Its answers serve as signs of life, because Envoy has no
        heartbeat."""
        try:
            await self.admin("GET", "/ready")
        except EnvoyError:
            return False
        return True

    async def admin(self, method: str, path: str) -> str:
        """Sends a request to the admin interface, and returns the answer's text. Raises EnvoyError."""
        if self._session is None:
            raise EnvoyError("Envoy is not running")
        try:
            async with self._session.request(method, path) as answer:
                text = await answer.text()
                if answer.status != 200:
                    raise EnvoyError(f"Envoy's admin interface answered {answer.status} to {path}: {text.strip()}")
                return text
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise EnvoyError(f"Envoy's admin interface gave no answer: {str(error) or 'it timed out'}") from error

    async def stats(self, names: tuple[str, ...]) -> dict[str, int]:
        """Returns the statistics with these names. Raises EnvoyError."""
        pattern = "|".join(re.escape(name).replace("\\", "%5C") for name in names)
        text = await self.admin("GET", f"/stats?filter=%5E({pattern})$")
        pairs = (line.rpartition(": ") for line in text.splitlines())
        return {name: int(value) for name, _, value in pairs if value.isdigit()}

    def _on_line(self, line: str) -> None:
        match = _LINE.match(line)
        level, text = (match[1], match[2]) if match else ("warning", line)
        if level in ("warning", "error", "critical"):
            self._complaints.append(text)
        if self.quiet:
            level = "debug"
        getattr(log, "debug" if level == "trace" else level)("envoy says", text=text)


def open_files() -> int:
    """Returns how many files Envoy may have open: the hard limit, to which `spawn` raises Envoy's limit."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1] % (1 << 31) or 1 << 20


def _raise_open_files(pid: int) -> None:
    try:
        hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))
    except OSError as error:  # Envoy has died, or a sandbox forbids the change: its limit stays as it was
        log.debug("Envoy's limit on open files cannot be raised", error=str(error))
