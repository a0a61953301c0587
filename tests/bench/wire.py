"""The cost of a unary call at each end of `mesh.wire`, compared with `grpc.aio`, in one run: `python -m
tests.bench.wire`.

Server and client are separate processes that use uvloop and a unix socket. The server answers with a constant, and the
client keeps some calls in flight. With `--profile client` or `--profile server` cProfile shows one end instead, and
`--stream` measures messages of bidirectional streams.
"""

import argparse
import asyncio
import cProfile
import pstats
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc.aio
import uvloop

from mesh import process
from mesh.wire import call, client, framing, server
from tests.bench.processes import cpu_seconds
from tests.support.waiting import until

METHOD = "/inference.GRPCInferenceService/ModelInfer"
REQUEST = b"\x0a\x05model" + b"r" * 200
ANSWER = framing.pack(b"a" * 150)
# Metadata as Envoy sends it, without the headers that the client end adds itself.
METADATA = [
    (b"user-agent", b"grpc-python-asyncio/1.81.0 grpc-c/54.0.0 (linux; chttp2)"),
    (b"mm-model-id", b"model"),
    (b"mesh-copy", b"0123456789abcdef.123456"),
]


def handle(one: call.Call) -> None:
    """Answers a message with a constant, and a stream with its own messages."""
    if one.frame is not None:
        one.reply(ANSWER)
    else:
        asyncio.get_running_loop().create_task(_echo(one))


async def _echo(one: call.Call) -> None:
    one.start()
    while (frame := await one.read()) is not None:
        await one.write(frame)
    one.finish()


async def serve(kind: str, path: str, profile: bool) -> None:
    """Runs the server process until SIGTERM."""
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    if kind == "wire":
        ours = server.Server(handle)
        await ours.listen_unix(path)
        profiler = cProfile.Profile()
        if profile:
            profiler.enable()
        await ended.wait()
        profiler.disable()
        if profile:
            pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
        await ours.close(1)
        return

    async def answer(request: bytes, context: "grpc.aio.ServicerContext[bytes, bytes]") -> bytes:
        return ANSWER[framing.PREFIX :]

    theirs = grpc.aio.server()
    service, _, method = METHOD[1:].partition("/")
    handler = grpc.method_handlers_generic_handler(service, {method: grpc.unary_unary_rpc_method_handler(answer)})
    theirs.add_generic_rpc_handlers((handler,))
    theirs.add_insecure_port(f"unix:{path}")
    await theirs.start()
    await ended.wait()
    await theirs.stop(1)


class Load:
    """A load that keeps calls in flight through a pool: the callback of each reply sends the next call."""

    takes_pieces = False

    def __init__(self, pool: client.Pool, calls: int) -> None:
        self.pool = pool
        self.left = calls
        self.open = 0
        self.failed = 0
        self.ended = asyncio.Event()

    def send(self) -> None:
        self.left -= 1
        self.open += 1
        self.pool.send(METHOD.encode(), METADATA, framing.pack(REQUEST), self)

    def on_beginning(self) -> None:
        pass

    def on_reply(self, reply: client.Reply) -> None:
        self.failed += reply.frame is None
        self.open -= 1
        if self.left > 0:
            self.send()
        elif not self.open:
            self.ended.set()

    def on_stream(self, stream: client.ReplyStream) -> None:
        raise AssertionError("a unary reply came in pieces")

    def on_lost(self, lost: client.Lost) -> None:
        raise AssertionError(str(lost))


async def through_pool(path: str, calls: int, in_flight: int) -> None:
    pool = client.Pool(f"unix:{path}", max_connections=in_flight)
    load = Load(pool, calls)
    for _ in range(in_flight):
        load.send()
    await load.ended.wait()
    assert not load.failed
    pool.close()


async def through_grpc(path: str, calls: int, in_flight: int) -> None:
    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
        infer = channel.unary_unary(METHOD)

        async def one_caller() -> None:
            for _ in range(calls // in_flight):
                await infer(REQUEST)

        await asyncio.gather(*(one_caller() for _ in range(in_flight)))


async def through_stream(path: str, calls: int, in_flight: int) -> None:
    """Sends messages on bidirectional streams, each after the echo of the one before."""
    pool = client.Pool(f"unix:{path}", max_connections=in_flight)
    frame = framing.pack(REQUEST)

    async def one_caller() -> None:
        request = pool.open(METHOD.encode(), METADATA)
        await request.write(frame)
        answer = await request.first()
        assert isinstance(answer, client.ReplyStream)
        for _ in range(calls // in_flight):
            assert await answer.read() == frame
            await request.write(frame)
        request.end()
        await answer.result()

    await asyncio.gather(*(one_caller() for _ in range(in_flight)))
    pool.close()


Way = Callable[[str, int, int], Awaitable[None]]


async def measure(kind: str, way: Way, arguments: argparse.Namespace, folder: Path) -> tuple[float, float]:
    """Measures a server in another process and a client in this one, and prints a line of results. Returns the CPU time
    of server and client, in microseconds per call."""
    path = str(folder / kind)
    argv = [sys.executable, "-m", "tests.bench.wire", "--serve", kind, "--path", path]
    if arguments.profile == "server":
        argv += ["--profile", "server"]
    child = await process.spawn(argv, name=kind, on_line=print)
    await until(Path(path).exists, why=f"{kind} listens")
    await way(path, arguments.calls // 10, arguments.in_flight)
    server_before, client_before, clock = cpu_seconds(child.pid), time.process_time(), time.perf_counter()
    profiler = cProfile.Profile()
    if arguments.profile == "client" and kind == "wire":
        profiler.enable()
    await way(path, arguments.calls, arguments.in_flight)
    profiler.disable()
    elapsed = time.perf_counter() - clock
    per_call = 1e6 / arguments.calls
    costs = (cpu_seconds(child.pid) - server_before) * per_call, (time.process_time() - client_before) * per_call
    if arguments.profile == "client" and kind == "wire":
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
    print(
        f"{kind:10} {arguments.calls / elapsed:9,.0f} calls/s   server {costs[0]:6.1f} us   client {costs[1]:6.1f} us"
    )
    await child.terminate(5)
    return costs


async def main(arguments: argparse.Namespace) -> None:
    """Measures, or serves for a process that measures."""
    if arguments.serve:
        await serve(arguments.serve, arguments.path, arguments.profile == "server")
        return
    with tempfile.TemporaryDirectory() as name:
        ours = await measure("wire", through_stream if arguments.stream else through_pool, arguments, Path(name))
        if not arguments.profile and not arguments.stream:
            theirs = await measure("grpc.aio", through_grpc, arguments, Path(name))
            print(f"ours / grpc.aio: server {ours[0] / theirs[0]:.3f}, client {ours[1] / theirs[1]:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="CPU per call of mesh.wire and of grpc.aio")
    parser.add_argument("--calls", type=int, default=30_000)
    parser.add_argument("--in-flight", type=int, default=16)
    parser.add_argument("--profile", choices=("server", "client"))
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--serve", choices=("wire", "grpc.aio"), help=argparse.SUPPRESS)
    parser.add_argument("--path", help=argparse.SUPPRESS)
    uvloop.run(main(parser.parse_args()))
