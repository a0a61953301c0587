"""The relay's process: its parts, its start and its shutdown.

The relay ends at SIGTERM, if one of its essential tasks ends, or when the server is lost. In the last case, its exit
status says what happened to the server (`port.outcomes`). The server is not a child of the relay, so that it outlives a
relay that dies: it is a child of the agent, or was started by others.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable

from mesh.envoy.child import EnvoyError
from mesh.envoy.egress import ADMIN, EgressMinder, EgressSettings
from mesh.identity import Identity, IdentityError
from mesh.options.values import format_address
from mesh.process import ports
from mesh.process.ending import Ending
from mesh.process.tasks import Tasks, turned
from mesh.runtime import duties
from mesh.runtime.port.boards import CannotStart, open_board
from mesh.runtime.port.spi import listen
from mesh.runtime.relay.adapters import choice, devicemetrics
from mesh.runtime.relay.calls import RelayPort
from mesh.runtime.relay.directegress import DirectEgress
from mesh.runtime.relay.egress import Egress
from mesh.runtime.relay.envoyegress import EnvoyEgress
from mesh.runtime.relay.grpcegress import GrpcEgress
from mesh.runtime.relay.journal import Journal
from mesh.runtime.relay.link import Link
from mesh.runtime.relay.settings import RelaySettings
from mesh.runtime.relay.silence import Silence
from mesh.runtime.relay.spi import RelaySpi
from mesh.runtime.relay.table import Table
from mesh.runtime.relay.translating import TranslatingEgress
from mesh.runtime.sharedmemory.board import Board
from mesh.telemetry import logs
from mesh.wire.budget import Budget
from mesh.wire.pieces import Pieces
from mesh.wire.server import Server

log = logs.get(__name__)

_GRACE = 5.0  # seconds for calls in flight after SIGTERM
_STOPPING = 5.0  # further seconds for an orderly end of a relay that cannot continue
_BEAT = 1.0  # seconds
_LAST_WORDS = 0.05  # seconds for answers to calls that were never sent, once the server is lost


async def serve(settings: RelaySettings) -> int:
    """Relays calls until SIGTERM, or until an essential task ends. Returns the exit status. If the server is lost,
    exits the process immediately instead. Raises CannotStart."""
    loop = asyncio.get_running_loop()
    leave = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, leave.set)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the group, but the agent ends this process
    board = open_board(settings.board, settings.incarnation)
    try:
        identity = Identity(settings.internal_tls) if settings.internal_tls is not None else None
    except IdentityError as error:
        raise CannotStart(str(error)) from error
    journal = Journal(settings.journal)
    table = Table(board, journal)
    managed = choice.managed(
        settings.adapter,
        settings.server_models,
        load_timeout=settings.load_timeout,
        allow_code=settings.allow_code,
        rest=settings.server_rest,
    )
    link = Link(
        settings.server,
        table,
        hang_timeout=settings.hang_timeout,
        max_message=settings.max_message,
        calls=settings.calls,
        managed=devicemetrics.measured(managed, settings.metrics) if settings.metrics else managed,
    )
    budget = Budget(settings.max_body_bytes)
    ending = Ending()
    tasks = Tasks(ending.because)
    egress = await _egress(settings, link, budget, on_lost=ending.because)
    if (translation := choice.translation(settings.adapter)) is not None:
        egress = TranslatingEgress(egress, translation, max_message=settings.max_message)
    elif settings.direct_calls:
        address = settings.calls or settings.server
        egress = DirectEgress(egress, address, max_message=settings.max_message, budget=budget)
    question = choice.question(settings.adapter, link.channel)
    silence = None if question is None else Silence(link, question, hang_timeout=settings.hang_timeout)
    port = RelayPort(table, board, link, egress, max_message=settings.max_message, silence=silence)
    pieces = Pieces(wanted=port.forwards)
    data = Server(port.handle, max_message=settings.max_message, budget=budget, pieces=pieces)
    left = journal.read()
    if left is not None and not left[1]:
        left = None  # no copies would be lost if the server dropped its models
    if left is not None:
        link.control.resume(former=journal.former)
    board.attach(os.getpid(), keep=() if left is None else [one.slot for one in left[1]])
    tasks.run(duties.BEAT, lambda: _beat(board, budget, link))
    try:
        bound = await _listen(data, settings, identity)
    except (OSError, RuntimeError) as error:
        wanted = format_address(settings.host, settings.port)
        raise CannotStart(
            f"cannot listen on {wanted} (--data): {ports.reason(error)}; choose another address"
        ) from error
    address = format_address(settings.host, bound)
    servicer = RelaySpi(settings, link, table, port, tasks, data_address=address, pid=os.getpid(), silence=silence)
    if left is not None:
        status, held = left
        try:
            table.resume(status, held, named=link.control.name)
        except OSError as error:
            raise CannotStart(f"cannot write the journal (--journal): {error}") from error
        servicer.resume(status)
        log.info("relay continues with the copies of the former one", copies=len(held))
    try:
        server = await listen(servicer, settings.spi)
    except (OSError, RuntimeError) as error:
        raise CannotStart(f"cannot serve the SPI on {settings.spi} (--spi): {error}") from error
    if identity is not None:
        tasks.run(duties.SERVER_CERTIFICATES, identity.run)

    async def follow() -> None:
        await servicer.ready.wait()
        await link.run(resumed=left is not None)

    tasks.run(duties.LINK, follow)
    tasks.run(duties.LINK_WATCH, link.watch)
    if silence is not None:
        tasks.run(duties.SILENCE, silence.run)
    log.info("relay ready", data=address, server=settings.server)
    link.ended.add_done_callback(lambda _: leave.set())
    ends, leaving = asyncio.ensure_future(ending.wait()), asyncio.ensure_future(leave.wait())
    try:
        await asyncio.wait({ends, leaving}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        ends.cancel()
        leaving.cancel()
    if link.ended.done():
        journal.discard()
        await asyncio.sleep(_LAST_WORDS)
        copies = (*table.copies, *table.going.values())
        if servicer.blocked:
            for copy in copies:
                copy.row.accuse(False)
        elif silence is not None:
            silence.mark(copies)
        # At once: tasks that are cancelled would take their work from the use board, which shows it to the agent.
        logging.shutdown()
        sys.stderr.flush()
        os._exit(link.ended.result())

    async def close() -> None:
        log.info("relay is shutting down", calls=port.in_flight)
        await data.close(_GRACE)
        await egress.close()
        await server.stop(1.0)
        await tasks.close()
        await link.close()
        board.beat(time.monotonic_ns())

    return await ending.close(close(), within=_GRACE + _STOPPING)


async def _egress(settings: RelaySettings, link: Link, budget: Budget, *, on_lost: Callable[[str], None]) -> Egress:
    if settings.egress == "grpc":
        return GrpcEgress(link, max_message=settings.max_message)
    folder = settings.spi.parent
    ends = EgressSettings(
        listen=str(folder / "egress"),
        admin_socket=str(folder / ADMIN),
        server=settings.calls or settings.server,
    )
    minder = EgressMinder(ends, run_dir=folder, on_lost=on_lost)
    try:
        await minder.start()
    except EnvoyError as error:
        raise CannotStart(f"{error}. Correct this, or use --egress grpc") from error
    return EnvoyEgress(minder, ends.listen, max_message=settings.max_message, budget=budget)


async def _listen(data: Server, settings: RelaySettings, identity: Identity | None) -> int:
    """Starts to listen on the data port, on the agent's socket if the agent has passed one on. Returns the port."""
    if settings.data_socket is None:
        return await data.listen_tcp(settings.host, settings.port, identity=identity)
    inherited = socket.socket(fileno=settings.data_socket)
    inherited.setblocking(False)
    inherited.set_inheritable(False)
    await data.listen_on(inherited, identity=identity)
    return int(inherited.getsockname()[1])


async def _beat(board: Board, budget: Budget, link: Link) -> None:
    refused = 0
    while True:
        turned()
        board.beat(time.monotonic_ns(), device_bytes=link.device_bytes)
        budget.settle()
        if budget.refused != refused:
            count = budget.refused - refused
            log.warning("requests are refused: the bodies in flight fill --max-body-bytes", count=count)
            refused = budget.refused
        await asyncio.sleep(_BEAT)
