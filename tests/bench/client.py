"""Callers in Python, in a separate process: for large messages, for schedules, and in place of a missing h2load or wrk.

    python -m tests.bench.client < ORDER

runs one `Order` and prints its outcome as JSON. Callers are threads, each with a grpcio channel or an HTTP connection
and one call at a time (a closed loop), or one event loop that calls by a schedule (an open loop). In an open loop the
time of a call begins when it was *due*, even if the generator or the server was late. So a server that stops for a
second makes all calls of that second late, instead of only one.
"""

import asyncio
import ctypes
import gc
import http.client
import json
import os
import pickle
import random
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
import httptools
import uvloop

from tests.bench.door import METHOD, Door

_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
]
_TIMEOUT = 60.0  # seconds for a call
_CHANNELS = 4  # channels of an open loop over gRPC
_BACKLOG = 2.0
"""Seconds of the schedule that may be unanswered at once. A server that is further behind does not keep up, and its
latency would only measure the length of the run."""

PERCENTILES = (0.5, 0.99, 0.999)


@dataclass(frozen=True, slots=True)
class Order:
    """A load on one door: a closed loop, or an open loop if `rate` is given."""

    door: Door
    seconds: float
    callers: int = 1  # number of callers of a closed loop
    rate: float = 0.0  # calls a second of an open loop; 0: a closed loop
    seed: int = 0  # seed of the schedule


@dataclass(frozen=True, slots=True)
class Outcome:
    calls: int
    seconds: float
    cpu: float  # seconds of CPU that the generator took
    percentiles: tuple[float, ...] = ()  # the latencies at PERCENTILES, in seconds
    lag: float = 0.0  # seconds by which the generator sent calls late, the 99th percentile
    behind: bool = False  # the server did not keep up with the schedule

    @property
    def rate(self) -> float:
        return self.calls / self.seconds

    @property
    def share(self) -> float:
        """The generator's share of one core."""
        return self.cpu / self.seconds


def call(order: Order) -> Outcome:
    """Runs an order in a separate process. Raises RuntimeError if a call fails, and TimeoutExpired if the process takes
    two minutes longer than the order."""
    argv = [sys.executable, "-m", "tests.bench.client"]
    done = subprocess.run(argv, input=pickle.dumps(order), capture_output=True, timeout=order.seconds + 120)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise RuntimeError(f"calls to {order.door.url}: {lines[-1] if lines else done.returncode}")
    return Outcome(**json.loads(done.stdout))


def _percentiles(times: list[float]) -> tuple[float, ...]:
    if len(times) < 2:
        return ()
    cuts = statistics.quantiles(times, n=1000, method="inclusive")
    return tuple(cuts[round(share * 1000) - 1] for share in PERCENTILES)


# -- a closed loop


def _caller(door: Door) -> Callable[[], int]:
    """Returns a function that makes one call on its own connection and returns the answer's size in bytes, or 0 for an
    HTTP status other than 200."""
    if door.kind == "grpc":
        infer = grpc.insecure_channel(door.address, options=_OPTIONS).unary_unary(METHOD)
        metadata = list(door.headers.items())
        return lambda: len(infer(door.body, timeout=_TIMEOUT, metadata=metadata))
    connection = http.client.HTTPConnection(door.address, timeout=_TIMEOUT)
    space = bytearray(1 << 16)

    def post() -> int:
        connection.request("POST", door.path, door.body, dict(door.headers))
        with connection.getresponse() as response:
            size = 0
            while count := response.readinto(space):
                size += count
            return size if response.status == http.HTTPStatus.OK else 0

    return post


def _closed(order: Order) -> Outcome:
    ready = threading.Barrier(order.callers)

    def caller() -> list[float]:
        call = _caller(order.door)
        call()  # makes the connection, and is not counted
        ready.wait()
        times = []
        began = now = time.perf_counter()
        while now - began < order.seconds:
            size = call()
            times.append(-now + (now := time.perf_counter()))
            if size < order.door.answer:
                raise RuntimeError(f"an answer has {size} bytes instead of {order.door.answer}")
        return times

    cpu = time.process_time()
    with ThreadPoolExecutor(order.callers) as pool:
        found = [future.result() for future in [pool.submit(caller) for _ in range(order.callers)]]
    cpu = time.process_time() - cpu
    times = [seconds for each in found for seconds in each]
    # Each caller counts by its own time, because the last call of one may end long after those of the others.
    rate = sum(len(each) / sum(each) for each in found)
    return Outcome(len(times), len(times) / rate, cpu, _percentiles(times))


# -- an open loop


class Alarm:
    """A timer with the kernel's precision. Event loops round to whole milliseconds, which is longer than a call."""

    def __init__(self, ring: Callable[[], None]) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK)
        if self._descriptor < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._ring = ring
        asyncio.get_running_loop().add_reader(self._descriptor, self._rings)

    def _rings(self) -> None:
        os.read(self._descriptor, 8)
        self._ring()

    def set(self, when: float) -> None:
        """Rings at a time of `time.monotonic()`, or at once if it has passed."""
        nanoseconds = max(int(when * 1e9), 1)
        spec = struct.pack("qqqq", 0, 0, nanoseconds // 10**9, nanoseconds % 10**9)
        if self._libc.timerfd_settime(self._descriptor, 1, spec, None):
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def close(self) -> None:
        """Stops the timer for good."""
        asyncio.get_running_loop().remove_reader(self._descriptor)
        os.close(self._descriptor)


Send = Callable[[Callable[[int], None]], None]
"""Sends one call. The function that it is given gets the answer's size in bytes, or 0 for a bad answer."""


async def _open(order: Order) -> Outcome:
    """Makes calls at random times, spaced exponentially like those of independent callers. Orders with the same seed
    have the same times."""
    sender = _GrpcSender(order.door) if order.door.kind == "grpc" else _RestSender(order.door)
    await sender.warm_up(64)
    draw = random.Random(order.seed)
    due: deque[float] = deque()
    at = 0.0
    while (at := at + draw.expovariate(order.rate)) < order.seconds:
        due.append(at)
    planned = len(due)
    times: list[float] = []
    lags: list[float] = []
    failed = 0
    ended = asyncio.Event()
    most = int(order.rate * _BACKLOG)
    behind = False
    began = time.monotonic() + 0.01

    def answered(when: float, size: int) -> None:
        nonlocal failed
        times.append(time.monotonic() - began - when)
        failed += size < order.door.answer
        if len(times) == planned:
            ended.set()

    def ring() -> None:
        nonlocal behind
        while due and due[0] <= (now := time.monotonic() - began):
            when = due.popleft()
            lags.append(now - when)
            sender.send(lambda size, when=when: answered(when, size))
            if len(lags) - len(times) > most:
                behind = True
                ended.set()
                return
        if due:
            alarm.set(began + due[0])

    alarm = Alarm(ring)
    gc.collect()
    gc.disable()  # a garbage collection would make calls late
    cpu = time.process_time()
    alarm.set(began + due[0])
    try:
        await asyncio.wait_for(ended.wait(), order.seconds + _BACKLOG)
    except TimeoutError:
        behind = True
    seconds = time.monotonic() - began
    cpu = time.process_time() - cpu
    alarm.close()
    sender.close()
    if failed:
        raise RuntimeError(f"{failed} of {len(times)} answers were bad")
    lag = _percentiles(lags)[1] if len(lags) > 1 else 0.0
    return Outcome(len(times), seconds, cpu, _percentiles(times), lag, behind)


class _GrpcSender:
    """Calls by `grpc.aio`."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._channels = [grpc.aio.insecure_channel(door.address, options=_OPTIONS) for _ in range(_CHANNELS)]
        self._methods = [channel.unary_unary(METHOD) for channel in self._channels]
        self._metadata = tuple(door.headers.items())
        self._tasks: set[asyncio.Task[None]] = set()
        self._turn = 0

    async def warm_up(self, calls: int) -> None:
        """Makes the calls one after the other, spread over the channels."""
        for number in range(calls):
            await self._methods[number % _CHANNELS](self._door.body, metadata=self._metadata, timeout=_TIMEOUT)

    def send(self, answered: Callable[[int], None]) -> None:
        self._turn = (self._turn + 1) % _CHANNELS
        call = self._methods[self._turn](self._door.body, metadata=self._metadata, timeout=_TIMEOUT)
        task = asyncio.get_running_loop().create_task(self._finish(call, answered))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _finish(self, call: Awaitable[bytes], answered: Callable[[int], None]) -> None:
        try:
            answered(len(await call))
        except grpc.aio.AioRpcError as error:
            print(error, file=sys.stderr)
            answered(0)

    def close(self) -> None:
        """Cancels the calls in flight."""
        for task in self._tasks:
            task.cancel()


class _RestSender:
    """Calls by a plain HTTP/1.1 client, on as many connections as there are calls at once, the last used first."""

    def __init__(self, door: Door) -> None:
        lines = [f"POST {door.path} HTTP/1.1", f"host: {door.address}", f"content-length: {len(door.body)}"]
        lines += [f"{name}: {value}" for name, value in door.headers.items()]
        self._request = "\r\n".join([*lines, "", ""]).encode() + door.body
        self._door = door
        self._idle: list[_Connection] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def warm_up(self, calls: int) -> None:
        """Makes one connection for each eight calls, and these calls on it."""
        loop = asyncio.get_running_loop()
        for _ in range(0, calls, 8):
            connection = await self._connect()
            for _ in range(8):
                done = loop.create_future()
                connection.send(self._request, done.set_result)
                await done
            self._idle.append(connection)

    def send(self, answered: Callable[[int], None]) -> None:
        """Sends a call on an idle connection, or on a new one."""
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                self._send(connection, answered)
                return
        task = asyncio.get_running_loop().create_task(self._connected(answered))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _send(self, connection: "_Connection", answered: Callable[[int], None]) -> None:
        def done(size: int) -> None:
            self._idle.append(connection)
            answered(size)

        connection.send(self._request, done)

    async def _connected(self, answered: Callable[[int], None]) -> None:
        self._send(await self._connect(), answered)

    async def _connect(self) -> "_Connection":
        host, _, port = self._door.address.rpartition(":")
        _, made = await asyncio.get_running_loop().create_connection(_Connection, host, int(port))
        return made

    def close(self) -> None:
        """Cancels the calls that still wait for a connection."""
        for task in self._tasks:
            task.cancel()


class _Connection(asyncio.Protocol):
    """One HTTP connection, with one call at a time."""

    def __init__(self) -> None:
        self._answered: Callable[[int], None] | None = None
        self._size = 0
        self.usable = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]

    def send(self, request: bytes, answered: Callable[[int], None]) -> None:
        """Sends a request. `answered` gets the size of the answer's body in bytes, or 0 for a bad answer."""
        self._answered = answered
        self._size = 0
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, data: bytes) -> None:
        self._size += len(data)

    def on_message_complete(self) -> None:
        answered, self._answered = self._answered, None
        self.usable = self._parser.should_keep_alive()
        if answered is not None:
            answered(self._size if self._parser.get_status_code() == http.HTTPStatus.OK else 0)

    def connection_lost(self, error: Exception | None) -> None:
        self.usable = False
        answered, self._answered = self._answered, None
        if answered is not None:
            print("the server closed a connection during a call", file=sys.stderr)
            answered(0)


def main() -> None:
    """Runs the pickled order from standard input, and prints its outcome as JSON."""
    order: Order = pickle.load(sys.stdin.buffer)
    outcome = uvloop.run(_open(order)) if order.rate else _closed(order)
    json.dump({name: getattr(outcome, name) for name in Outcome.__slots__}, sys.stdout)


if __name__ == "__main__":
    main()
