"""Long streams and large messages through a whole mesh, over both edges: client, edge, router, relay, egress, foreign
server.

`make test` uses Envoy at both ends, and small sizes. `make test-streams` uses each pair of ends, a thousand streams and
a message of 1 GiB, and prints what they cost.
"""

import asyncio
import os
import time
from dataclasses import dataclass, field

import grpc
import pytest
import pytest_asyncio

from mesh.options.values import format_bytes
from tests.bench import processes
from tests.support import bulk
from tests.support.exampleproto import SERVICE
from tests.support.foreign import ForeignMesh, child_of
from tests.support.localmesh import children, command
from tests.support.waiting import until

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

GROWTH = 32 << 20
"""Bytes by which a process may grow at most, however much passes through it."""

PER_STREAM = 128 << 10
"""Bytes that an idle stream may take of a router worker or a relay, which have two connections for each."""

MESSAGE = 64 << 10
"""Bytes of a message of a flood."""

M = (("mm-model-id", "m"),)


@dataclass
class Streams:
    """A mesh with the model `m`, and a client for the methods that transfer bytes."""

    foreign: object
    channel: grpc.aio.Channel
    pids: dict[str, int] = field(default_factory=dict)

    def method(self, name, shape):
        """Returns a method for a client, which takes and returns bytes. `shape` is the kind of the method in grpc.aio's
        words, such as `unary_unary`."""
        return getattr(self.channel, shape)(f"/{SERVICE}/{name}")

    async def ask(self, name, request=b""):
        return await self.method(name, "unary_unary")(request, metadata=M, timeout=60)

    async def held(self):
        """Returns the bytes of bodies that the router's worker holds."""
        text = (await self.foreign.mesh.get(f"{self.foreign.mesh.probe_url()}/metrics")).body.decode()
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("mesh_body_bytes"))

    async def counted(self):
        """Returns how many messages the server has written and read, and how many calls of `soak` are open."""
        return tuple(map(int, (await self.ask("count")).split()))

    async def forgotten(self):
        """Waits until the router holds nothing of the calls that were given up, and the server has no open calls."""

        async def empty():
            return await self.held() == 0 and (await self.counted())[2] == 0

        await until(empty, timeout=60, why="router and server have forgotten the calls that were given up")
        assert await self.ask("measure", b"hello") == bulk.measured(b"hello")


class Growth:
    """The growth of a mesh's processes within a block, measured at its peak."""

    def __init__(self, it, what):
        self.it = it
        self.what = what
        self.bytes = {}

    def __enter__(self):
        self.before = {name: processes.resident_bytes(pid) for name, pid in self.it.pids.items()}
        for pid in self.it.pids.values():
            processes.reset_peak(pid)
        return self

    def __exit__(self, *error):
        for name, pid in self.it.pids.items():
            self.bytes[name] = max(0, processes.peak_bytes(pid) - self.before[name])
        told = ", ".join(f"{name} {format_bytes(size >> 10 << 10)}" for name, size in self.bytes.items())
        print(f"\n{self.what}: grew by {told}")

    def held_less_than(self, most):
        assert {name: size for name, size in self.bytes.items() if size > most} == {}


@pytest.fixture(scope="module")
def amount(request):
    return request.config.getoption("--stream-bytes")


def pytest_generate_tests(metafunc):
    """Runs each test with Envoy at both ends of the mesh, and in `make test-streams` with each pair of Envoy and
    grpc.aio."""
    if "ends" in metafunc.fixturenames:
        more = [("grpc", "grpc"), ("envoy", "grpc"), ("grpc", "envoy")]
        ends = [("envoy", "envoy"), *(pytest.param(pair, marks=pytest.mark.foreign) for pair in more)]
        metafunc.parametrize("ends", ends, ids=" to ".join, scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def it(ends, tmp_path_factory, etcd_server):
    """A mesh of one example runtime, with the model `m`. `ends` names the edge of its router and the egress of its
    relay."""
    edge, egress = ends
    mesh = ForeignMesh(
        tmp_path_factory.mktemp("streams"),
        etcd_server,
        "--allow-any",
        *("--capacity", str(16 << 30)),  # the memory of a server that holds large messages is observed
        edge=edge,
        egress=egress,
        log_level="info",
        router_options=["--max-connections-per-pod", "4096"],
        runtime_options=["--drain-timeout", "2"],
    )
    async with mesh as foreign:
        await foreign.register("m", now=True)
        options = (("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1))
        channel = grpc.aio.insecure_channel(foreign.mesh.grpc_address(), options=options)
        foreign.mesh.channels.append(channel)
        it = Streams(foreign, channel)
        for pid in children(foreign.mesh.routers[0].pid):
            name = "envoy" if "envoy" in command(pid).split()[0] else "worker" if "worker" in command(pid) else ""
            if name:
                it.pids[name] = pid
        it.pids["relay"] = child_of(foreign.mesh, "mesh.runtime.relay")
        for pid in children(it.pids["relay"]):
            it.pids["egress"] = pid
        it.pids["agent"] = foreign.mesh.pods[0].pid
        assert it.pids["worker"]
        assert it.pids["relay"]
        assert await it.ask("measure", b"hello") == bulk.measured(b"hello")
        yield it


async def rest_of(call):
    messages = []
    while (message := await call.read()) is not grpc.aio.EOF:
        messages.append(message)
    return messages


async def settled(count):
    """Returns a count once it has stopped growing."""
    last, same = await count(), 0
    while same < 5:
        await asyncio.sleep(0.1)
        now = await count()
        last, same = now, same + 1 if now == last else 0
    return last


# First, because memory that other tests have freed would hide growth.
async def test_a_large_message_passes_without_being_held_or_is_refused(it, ends, amount):
    """Between two Envoys, a message far above `--max-message` passes in both directions, unchanged, and no process
    holds much of it. `grpc.aio` holds messages as a whole, so with it the limit applies, and the call fails with
    RESOURCE_EXHAUSTED."""
    message = bulk.content(amount)
    measure, produce = it.method("measure", "unary_unary"), it.method("produce", "unary_unary")
    if ends == ("envoy", "envoy"):
        await it.ask("measure", message[: 4 << 20])
        for _ in range(2):
            began = time.perf_counter()
            with Growth(it, f"a request of {format_bytes(amount)}") as growth:
                assert await measure(message, metadata=M, timeout=600) == bulk.measured(message)
            growth.held_less_than(GROWTH)
            with Growth(it, f"a reply of {format_bytes(amount)}") as growth:
                assert await produce(b"%d" % amount, metadata=M, timeout=600) == message
            growth.held_less_than(GROWTH)
            print(f"both in {time.perf_counter() - began:.1f} s")
    else:
        for call in (measure(message, metadata=M, timeout=60), produce(b"%d" % amount, metadata=M, timeout=60)):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            print(refused.value.details())
    assert await it.ask("measure", b"hello") == bulk.measured(b"hello")


async def test_idle_streams_cost_little_and_are_all_alive_afterwards(it, request):
    """Many streams of one model are open at once. They take little memory and keep no process busy. Afterwards each
    stream still carries its own messages, in order, to its half-close and its trailers."""
    number = request.config.getoption("--streams")
    echo = it.method("echo", "stream_stream")

    streams = []

    async def opened(at):
        stream = echo(metadata=M, timeout=600)
        streams.append(stream)
        await stream.write(b"first of %d" % at)
        assert await stream.read() == b"first of %d" % at
        return stream

    async def ended(at, stream):
        for text in (b"second", b"third"):
            await stream.write(b"%b of %d" % (text, at))
        await stream.done_writing()
        assert await rest_of(stream) == [b"second of %d" % at, b"third of %d" % at]
        assert await stream.code() is grpc.StatusCode.OK
        assert dict(await stream.trailing_metadata())["example-trailer"] == "of the server"

    for at in range(5):
        await opened(at)
        streams.pop().cancel()
    try:
        with Growth(it, f"{number} idle streams") as growth:
            for at in range(number):
                await opened(at)

        async def passed_on():
            return await it.held() == 0

        await until(passed_on, timeout=60, why="the router holds none of the messages that it has passed on")
        meter = processes.Meter.begin({name: [pid] for name, pid in it.pids.items()})
        await asyncio.sleep(2)
        busy = {name: processes.cpu_seconds(pid) - meter.start[name] for name, pid in it.pids.items()}
        print(f"in 2 s without a message: CPU seconds {busy}")
        growth.held_less_than(number * PER_STREAM + (8 << 20))
        print({name: f"{size / number / 1024:.0f} KiB for each" for name, size in growth.bytes.items()})
        assert all(seconds < 1 for seconds in busy.values())
        await asyncio.gather(*(ended(at, stream) for at, stream in enumerate(streams)))
    finally:
        for stream in streams:
            stream.cancel()


async def test_a_client_that_reads_slowly_slows_the_server_down(it, amount):
    """A server floods a stream whose client does not read. The server has to stop before it has written everything, and
    no process grows by more than the limit. When the client reads, every message comes, in order."""
    count = amount // MESSAGE
    with Growth(it, f"{format_bytes(amount)} to a slow client") as growth:
        call = it.method("flood", "unary_stream")(b"%d %d" % (count, MESSAGE), metadata=M, timeout=600)
        assert bulk.number_of(await call.read()) == 0

        async def written():
            return (await it.counted())[0]

        assert await settled(written) < count, "the server is not slowed down"
        for number in range(1, count):
            assert bulk.number_of(await call.read()) == number
        assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK
    growth.held_less_than(GROWTH)


async def test_a_server_that_reads_slowly_slows_the_client_down(it, amount):
    """A client floods a stream whose server does not read. The client has to stop before it has written everything, and
    no process grows by more than the limit. When the server reads, every message comes, in order."""
    count = amount // MESSAGE
    sent = 0

    async def flood(call):
        nonlocal sent
        for number in range(count):
            await call.write(bulk.numbered(number, MESSAGE))
            sent = number + 1
        await call.done_writing()

    async def so_far():
        return sent

    with Growth(it, f"{format_bytes(amount)} to a slow server") as growth:
        call = it.method("soak", "stream_unary")(metadata=M, timeout=600)
        flooding = asyncio.ensure_future(flood(call))
        await until(lambda: sent > 0, timeout=60, why="the stream begins")
        assert await settled(so_far) < count, "the client is not slowed down"
        await it.ask("release")
        assert await call == b"%d %d" % (count, count * MESSAGE)
        await flooding
    growth.held_less_than(GROWTH)


@pytest.mark.parametrize("how", ["cancel", "deadline"])
async def test_a_flood_that_ends_early_leaves_nothing_behind(it, how):
    """When a client cancels a stream, or its deadline passes, while the server does not read, the router releases all
    that it held of the stream. The next call is answered."""
    call = it.method("soak", "stream_unary")(metadata=M, timeout=600 if how == "cancel" else 3)
    sent = 0

    async def flood():
        nonlocal sent
        for number in range(64 << 20 >> 16):
            await call.write(bulk.numbered(number, MESSAGE))
            sent += 1

    flooding = asyncio.ensure_future(flood())
    await until(lambda: sent > 0 or flooding.done(), timeout=60, why="the stream begins")
    if how == "cancel":
        call.cancel()
    ended = await asyncio.gather(call, flooding, return_exceptions=True)
    if how == "deadline":  # INTERNAL: this client loses a status that arrives while it writes
        assert ended[0].code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.INTERNAL)
    await it.forgotten()


async def test_calls_are_given_up_however_full_the_buffers_on_the_way_are(it):
    """When a client cancels a call whose server does not read, the server learns of the cancellation although it does
    not read on. The test cancels after one message, after eight, and so on, up to more than all buffers on the way
    hold."""
    for count in range(1, 120, 7):
        call = it.method("soak", "stream_unary")(metadata=M, timeout=600)

        async def flood(call, count):
            for number in range(count):
                await call.write(bulk.numbered(number, MESSAGE))

        flooding = asyncio.ensure_future(flood(call, count))

        async def arrived():
            return (await it.counted())[2] == 1

        await until(arrived, timeout=60, why="the server has the call")
        await asyncio.wait({flooding}, timeout=0.1)  # as far as the buffers allow
        call.cancel()
        await asyncio.gather(call, flooding, return_exceptions=True)
        await it.forgotten()


@pytest.mark.parametrize("how", ["cancel", "deadline"])
async def test_a_large_message_that_is_given_up_in_its_middle_leaves_nothing_behind(it, ends, how):
    """When a client cancels a call in the middle of a message, or its deadline passes, the server learns of it, the
    router releases all that it held, and the next call is answered."""
    size = 64 << 20 if ends == ("envoy", "envoy") else 15 << 20
    call = it.method("soak", "stream_unary")(metadata=M, timeout=600 if how == "cancel" else 3)
    writing = asyncio.ensure_future(call.write(bulk.content(size)))

    async def begun():
        return await it.held() > 0 or writing.done()

    await until(begun, timeout=60, why="a part of the message has arrived")
    if how == "cancel":
        call.cancel()
    ended = await asyncio.gather(call, writing, return_exceptions=True)
    if how == "deadline":  # INTERNAL: this client loses a status that arrives while it writes
        assert ended[0].code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.INTERNAL)
    await it.forgotten()


async def test_large_messages_pass_within_the_limit_whichever_way_they_are_carried(it):
    """Messages of some megabytes pass unchanged in both directions, in pieces or whole."""
    for size in ((1 << 20) - 1, 1 << 20, (1 << 20) + 1, 15 << 20):
        assert await it.ask("measure", bulk.content(size)) == bulk.measured(bulk.content(size))
        assert await it.ask("produce", b"%d" % size) == bulk.content(size)
    noise = os.urandom(1 << 20)
    stream = it.method("echo", "stream_stream")(metadata=M, timeout=60)
    for size in (3, 1 << 20, 0, 1):
        await stream.write(noise * 2 + noise[:size])
        assert await stream.read() == noise * 2 + noise[:size]
    await stream.done_writing()
    assert await stream.read() is grpc.aio.EOF


# Last, because the mesh has no pod afterwards.
async def test_a_pod_ends_although_its_server_does_not_read_a_call(it):
    """A pod that is stopped ends calls that its server does not read, and exits."""
    call = it.method("soak", "stream_unary")(metadata=M, timeout=600)
    for number in range(16):
        await call.write(bulk.numbered(number, MESSAGE))

    async def arrived():
        return (await it.counted())[2] == 1

    await until(arrived, timeout=60, why="the server has the call")
    assert await it.foreign.mesh.pods[0].stop(timeout=60) == 0
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE, error.value
    print(error.value.details())
