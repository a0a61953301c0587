"""Methods that a worker answers itself, for known callers only."""

import asyncio

import pytest

from mesh.pb import inference_pb2 as pb
from mesh.statuses import Code
from router.services.methods import for_known, streaming, unary
from tests.support.access import SlowTokens, guard_of
from tests.support.fakecalls import FakeCall
from tests.support.waiting import until

NAME = b"/a.Service/do"


@pytest.mark.parametrize(("token", "code"), [(b"slow-anna", Code.OK), (b"slow-bad", Code.UNAUTHENTICATED)])
async def test_a_method_waits_until_its_caller_is_identified(token, code):
    slow = SlowTokens()
    guard = guard_of("required", {}, {}, others=[slow])
    answer = unary(pb.ServerMetadataRequest, lambda _: pb.ServerMetadataResponse(name="mesh"))
    handlers = for_known(guard, {NAME: answer})
    call = FakeCall(NAME, [(b"authorization", b"Bearer " + token)], b"\0\0\0\0\0")
    handlers[NAME](call)
    await until(lambda: slow.waiting, why="the call waits")
    assert not call.answers
    slow.known.set()
    await until(lambda: call.answers, why="the call is answered")
    assert call.code is code


async def test_a_fault_of_the_handler_after_the_wait_is_an_answer():
    slow = SlowTokens()
    handlers = for_known(guard_of("required", {}, {}, others=[slow]), {NAME: lambda call: 1 / 0})
    call = FakeCall(NAME, [(b"authorization", b"Bearer slow-anna")], b"\0\0\0\0\0")
    slow.known.set()
    handlers[NAME](call)
    await until(lambda: call.answers, why="the call is answered")
    assert call.code is Code.INTERNAL


async def test_a_streaming_method_keeps_its_cancellation_after_the_wait():
    """A call first waits until its caller is identified. When the caller leaves later, the handler is still
    cancelled."""
    slow = SlowTokens()
    steps = []

    async def serve(call):
        steps.append("begun")
        try:
            await asyncio.Event().wait()
        finally:
            steps.append("ended")

    handlers = for_known(guard_of("required", {}, {}, others=[slow]), {NAME: streaming(serve)})
    call = FakeCall(NAME, [(b"authorization", b"Bearer slow-anna")], b"\0\0\0\0\0")
    slow.known.set()
    handlers[NAME](call)
    await until(lambda: steps, why="the handler runs")
    await asyncio.sleep(0)  # for the task that has waited
    call.cancel()
    await until(lambda: steps == ["begun", "ended"], why="the handler has ended")
