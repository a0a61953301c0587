"""The part of a load that runs in a thread. It makes a session from a path, runs the session once, and measures its
size.

The size is the growth of this process's memory in use, so one load is measured at a time (`MemoryMeter.turn`). One huge
or endless model must not delay all cold starts of the pod. A load that has waited too long for its turn therefore
begins unmeasured, with a size estimated from its file, and a load that has had its turn for too long continues
unmeasured. Memory that other loads and unloads are known to change meanwhile is subtracted. The allocations of calls in
threads and of unmeasured loads are not known. While such calls or loads run, the size is kept within bounds derived
from the file.

Warm-up calls with generated input follow, unless the input would be too large. The first call bears the cost of first
calls (it allocates memory, and may never end). If it was quick, a second call shows how long a call takes. A model may
fail with generated input, so an error is only logged. If memory is lacking, or if a call does not end, the load fails.
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
"""Seconds that a load waits for its turn to be measured."""

LEAST = 32 << 10
"""Smallest size of a session, in bytes. The smallest session that was measured takes 33 KB of resident memory."""

_LONG_NS = 20_000_000
"""Duration of the first warm-up call above which no second call follows: the model's calls will run in threads
anyway."""


@dataclass(frozen=True, slots=True)
class Made:
    """A model in memory."""

    session: session.Session
    host_bytes: int  # at least 1
    device_bytes: int
    optimised: bool  # made from its optimised form
    pace: tuple[int, int] | None  # bytes of the generated input, ns that a call took; None: no warm-up, or it failed
    failed: str = ""  # why the warm-up call failed


class MemoryMeter:
    """The turn to be measured, and the changes of memory that other work causes. Used only in the event loop's thread,
    except for `others`."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self.others = 0
        """Bytes by which unmeasured loads, and unloads, have changed this process's memory so far."""
        self.others_device = 0
        """Bytes by which unmeasured loads, and unloads, have changed the device's memory in use."""
        self.unmeasured = 0
        """Number of unmeasured loads under way. Their allocations look like those of the load that is measured."""

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator["Turn"]:
        """Yields a turn. If it has not come after `MEASURING_WAIT` seconds, yields a turn without measurement."""
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
        """Gives the turn to the next load. The load that has the turn now continues unmeasured."""
        self.unmeasured += 1
        gc.enable()
        self._lock.release()


class Turn:
    """A load's turn, measured or not."""

    __slots__ = ("_meter", "measured")

    def __init__(self, meter: MemoryMeter, measured: bool) -> None:
        self._meter = meter
        self.measured = measured
        """True while this load is being measured. May become False before the load ends."""

    def give_up(self) -> None:
        """Ends the measurement of this load, if it is being measured, and gives the turn to the next load."""
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
    meter: MemoryMeter,
    turn: Turn,
    disturbed: Callable[[], bool],
    clock: Callable[[], int],
) -> Made:
    """Makes a model, in a thread. Raises `MeshError`.

    `optimised` is the path of the optimised form, which saves time if it can be used (`optimiser`). `disturbed` returns
    whether other work (calls in threads, unmeasured loads) may be allocating memory now, and `clock` returns the
    processor time of the calling thread, in ns.
    """
    file = onnxfile.find(path)
    estimate = file.bytes + file.bytes // 4 + 65536  # a quarter more, as ModelMesh's adapters estimate
    noisy = disturbed() or not memory.EXACT
    with _nothing_collected(turn) if turn.measured else contextlib.nullcontext():
        before, before_device = memory.in_use() - meter.others, device.used() - meter.others_device
        made, optimised_too = _session(file, optimised, model_id, device, stop)
        pace, failed = _warm_up(made, model_id, stop, clock)
        device_bytes = max(device.least, device.used() - meter.others_device - before_device)
        after = memory.in_use() - meter.others
    if not turn.measured:
        # With a device, the weights are on the device. Its memory is estimated too: a measurement would include other
        # loads and unloads.
        host, on_device = (LEAST, estimate + device.least) if device.least else (estimate, 0)
        meter.others += host
        meter.others_device += on_device
        return Made(made, host, on_device, optimised_too, pace, failed)
    host = after - before
    if noisy or disturbed():
        host = min(host, 8 * file.bytes + (8 << 20))
        device_bytes = min(device_bytes, 8 * file.bytes + (64 << 20))
    # Other memory that is freed meanwhile, such as a call's buffer, can make the result impossibly small.
    weights = file.bytes // 2
    if device.least:
        return Made(made, max(host, LEAST), max(device_bytes, device.least + weights), optimised_too, pace, failed)
    return Made(made, max(host, LEAST + weights), device_bytes, optimised_too, pace, failed)


@contextlib.contextmanager
def _nothing_collected(turn: Turn) -> Iterator[None]:
    """Prevents Python's garbage collector from freeing old objects during a measurement. For example, the input of a
    failed call, which the traceback keeps alive, may have megabytes."""
    gc.disable()
    try:
        yield
    finally:
        if turn.measured:  # otherwise the next load is being measured and has itself disabled the collector
            gc.enable()


def _session(
    file: onnxfile.ModelFile, optimised: str, model_id: str, device: Device, stop: session.Stop
) -> tuple[session.Session, bool]:
    """Makes the session. Returns the session, and whether it was made from the optimised form."""
    if optimised:
        try:
            return session.Session(Path(optimised), device, stop, optimised=True), True
        except MeshError as error:
            if stop.asked:
                raise
            log.warning(
                "the model itself is loaded, because its optimised form is unusable", model=model_id, why=error.text
            )
            stop.again()
    return session.Session(file.path, device, stop), False


def _warm_up(
    made: session.Session, model_id: str, stop: session.Stop, clock: Callable[[], int]
) -> tuple[tuple[int, int] | None, str]:
    """Runs the warm-up calls. Returns the size of the input and the duration of a call, or None if a call failed or the
    input would be too large, and the text of the error, or ""."""
    feed = made.made_up()
    if feed is None:
        log.info("warm-up call skipped", model=model_id, why="the declared inputs are too large")
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
            raise MeshError(Reason.CANCELLED, "the load was cancelled during its warm-up call") from error
        if session.out_of_memory(error):
            raise session.load_error(error) from error
        why = session.run_error(error, proven=False).text
        log.info("warm-up call failed", model=model_id, why=why)
        return None, why
