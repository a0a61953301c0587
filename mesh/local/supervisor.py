"""All parts of a local mesh: started in order, supervised, and stopped in the opposite order.

etcd starts first, because everything else needs it. Then the pods and the router start together. The router stops
first, so that no call reaches a pod that is stopping. etcd stops last, so that the pods can still remove their keys
from it. Every part ends with this process, even if this process is killed with SIGKILL.
"""

import asyncio
import contextlib
import signal
import time
from collections.abc import Awaitable, Callable, Iterator

import aiohttp

from mesh.etcdserver import single
from mesh.local import duties, parts
from mesh.local.child import Child, ChildStatistics
from mesh.local.folder import DataFolder
from mesh.local.lines import Printer
from mesh.local.settings import LOOPBACK, UpError, UpSettings
from mesh.options.values import format_address, parse_address
from mesh.process import ports
from mesh.process.ending import Ending
from mesh.process.tasks import Tasks
from mesh.telemetry import logs

log = logs.get(__name__)

_ETCD_NOISE = ("simple token is not cryptographically signed", "grpc: addrConn.createTransport failed to connect")
"""Warnings of etcd at every start and end, which need no action on a single machine."""


class LocalMesh:
    """The parts of a local mesh. `run` creates it, and handles signals, the data folder and the terminal."""

    def __init__(
        self, settings: UpSettings, folder: DataFolder, printer: Printer, session: aiohttp.ClientSession
    ) -> None:
        self.settings = settings
        port = settings.etcd_port or ports.free_port()
        self.etcd_url = f"http://{LOOPBACK}:{port}"
        try:
            self._binary = single.find()
        except single.NoEtcd as error:
            raise UpError(str(error)) from error
        pods = [
            parts.LocalPod(settings, number, etcd_url=self.etcd_url, session=session)
            for number in range(1, settings.all_pods + 1)
        ]
        self.capacity = pods[0].capacity  # bytes of each pod

        def etcd_line(name: str, line: str) -> None:
            if not any(text in line for text in _ETCD_NOISE):
                printer.line(name, line)

        self._etcd = Child(parts.etcd(settings, binary=self._binary, port=port, session=session), etcd_line)
        self._pods = [Child(pod.part(), printer.line) for pod in pods]
        router = parts.router(settings, etcd_url=self.etcd_url, run_dir=folder.run_dir, session=session)
        self._router = Child(router, printer.line)
        self.ending = Ending()
        self._tasks = Tasks(self.ending.because)

    def statistics(self) -> tuple[ChildStatistics, ...]:
        """Returns the statistics of every child, in the order of their start."""
        return tuple(child.statistics() for child in self._children)

    @property
    def _children(self) -> list[Child]:
        return [self._etcd, *self._pods, self._router]

    async def start(self) -> None:
        """Starts all parts and waits until they are ready. Raises UpError with the reason."""
        settings = self.settings
        try:
            version = await asyncio.to_thread(single.version, self._binary)
        except single.NoEtcd as error:
            raise UpError(str(error)) from error
        if warning := single.version_warning(version):
            log.warning(warning, binary=self._binary)
        settings.samples_dir.mkdir(parents=True, exist_ok=True)
        await self._start(self._etcd)
        starts = [asyncio.ensure_future(self._start(child)) for child in [*self._pods, self._router]]
        try:
            await asyncio.gather(*starts)
        finally:  # if one part has failed, the others need not wait
            for start in starts:
                start.cancel()
            await asyncio.gather(*starts, return_exceptions=True)

    async def _start(self, child: Child) -> None:
        began = time.monotonic()
        log.info("starting", part=child.part.name)
        await child.start()
        log.info("ready", part=child.part.name, seconds=round(time.monotonic() - began, 1))
        self._tasks.run(duties.PART, child.run, child.part.name)

    async def stop(self) -> None:
        """Stops all parts: the router first, then the pods, and etcd last."""
        for child in self._children:
            child.leave()  # no part may be started again, whichever ends first
        await self._router.stop()
        await asyncio.gather(*(pod.stop() for pod in self._pods))
        await self._etcd.stop()
        await self._tasks.close()

    def kill(self) -> None:
        """Kills all parts immediately."""
        for child in reversed(self._children):
            child.kill()


async def run(settings: UpSettings, printer: Printer, on_ready: Callable[[LocalMesh], Awaitable[None]]) -> None:
    """Runs a mesh until a signal ends it, or nobody reads its output any more. Raises UpError if it cannot be started
    or cannot continue.

    `on_ready` is awaited once all parts are ready. The first SIGINT, SIGTERM or SIGHUP stops the mesh in order, the
    second kills it.
    """
    settings.check()
    with DataFolder(settings.data_dir) as folder:
        _check_ports(settings)
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        # Called when the reader of the pipe has ended, as in `mesh up | head`.
        printer.on_broken = lambda: loop.call_soon_threadsafe(stopping.set)
        async with aiohttp.ClientSession() as session:
            mesh = LocalMesh(settings, folder, printer, session)
            with _signals(mesh, stopping, printer):
                try:
                    await _until(stopping, _serve(mesh, on_ready))
                finally:
                    log.info("stopping")
                    await mesh.stop()
        log.info("stopped, everything is down")


async def _serve(mesh: LocalMesh, on_ready: Callable[[LocalMesh], Awaitable[None]]) -> None:
    await mesh.start()
    await on_ready(mesh)
    raise UpError(await mesh.ending.wait())  # unless a signal comes first


async def _until(stopping: asyncio.Event, serving: Awaitable[None]) -> None:
    """Waits until `serving` ends, and raises its error if it has one. Cancels `serving` as soon as the event is set."""
    tasks = [asyncio.ensure_future(serving), asyncio.ensure_future(stopping.wait())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    if isinstance(results[0], BaseException) and not isinstance(results[0], asyncio.CancelledError):
        raise results[0]


@contextlib.contextmanager
def _signals(mesh: LocalMesh, stopping: asyncio.Event, printer: Printer) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def received() -> None:
        if stopping.is_set():
            printer.text("killing everything")
            mesh.kill()
        else:
            printer.text("\nstopping (interrupt again to kill everything immediately)")
            stopping.set()

    for number in numbers:
        loop.add_signal_handler(number, received)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _check_ports(settings: UpSettings) -> None:
    check_free(settings.listen, "--listen")
    check_free(settings.probe, "--probe")
    if settings.edge != "envoy":
        check_free(settings.rest_listen, "--rest-listen")
    if settings.etcd_port:
        check_free(f"{LOOPBACK}:{settings.etcd_port}", "--etcd-port")


def check_free(address: str, option: str) -> None:
    """Checks that a server can listen on `address`. Otherwise raises UpError, which says what to do, because the error
    of a child would be less clear."""
    host, port = parse_address(address)
    try:
        ports.check_free(host, port)
    except ports.Taken as error:
        example = str(port + 1) if option == "--etcd-port" else format_address(host, port + 1)
        why = f"port {port} is taken by another program: choose another with {option} {example}"
        raise UpError(why) from error
    except ports.Forbidden as error:
        raise UpError(f"port {port} may not be used by this user: choose one above 1023 with {option}") from error
    except ports.Unusable as error:
        raise UpError(f"{error}; choose another with {option}") from error
