"""A call as its handler sees it, and an answer as its client sees it: the same behind Envoy and behind grpc.aio."""

import asyncio
import gzip

import grpc
import pytest

from mesh.statuses import Code
from mesh.wire import framing
from mesh.wire.call import CallCancelled
from tests.support.waiting import until

INFER = "/inference.GRPCInferenceService/ModelInfer"  # known to be unary
OTHER = "/some.Service/Method"  # may be anything
BOTH = pytest.mark.parametrize("method", [INFER, OTHER])


def answering(work):
    """Returns a handler that runs a coroutine for each call, and lists the calls and the tasks in its attributes."""
    calls, tasks = [], []

    def handler(call):
        calls.append(call)
        tasks.append(asyncio.ensure_future(work(call)))

    handler.calls, handler.tasks = calls, tasks
    return handler


async def echo(call):
    """Answers a unary call with its own message."""
    call.reply(await call.read())


async def message(call):
    return framing.unpack(await call.read(), call.encoding, limit=1 << 30)


@BOTH
async def test_messages_and_metadata_pass_both_ways(connect, method):
    async def work(call):
        text = await message(call)
        assert await call.read() is None
        call.reply(
            framing.pack(text.upper()),
            headers=((b"x-first", b"1"), (b"x-binary-bin", b"AAH/")),
            trailers=((b"x-last", b"2"), (b"x-tail-bin", b"AP8")),
        )

    handler = answering(work)
    channel = await connect(handler)
    sent = (("mm-model-id", "m"), ("x-data-bin", b"\0\1\xff"), ("x-twice", "a"), ("x-twice", "b"))
    call = channel.unary_unary(method)(b"text", metadata=sent)
    assert await call == b"TEXT"
    first, last = dict(await call.initial_metadata()), dict(await call.trailing_metadata())
    assert (first["x-first"], first["x-binary-bin"]) == ("1", b"\0\1\xff")
    assert (last["x-last"], last["x-tail-bin"]) == ("2", b"\0\xff")
    (got,) = handler.calls
    assert got.method == method.encode()
    headers = [header for header in got.headers if header[0] != b"user-agent"]
    assert sorted(headers) == [(b"mm-model-id", b"m"), (b"x-data-bin", b"AAH/"), (b"x-twice", b"a"), (b"x-twice", b"b")]
    assert got.deadline is None
    assert got.peer


@BOTH
@pytest.mark.parametrize("text", ["no such model", "ümläut: 模型\n100%", ""])
async def test_failures_keep_code_text_and_metadata(connect, method, text):
    async def work(call):
        await call.read()
        call.fail(Code.NOT_FOUND, text, trailers=((b"x-why", b"because"), (b"grpc-status-details-bin", b"CAU")))

    channel = await connect(answering(work))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary(method)(b"")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert caught.value.details() == text
    trailing = dict(caught.value.trailing_metadata())
    initial = dict(caught.value.initial_metadata())
    assert (trailing | initial)["x-why"] == "because"
    assert (trailing | initial)["grpc-status-details-bin"] == b"\x08\x05"


async def test_a_handler_that_raises_is_an_internal_error(connect):
    def handler(call):
        raise RuntimeError("a bug")

    channel = await connect(handler)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary(INFER)(b"")
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "bug" not in caught.value.details()


@BOTH
async def test_a_cancel_reaches_the_handler(connect, method):
    gone = asyncio.Event()

    async def work(call):
        await call.read()
        call.on_cancel(gone.set)

    handler = answering(work)
    channel = await connect(handler)
    call = channel.unary_unary(method)(b"")
    await until(lambda: handler.tasks and handler.tasks[0].done(), why="the call arrives")
    assert not handler.calls[0].cancelled
    call.cancel()
    async with asyncio.timeout(10):
        await gone.wait()
    assert handler.calls[0].cancelled
    handler.calls[0].reply(b"\0\0\0\0\0")  # a late reply is allowed
    late = []
    handler.calls[0].on_cancel(lambda: late.append(1))
    assert late


@BOTH
async def test_a_deadline_is_known_to_the_handler_and_cancels(connect, method):
    gone = asyncio.Event()

    async def work(call):
        await call.read()
        call.on_cancel(gone.set)

    handler = answering(work)
    channel = await connect(handler)
    began = asyncio.get_running_loop().time()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary(method)(b"", timeout=0.3)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    async with asyncio.timeout(10):
        await gone.wait()
    assert began < handler.calls[0].deadline <= began + 10


async def test_a_stream_goes_to_and_fro(connect):
    """A stream passes each message on at once, in both directions: each message is answered before the next is sent."""

    async def work(call):
        call.start(((b"x-begun", b"yes"),))
        while (frame := await call.read()) is not None:
            await call.write(framing.pack(b"re:" + framing.unpack(frame, limit=100)))
        call.finish(trailers=((b"x-done", b"yes"),))

    channel = await connect(answering(work))
    call = channel.stream_stream(OTHER)()
    for word in (b"one", b"two", b"three"):
        await call.write(word)
        assert await call.read() == b"re:" + word
    assert dict(await call.initial_metadata())["x-begun"] == "yes"
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK
    assert dict(await call.trailing_metadata())["x-done"] == "yes"


async def test_a_stream_of_replies_may_end_in_a_failure(connect):
    async def work(call):
        await call.read()
        call.start()
        for index in range(3):
            await call.write(framing.pack(b"%d" % index))
        call.finish(Code.ABORTED, "enough", ((b"x-n", b"3"),))

    channel = await connect(answering(work))
    call = channel.unary_stream(OTHER)(b"")
    assert [await call.read() for _ in range(3)] == [b"0", b"1", b"2"]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.ABORTED, "enough")
    assert dict(caught.value.trailing_metadata())["x-n"] == "3"


async def test_a_stream_of_requests_has_one_reply(connect):
    async def work(call):
        got = []
        while (frame := await call.read()) is not None:
            got.append(framing.unpack(frame, limit=100))
        call.reply(framing.pack(b",".join(got)), trailers=((b"x-n", b"3"),))

    channel = await connect(answering(work))

    async def requests():
        for word in (b"a", b"b", b"c"):
            yield word

    call = channel.stream_unary(OTHER)(requests())
    assert await call == b"a,b,c"
    assert dict(await call.trailing_metadata())["x-n"] == "3"


async def test_a_failure_in_the_middle_of_a_request_stream(connect):
    async def work(call):
        await call.read()
        call.fail(Code.INVALID_ARGUMENT, "stop")

    channel = await connect(answering(work))
    call = channel.stream_stream(OTHER)()
    await call.write(b"one")
    assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert await call.details() == "stop"


async def test_a_cancelled_stream_ends_reading_and_writing(connect):
    ended = asyncio.Event()

    async def work(call):
        call.start()
        try:
            while (frame := await call.read()) is not None:
                await call.write(frame)
        except (CallCancelled, asyncio.CancelledError):
            ended.set()
            raise

    handler = answering(work)

    def dispatch(call):
        handler(call)
        call.on_cancel(handler.tasks[-1].cancel)

    channel = await connect(dispatch)
    call = channel.stream_stream(OTHER)()
    await call.write(b"one")
    assert await call.read() == b"one"
    call.cancel()
    async with asyncio.timeout(10):
        await ended.wait()


async def test_large_messages_pass_and_larger_ones_are_refused(connect):
    channel = await connect(answering(echo), max_message=8 << 20)
    large = bytes(range(256)) * (5 << 12)  # 5 MiB
    assert await channel.unary_unary(INFER)(large) == large
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary(INFER)(bytes(9 << 20))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await channel.unary_unary(INFER)(b"still here") == b"still here"


async def test_compressed_requests_can_be_read(connect):
    async def work(call):
        call.reply(framing.pack(await message(call)))

    channel = await connect(answering(work), compression=grpc.Compression.Gzip)
    assert await channel.unary_unary(INFER)(b"a" * 10_000) == b"a" * 10_000


async def test_a_compressed_reply_can_be_read(connect):
    async def work(call):
        packed = gzip.compress(await message(call))
        frame = b"\1" + len(packed).to_bytes(4, "big") + packed
        call.reply(frame, headers=((b"grpc-encoding", b"gzip"),))

    channel = await connect(answering(work))
    for method in (INFER, OTHER):
        assert await channel.unary_unary(method)(b"text") == b"text"


async def test_many_calls_at_once(connect):
    channel = await connect(answering(echo))
    texts = [b"%d" % index for index in range(300)]
    assert await asyncio.gather(*(channel.unary_unary(INFER)(text) for text in texts)) == texts
