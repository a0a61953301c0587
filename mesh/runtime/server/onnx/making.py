"""The part of a load that runs in a thread: from a path to a session that has run once, with its size.

The size is the difference in this process's memory in use, so one load is measured at a time (`Meter.turn`). A load
that has waited for its turn for too long goes ahead unmeasured, with a size estimated from its file, and so does one
that has had its turn for too long: one huge or endless model must not hold up every cold start of the pod. What is
known of others' loads and unloads meanwhile is taken out of what is measured; what calls in threads and unmeasured
loads allocate cannot be, so then the size is kept within bounds that the file sets.

The first call, on made-up input, takes what first calls take (it allocates, it may not end), and the second tells how
long a call lasts. An error that the model raises on made-up input is its right, and only logged; not enough memory, or
not ending, fails the load.
"""

import asyncio
import contextlib
import gc
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mesh.runtime.server.onnx import memory, onnxfile, session
from mesh.runtime.server.onnx.device import Device
from mesh.statuses import MeshError, Reason
from mesh.telemetry import logs

log = logs.get(__name__)

MEASURING_WAIT = 2.0
"""Seconds that a load waits for another one's measuring to end."""

LEAST = 32 << 10
"""Bytes that a session takes at least: the smallest takes 33 KB of resident memory."""

_LONG_NS = 20_000_000
"""A first call that takes longer is not made a second time: it will run in threads whatever the second would say."""


@dataclass(frozen=True, slots=True)
class Made:
    """A model in memory."""

    session: session.Session
    host_bytes: int  # at least 1
    device_bytes: int
    optimised: bool  # made from its optimised form
    pace: tuple[int, int] | None  # bytes of the made-up input, ns that a call took; None: there was no call to tell
    failed: str = ""  # why the warm-up call failed


class Meter:
    """Whose turn it is to be measured, and what happened beside. For the event loop's thread, but for `others`."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self.others = 0
        """Bytes by which loads that are not measured, and unloads, have changed this process's memory so far."""
        self.others_device = 0
        """The same of the device's memory."""
        self.unmeasured = 0
        """Loads under way that are not measured: what they allocate counts as the measured one's."""

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator["Turn"]:
        """Holds a turn; without being measured after `MEASURING_WAIT`."""
        measured = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(MEASURING_WAIT):
                await self._lock.acquire()
                measured = True
        turn = Turn(self, measured)
        self.unmeasured += not measured
        try:
            yield turn
        finally:
            turn.give_up()
            self.unmeasured -= 1

    def next(self) -> None:
        """Lets the next load be measured; the measured one goes on unmeasured."""
        self.unmeasured += 1
        gc.enable()
        self._lock.release()


class Turn:
    """A load's turn to be measured, if it has got one."""

    __slots__ = ("_meter", "measured")

    def __init__(self, meter: Meter, measured: bool) -> None:
        self._meter = meter
        self.measured = measured
        """Whether this load is the only one that is measured; that may end before the load does."""

    def give_up(self) -> None:
        """Lets the next load be measured."""
        if self.measured:
            self.measured = False
            self._meter.next()


def make(
    path: str,
    *,
    model_id: str,
    optimised: str = "",
    device: Device,
    stop: session.Stop,
    meter: Meter,
    turn: Turn,
    disturbed: Callable[[], bool],
    clock: Callable[[], int],
) -> Made:
    """Makes it, in a thread. Raises `MeshError`.

    `optimised` is a path that saves time (`optimiser`), and costs some where it is not what it should be. `disturbed`
    tells whether calls run in threads at this moment; `clock` what a call cost its thread, in ns.
    """
    file = onnxfile.find(path)
    estimate = file.bytes + file.bytes // 4 + 65536  # a quarter more, as the predecessor's adapters reckon
    noisy = disturbed() or not memory.EXACT
    with _nothing_collected(turn) if turn.measured else contextlib.nullcontext():
        before, before_device = memory.in_use() - meter.others, device.used() - meter.others_device
        made, optimised_too = _session(file, optimised, model_id, device, stop)
        pace, failed = _warm_up(made, model_id, stop, clock)
        device_bytes = max(device.least, device.used() - meter.others_device - before_device)
        after = memory.in_use() - meter.others
    if not turn.measured:
        # On a device, weights are there; what others load or free there meanwhile would be measured as well.
        host, on_device = (LEAST, estimate + device.least) if device.least else (estimate, 0)
        meter.others += host
        meter.others_device += on_device
        return Made(made, host, on_device, optimised_too, pace, failed)
    host = after - before
    if noisy or disturbed():
        host = min(host, 8 * file.bytes + (8 << 20))
        device_bytes = min(device_bytes, 8 * file.bytes + (64 << 20))
    # Whatever else is freed meanwhile, a buffer of a call's, say, would make it look smaller than it can be.
    weights = file.bytes // 2
    if device.least:
        return Made(made, max(host, LEAST), max(device_bytes, device.least + weights), optimised_too, pace, failed)
    return Made(made, max(host, LEAST + weights), device_bytes, optimised_too, pace, failed)


@contextlib.contextmanager
def _nothing_collected(turn: Turn) -> Iterator[None]:
    """Keeps Python's collector from freeing, in the middle of it, what has long been garbage: an input of a failed call
    that its traceback still holds may be megabytes."""
    gc.disable()
    try:
        yield
    finally:
        if turn.measured:  # else the next one, which is measured, has disabled it for itself
            gc.enable()


def _session(
    file: onnxfile.ModelFile, optimised: str, model_id: str, device: Device, stop: session.Stop
) -> tuple[session.Session, bool]:
    """And whether it is made from the optimised form."""
    if optimised:
        try:
            return session.Session(Path(optimised), device, stop, optimised=True), True
        except MeshError as error:
            if stop.asked:
                raise
            log.warning("the optimised form cannot be used, the model itself is", model=model_id, why=error.text)
            stop.again()
    return session.Session(file.path, device, stop), False


def _warm_up(
    made: session.Session, model_id: str, stop: session.Stop, clock: Callable[[], int]
) -> tuple[tuple[int, int] | None, str]:
    """Returns what a call took, if one went well, and why it failed, if it did."""
    feed = made.made_up()
    if feed is None:
        log.info("no warm-up call", model=model_id, why="the declared inputs are too large")
        return None, ""
    size = sum(array.nbytes for array in feed.values())
    names = list(made.outputs)
    try:
        started = time.monotonic_ns()
        made.run(names, feed, stop.warm_up)
        first = time.monotonic_ns() - started
        if first > _LONG_NS:
            return (size, first), ""
        busy = clock()
        made.run(names, feed, stop.warm_up)
        return (size, clock() - busy), ""
    except Exception as error:
        if stop.asked:
            raise MeshError(Reason.CANCELLED, "the load was ended during its warm-up call") from error
        if session.out_of_memory(error):
            raise session.load_error(error) from error
        why = session.run_error(error, proven=False).text
        log.info("the warm-up call failed", model=model_id, why=why)
        return None, why
