"""The model server's process: its parts, its start and its end.

The process ends at SIGTERM, and gives calls in flight a few seconds to finish. It ignores SIGINT: Ctrl-C reaches the
whole process group, and the agent decides when this process ends. The agent, which starts the server, makes sure that
the server does not outlive the agent.

The memory limit is set last, so that it applies to what models need, and not to what the server needs for its start.
The first session of a process takes 1.4 MB that are never freed. The test of the device makes this session before the
limit is set.
"""

import asyncio
import functools
import gc
import os
import signal
import sys
import time

from mesh.identity import Identity, IdentityError
from mesh.options.values import format_address, format_bytes
from mesh.process import ports
from mesh.process.ending import Ending
from mesh.process.tasks import Tasks, turned
from mesh.runtime import duties
from mesh.runtime.port.boards import CannotStart, open_board
from mesh.runtime.port.copies import Copies
from mesh.runtime.port.spi import listen
from mesh.runtime.server.calls.dataport import DataPort
from mesh.runtime.server.calls.runs import Runs
from mesh.runtime.server.calls.watch import CallWatch
from mesh.runtime.server.copies import ServedCopy
from mesh.runtime.server.loads.loader import Loader
from mesh.runtime.server.onnx import device, memory
from mesh.runtime.server.settings import ServerSettings
from mesh.runtime.server.spi import Spi
from mesh.runtime.server.v2.blocks import Blocks
from mesh.runtime.sharedmemory.board import Board
from mesh.telemetry import logs
from mesh.wire.budget import Budget
from mesh.wire.server import Server

log = logs.get(__name__)

_GRACE = 5.0  # seconds that calls in flight get at SIGTERM
_STOPPING = 5.0  # further seconds for the orderly end of a server that cannot continue
_BEAT = 1.0  # seconds
_SWITCH = 0.001
"""Seconds after which the loop yields the GIL to a thread that has finished its run. With Python's default of 5 ms,
results would reach callers 5 ms later whenever the loop is busy."""


async def serve(settings: ServerSettings, loading: type[Loader] | None = None) -> int:
    """Serves until SIGTERM, or until the process cannot continue. Returns the exit status. Raises `CannotStart`.

    `loading` makes models from files in place of ONNX Runtime. It is the only part that the tests' fake server
    replaces.
    """
    loop = asyncio.get_running_loop()
    leave = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, leave.set)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.setswitchinterval(_SWITCH)

    board = open_board(settings.board, settings.incarnation)
    try:
        identity = Identity(settings.internal_tls) if settings.internal_tls is not None else None
    except IdentityError as error:
        raise CannotStart(str(error)) from error
    try:
        used = (loading or Loader).find_device(settings.device)
    except device.DeviceError as error:
        raise CannotStart(str(error)) from error
    # On a device, a call mostly waits, which would also hold up the loop.
    clock = time.thread_time_ns if used.name == "cpu" else time.monotonic_ns
    copies: Copies[ServedCopy] = Copies()
    watch = CallWatch()
    runs = Runs(board, threads=settings.threads, clock=clock, device=used.name)
    loader = (loading or Loader)(
        copies,
        board,
        runs,
        used,
        timeout=settings.load_timeout,
        concurrency=settings.load_concurrency,
        clock=clock,
    )
    port = DataPort(copies, board, runs, watch, max_message=settings.max_message)
    budget = Budget(settings.max_body_bytes)
    blocks = Blocks()
    data = Server(port.handle, max_message=settings.max_message, budget=budget, memory=blocks.memory)
    try:
        bound = await data.listen_tcp(settings.host, settings.port, identity=identity)
    except (OSError, RuntimeError) as error:
        wanted = format_address(settings.host, settings.port)
        raise CannotStart(
            f"cannot listen on {wanted} (--data): {ports.reason(error)}; choose another address"
        ) from error
    address = format_address(settings.host, bound)
    servicer = Spi(settings, loader, copies, used, data_address=address, pid=os.getpid())
    try:
        spi = await listen(servicer, settings.spi)
    except (OSError, RuntimeError) as error:
        raise CannotStart(f"cannot serve the SPI on {settings.spi} (--spi): {error}") from error
    limit = 0
    if settings.memory_limit:
        try:
            limit = memory.limit(settings.memory_limit)
        except ValueError as error:
            raise CannotStart(str(error)) from error
        log.info("memory is limited", resident=format_bytes(settings.memory_limit), data=format_bytes(limit))
    gc.collect()
    gc.freeze()  # what exists now is permanent: the collector need not visit it again
    board.attach(os.getpid())
    ending = Ending()
    tasks = Tasks(ending.because)
    tasks.run(duties.BEAT, functools.partial(_beat, board, loader, runs, used, budget, blocks))
    if identity is not None:
        tasks.run(duties.SERVER_CERTIFICATES, identity.run)
        if limit:
            tasks.run(duties.TLS_MEMORY, functools.partial(_make_room, data, limit))
    log.info("model server ready", data=address, device=used.name, threads=settings.threads)
    ends, left = asyncio.ensure_future(ending.wait()), asyncio.ensure_future(leave.wait())
    try:
        await asyncio.wait({ends, left}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        ends.cancel()
        left.cancel()

    async def close() -> None:
        log.info("model server is shutting down", calls=runs.count)
        await data.close(_GRACE)
        await port.close()
        await runs.close()
        loader.close()
        await spi.stop(1.0)
        watch.close()
        await tasks.close()
        board.beat(time.monotonic_ns())

    return await ending.close(close(), within=_GRACE + _STOPPING)


async def _beat(board: Board, loader: Loader, runs: Runs, used: device.Device, budget: Budget, blocks: Blocks) -> None:
    refused = 0
    while True:
        turned()
        board.beat(time.monotonic_ns(), device_bytes=used.used(), stuck=loader.stuck + runs.stuck)
        loader.trimmer.look()
        if budget.settle():
            blocks.trim()
            loader.trimmer.soon()
        if budget.refused != refused:
            count = budget.refused - refused
            log.warning("requests are refused: the bodies in flight fill --max-body-bytes", count=count)
            refused = budget.refused
        await asyncio.sleep(_BEAT)


async def _make_room(data: Server, limit: int) -> None:
    """Raises the memory limit by the bytes that TLS connections reserve and do not use."""
    given = 0
    while True:
        wanted = data.statistics().connections * memory.TLS_CONNECTION
        turned()
        if wanted != given:
            given = wanted
            memory.widen(limit + wanted)
        await asyncio.sleep(_BEAT)
