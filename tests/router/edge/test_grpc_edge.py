import asyncio

import grpc
import pytest

from mesh.wire import framing
from router.edge import grpc as edges
from tests.support.waiting import until

INFER = "/inference.GRPCInferenceService/ModelInfer"


async def test_workers_share_the_port():
    """Two workers listen on one port. Every connection is answered, whichever worker the kernel gives it to."""
    answered = [0, 0]

    def worker(index):
        def handler(call):
            answered[index] += 1
            call.reply(call.frame)

        return edges.GrpcEdge(handler, shared=True)

    one, other = worker(0), worker(1)
    port = await one.listen("127.0.0.1", 0)
    assert await other.listen("127.0.0.1", port) == port
    for _ in range(12):
        options = (("grpc.use_local_subchannel_pool", 1),)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
            assert await channel.unary_unary(INFER)(b"x") == b"x"
    assert sum(answered) == 12
    await one.close(0)
    await other.close(0)


async def test_a_taken_port_is_an_error():
    one, other = edges.GrpcEdge(print), edges.GrpcEdge(print)
    port = await one.listen("127.0.0.1", 0)
    with pytest.raises(OSError, match=str(port)):
        await other.listen("127.0.0.1", port)
    await one.close(0)
    await other.close(0)


async def test_closing_lets_calls_in_flight_end_and_takes_no_more():
    calls = []
    edge = edges.GrpcEdge(calls.append)
    port = await edge.listen("127.0.0.1", 0)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        running = channel.unary_unary(INFER)(b"x")
        await until(lambda: calls, why="the call is in flight")
        closing = asyncio.ensure_future(edge.close(30))
        with pytest.raises(grpc.aio.AioRpcError):
            await channel.unary_unary(INFER)(b"x", timeout=5)
        calls[0].reply(framing.pack(b"done"))
        assert await running == b"done"
        await closing


async def test_closing_cuts_what_does_not_end():
    calls, gone = [], asyncio.Event()
    edge = edges.GrpcEdge(lambda call: (calls.append(call), call.on_cancel(gone.set)))
    port = await edge.listen("127.0.0.1", 0)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        running = channel.unary_unary(INFER)(b"x")
        await until(lambda: calls, why="the call is in flight")
        await edge.close(0.05)
        with pytest.raises(grpc.aio.AioRpcError):
            await running
    assert gone.is_set()
    assert calls[0].cancelled
