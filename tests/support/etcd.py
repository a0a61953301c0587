"""A real etcd for tests, and the faults that can be injected into it.

The etcd is started with the command line that `mesh up` uses, and ends with the test process. It runs without fsync,
which saves seconds and matters only in a power failure.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from mesh import process
from mesh.etcd import Etcd
from mesh.etcdserver.single import etcd_argv
from mesh.options.etcdsettings import EtcdSettings

START_TIMEOUT = 30.0


class EtcdServer:
    """One etcd on loopback with its data in `folder`. `with` and `async with` start and end it.

    Starting it needs no event loop, so one etcd can serve many tests that each have their own loop.
    """

    def __init__(
        self,
        folder: Path,
        *,
        extra: Sequence[str] = (),
        scheme: str = "http",
        settings: EtcdSettings | None = None,
    ) -> None:
        self.folder = folder
        self.log = folder.with_name(folder.name + ".log")
        self.port = process.free_port()
        self.endpoint = f"{scheme}://127.0.0.1:{self.port}"
        self.settings = settings or EtcdSettings(endpoints=(self.endpoint,))
        self._scheme = scheme
        self._peer_port = process.free_port()
        self._extra = extra
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._child is not None, "etcd is not started"
        return self._child.pid

    @property
    def running(self) -> bool:
        """True if the etcd was started and the tests have not ended it."""
        return self._child is not None

    def launch(self) -> None:
        """Starts the etcd with its existing data, without waiting."""
        assert self._child is None, "etcd is started already"
        argv = etcd_argv(process.find_binary("etcd"), self.folder, self.port, self._peer_port, "test")
        if self._scheme == "https":
            argv = [arg.replace(f"http://127.0.0.1:{self.port}", self.endpoint) for arg in argv]
        with self.log.open("ab") as log:
            self._child = subprocess.Popen(
                process.tethered([*argv, "--unsafe-no-fsync", *self._extra]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _is_ready(self) -> bool:
        assert self._child is not None
        if self._child.poll() is not None:
            status, self._child = self._child.returncode, None
            raise AssertionError(f"etcd {process.describe_exit(status)}: {self.log.read_text()[-2000:]}")
        if self._scheme == "https":  # /health would need the test's certificates, so listening must be enough
            return process_listens(self.port)
        try:
            with urllib.request.urlopen(f"{self.endpoint}/health", timeout=1.0) as reply:
                return reply.status == 200
        except OSError:
            return False

    def start_now(self) -> None:
        """Starts the etcd and blocks until it answers, without an event loop."""
        self.launch()
        end = time.monotonic() + START_TIMEOUT
        while not self._is_ready():
            assert time.monotonic() < end, f"etcd is not ready after {START_TIMEOUT} s: {self.log.read_text()[-2000:]}"
            time.sleep(0.02)

    async def start(self) -> None:
        """Starts the etcd and waits until it answers."""
        self.launch()
        async with asyncio.timeout(START_TIMEOUT):
            while not await asyncio.to_thread(self._is_ready):
                await asyncio.sleep(0.02)

    def kill9(self) -> None:
        """Sends SIGKILL. `start()` starts the etcd again on the same data and port."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Sends SIGTERM, as in an orderly shutdown."""
        self._end(signal.SIGTERM)

    def _end(self, number: int) -> None:
        if self._child is not None:
            child, self._child = self._child, None
            child.send_signal(number)
            child.send_signal(signal.SIGCONT)  # frozen, it would never see SIGTERM
            child.wait(10)

    def freeze(self) -> None:
        """Sends SIGSTOP: connections stay open, but nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def etcdctl(self, *args: str, stdin: str = "") -> str:
        """Runs etcdctl against the etcd and returns its output."""
        done = subprocess.run(
            [process.find_binary("etcdctl"), f"--endpoints={self.endpoint}", *args],
            env={**os.environ, "ETCDCTL_API": "3"},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=20,
        )
        assert done.returncode == 0, f"etcdctl {args}: {done.stderr}"
        return done.stdout

    async def compact(self) -> int:
        """Compacts all history, and returns the revision up to which history is gone."""
        async with Etcd(self.settings) as etcd:
            revision = (await etcd.status()).revision
            await etcd.compact(revision, physical=True)
            return revision

    def __enter__(self) -> "EtcdServer":
        try:
            self.start_now()
        except BaseException:
            self.kill9()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill9()

    async def __aenter__(self) -> "EtcdServer":
        try:
            await self.start()
        except BaseException:
            self.kill9()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self.kill9()


def process_listens(port: int) -> bool:
    import socket

    with contextlib.closing(socket.socket()) as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0
