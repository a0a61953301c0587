"""Loads and unloads: from a path to a copy that answers calls, and back to free memory.

A load is entered on the use board before it touches the file, so that a file that kills the server can be identified
afterwards. Each load runs in its own thread (`making`). The number of loads and their time are limited. A slow load
lets others go first, and a load that cannot be ended is reported to the agent. An unload first makes the copy answer
*not here*, then waits for the copy's calls, then frees its memory. Once the unload of an id has returned, nothing of
the model is left.

The agent decides which models to load and unload, and when.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mesh.runtime.port.copies import Copies
from mesh.runtime.port.spi import STUCK
from mesh.runtime.server.calls.runs import Runs
from mesh.runtime.server.copies import ServedCopy
from mesh.runtime.server.loads.trimmer import Trimmer
from mesh.runtime.server.onnx import device, making, session
from mesh.runtime.server.onnx.device import Device
from mesh.runtime.server.workers import Lone, Workers
from mesh.runtime.sharedmemory.board import Board
from mesh.runtime.sharedmemory.slot import Row, SlotState
from mesh.runtime.turns import Turns
from mesh.schema import copytoken
from mesh.statuses import MeshError, Reason
from mesh.telemetry import logs

log = logs.get(__name__)

UNLOAD_GRACE = 30.0
"""Seconds that calls in flight are given before they are ended."""

MAX_STUCK = 4
"""Number of loads that cannot be ended at which further loads are refused. Each of them keeps a processor busy, and its
memory in use."""

_STOPPING = 5.0  # seconds that onnxruntime gets to return from a call or load that was ended


@dataclass(frozen=True, slots=True)
class Order:
    """A request to load a model."""

    model_id: str
    path: str
    token: bytes = b""  # b"": the agent sent none, calls are matched by id alone
    slot: int | None = None  # of the board
    optimised: str = ""  # path of its optimised form, if the agent has one


class _Load:
    """A load under way, until nothing of it is left running."""

    __slots__ = ("ended", "lasts", "lone", "order", "stop", "task", "thread", "turn", "waiting")

    def __init__(self, order: Order, ended: "asyncio.Future[None]") -> None:
        self.order = order
        self.stop = session.Stop()
        self.ended = ended
        self.task: asyncio.Task[ServedCopy] | None = None
        self.lone: Lone[making.Made] | None = None
        self.thread: asyncio.Future[making.Made] | None = None  # its result
        self.turn: making.Turn | None = None
        self.waiting = False  # True while it waits for a turn
        self.lasts = False  # it takes long, so others go first

    def end(self) -> None:
        """Ends the load as soon as possible."""
        self.stop.stop()
        if self.waiting and self.task is not None:
            self.task.cancel()

    def make_way(self) -> None:
        """Lets other loads go first, because this load takes long."""
        self.lasts = True
        if self.turn is not None:
            self.turn.give_up()
        if self.lone is not None:
            self.lone.make_way()


class Loader:
    """The loads and unloads of copies. Used only in the event loop's thread."""

    engine = f"onnxruntime {session.VERSION}"
    """The name of the software that runs the models, for the server's version."""

    find_device = staticmethod(device.find)
    """The function that finds the device."""

    def __init__(
        self,
        copies: Copies[ServedCopy],
        board: Board,
        runs: Runs,
        device: Device,
        *,
        timeout: float,
        concurrency: int,
        clock: Callable[[], int] = time.thread_time_ns,
    ) -> None:
        """Makes a loader. `timeout` is the time limit of one load, in seconds. `concurrency` loads may run at the same
        time, apart from those that take long. `clock` returns the processor time of the calling thread, in ns."""
        self._loop = asyncio.get_running_loop()
        self._copies = copies
        self._board = board
        self._runs = runs
        self._device = device
        self._timeout = timeout
        self._clock = clock
        self._turns = Turns(concurrency)
        self._meter = making.MemoryMeter()
        self._workers = Workers("trim", 1)
        self._stuck: set[_Load] = set()  # those that were ended and still run
        self._loading: dict[str, _Load] = {}
        self._unloading: dict[tuple[str, bytes], asyncio.Task[None]] = {}  # by id and token
        self.trimmer = Trimmer(self._workers)

    @property
    def stuck(self) -> int:
        """Number of loads that cannot be ended."""
        return len(self._stuck)

    # -- in

    async def load(self, order: Order) -> ServedCopy:
        """Loads a model and returns the copy once it can serve. Another copy of the id is unloaded first, except an
        older generation of the same registration, which keeps answering until it is unloaded. Raises `MeshError`.

        Cancellation ends the load. Nothing of it is left once `unload` of the same id has returned.
        """
        name = order.model_id
        if order.slot is not None and not 0 <= order.slot < self._board.slots:
            raise MeshError(
                Reason.BAD_REQUEST, f"there is no slot {order.slot}: the use board has {self._board.slots} slots"
            )
        while True:
            held = self._copies.all_of(name)
            for copy in held:
                if (copy.token, copy.path) == (order.token, order.path):
                    return copy
            if len(self._stuck) >= MAX_STUCK:
                text = (
                    f"the model server accepts no further loads, because {len(self._stuck)} earlier loads cannot be "
                    "ended: its agent will replace it"
                )
                raise MeshError(Reason.UNAVAILABLE, text)
            load = self._loading.get(name)
            if load is not None and load.order == order and not load.stop.asked and load.task is not None:
                return await self._join(load.task)
            if load is not None:
                await self.unload(name, token=load.order.token)
                continue
            going = [token for model_id, token in self._unloading if model_id == name]
            older = [*going, *(copy.token for copy in held)]
            if len(held) <= 1 and all(copytoken.supersedes(order.token, token) for token in older):
                break
            await self.unload(name)
        load = self._loading[name] = _Load(order, self._loop.create_future())
        load.task = asyncio.create_task(self._load(load))
        load.task.add_done_callback(_look_at)
        try:
            return await self._join(load.task)
        except asyncio.CancelledError:
            load.end()
            raise

    @staticmethod
    async def _join(task: "asyncio.Task[ServedCopy]") -> ServedCopy:
        await asyncio.wait({task})
        if task.cancelled():
            raise MeshError(Reason.CANCELLED, "the load was cancelled")
        return task.result()

    async def _load(self, load: _Load) -> ServedCopy:
        order = load.order
        started = time.monotonic()
        row = self._board.row(self._board.nobody if order.slot is None else order.slot)
        row.loading(copytoken.revision(order.token), time.monotonic_ns())
        try:
            load.waiting = True
            async with self._turns.turn(order.model_id, on_long=load.make_way), self._meter.turn() as turn:
                load.waiting = False
                load.turn = turn
                if load.lasts:  # it has already waited for too long
                    turn.give_up()
                load.lone = Lone(f"load {order.model_id}", lambda: self._made(load, turn, row.slot))
                load.thread = load.lone.future
                made = await self._in_time(load, load.thread)
        except BaseException as error:
            log.info("load failed", model=order.model_id, why=str(error) or type(error).__name__)
            if load.thread is None or load.thread.done():
                self._came_to_nothing(load, row)
            else:
                load.thread.add_done_callback(lambda _: self._came_to_nothing(load, row))
            raise
        copy = ServedCopy(
            order.model_id,
            token=order.token,
            path=order.path,
            row=row,
            session=made.session,
            host_bytes=made.host_bytes,
            device_bytes=made.device_bytes,
        )
        if made.pace is not None:
            copy.pace.note(*made.pace)
            copy.warm = True
        copy.note = made.failed and f"its warm-up call, with generated input, failed: {made.failed}"
        row.mark(SlotState.LOADED)
        self._copies.add(copy)
        self._ended(load)
        took = (time.monotonic() - started) * 1000
        log.debug(
            "model loaded",
            model=order.model_id,
            ms=took,
            host=copy.host_bytes,
            device=copy.device_bytes,
            optimised=made.optimised,
        )
        return copy

    def _made(self, load: _Load, turn: making.Turn, slot: int) -> making.Made:
        """Makes the model in the load's thread. Records the load on the board first, in case the model crashes the
        process."""
        noted = self._board.at_work.begin(slot)
        try:
            return self._make(load, turn)
        finally:
            self._board.at_work.end(noted)

    def _make(self, load: _Load, turn: making.Turn) -> making.Made:
        return making.make(
            load.order.path,
            model_id=load.order.model_id,
            optimised=load.order.optimised,
            device=self._device,
            stop=load.stop,
            meter=self._meter,
            turn=turn,
            disturbed=lambda: bool(self._runs.count or self._meter.unmeasured or self._stuck),
            clock=self._clock,
        )

    async def _in_time(self, load: _Load, thread: "asyncio.Future[making.Made]") -> making.Made:
        await asyncio.wait({thread}, timeout=self._timeout)
        if thread.done() and not load.stop.asked:
            try:
                return thread.result()
            except Exception as error:
                raise session.load_error(error) from error
        in_time = thread.done()
        load.stop.stop()
        await asyncio.wait({thread}, timeout=_STOPPING)
        if not thread.done():
            log.error("a load cannot be ended", model=load.order.model_id, seconds=self._timeout + _STOPPING)
            self._stuck.add(load)
            thread.add_done_callback(lambda _: self._stuck.discard(load))
            load.make_way()
            text = f"the model was not loaded within {self._timeout:g} s (--load-timeout), and the load cannot be ended"
            raise MeshError(Reason.DEADLINE, text, details={STUCK: "1"})
        if in_time:
            raise MeshError(Reason.CANCELLED, "the load was cancelled")
        text = f"the model was not loaded and warmed up within {self._timeout:g} s (--load-timeout)"
        raise MeshError(Reason.DEADLINE, f"{text}: if it needs longer, raise the option of its pods")

    def _came_to_nothing(self, load: _Load, row: Row) -> None:
        """Cleans up after a load that has failed and no longer runs."""
        if load.thread is not None:
            _look_at(load.thread)
            load.thread = None  # this also drops a session that nothing uses
        row.mark(SlotState.FREE)
        self._ended(load)
        self.trimmer.soon()

    def _ended(self, load: _Load) -> None:
        if self._loading.get(load.order.model_id) is load:
            del self._loading[load.order.model_id]
        load.ended.set_result(None)

    # -- out

    async def unload(self, model_id: str, *, token: bytes = b"", grace: float = UNLOAD_GRACE) -> None:
        """Unloads the copies of an id, and ends its load. Nothing of them is left afterwards. Does nothing for an
        unknown id.

        With a token, unloads only the copy with that token, or a copy without one. New calls are answered *not here*
        immediately; calls in flight get `grace` seconds before they are ended. Raises `MeshError` if a call or the load
        cannot be ended. Its memory then stays in use.
        """
        load = self._loading.get(model_id)
        if load is not None and token in (b"", load.order.token):
            load.end()
            done, _ = await asyncio.wait({load.ended}, timeout=grace + _STOPPING)
            if not done:
                raise MeshError(
                    Reason.DEADLINE,
                    f"the load of {model_id!r} cannot be ended: its memory stays in use until the server restarts",
                )
        for copy in self._copies.all_of(model_id):
            if token in (b"", copy.token) or not copy.token:
                self._unloading[model_id, copy.token] = asyncio.create_task(self._unload(copy, grace))
        tasks = [
            task
            for (name, own), task in self._unloading.items()
            if name == model_id and (token in (b"", own) or not own)
        ]
        for task in tasks:
            await asyncio.shield(task)  # it continues even if the caller is cancelled

    async def _unload(self, copy: ServedCopy, grace: float) -> None:
        self._copies.remove(copy)
        row = copy.row
        row.mark(SlotState.UNLOADING)
        try:
            if row.in_flight:
                copy.drained = self._loop.create_future()
                await asyncio.wait({copy.drained}, timeout=grace)
            if row.in_flight and copy.drained is not None:
                self._runs.stop_copy(copy)
                await asyncio.wait({copy.drained}, timeout=_STOPPING)
            if row.in_flight:
                # The slot stays taken: no other model may have it while that call can write to it.
                text = f"a call of {copy.model_id!r} cannot be ended: its memory stays in use until the server restarts"
                raise MeshError(Reason.DEADLINE, text)
            copy.session.close()
            self._meter.others -= copy.host_bytes
            self._meter.others_device -= copy.device_bytes
            row.mark(SlotState.FREE)
            log.debug("model unloaded", model=copy.model_id)
        finally:
            del self._unloading[copy.model_id, copy.token]
            self.trimmer.soon()

    async def purge(self) -> None:
        """Unloads all copies, and ends calls in flight. Logs the calls and loads that cannot be ended."""
        names = list(dict.fromkeys([*self._loading, *(copy.model_id for copy in self._copies)]))
        results = await asyncio.gather(*(self.unload(name, grace=0.0) for name in names), return_exceptions=True)
        for name, result in zip(names, results, strict=True):
            if result is not None:
                log.error("unload failed", model=name, why=str(result))

    def close(self) -> None:
        """Ends loads under way. Copies stay as they are."""
        for load in list(self._loading.values()):
            load.end()
        self.trimmer.close()
        self._workers.close()


def _look_at(future: "asyncio.Future[Any]") -> None:
    """Retrieves the error of a future, so that asyncio does not log it if no waiter is left."""
    if not future.cancelled():
        future.exception()
