"""Faults of the router's own code. Each call is answered all the same, because a caller without a deadline would
otherwise wait forever, and the call is no longer counted as in flight."""

import dataclasses

from mesh.statuses import Code
from mesh.wire import framing
from placement.retry import MAX_TRIES
from router.calls import replies
from router.calls.dispatch import Dispatcher
from router.calls.routes import Routes
from tests.support import fakecalls
from tests.support.access import SlowTokens, guard_of
from tests.support.fakecalls import FakeCall, LostKind, StreamCall
from tests.support.waiting import until

FOREIGN = b"/some.Predictor/predict"


def broken(*_, **__):
    raise ZeroDivisionError


async def broken_later(*_, **__):
    raise ZeroDivisionError


async def check_answered(core, call, logged):
    """Checks that the call is answered with INTERNAL, that no call is in flight, and that the log has the cause."""
    await core.answered(call)
    assert (call.code, call.text) == (Code.INTERNAL, "internal error; the router's log has the cause")
    assert core.forwarder.in_flight == 0
    assert "ZeroDivisionError" in logged.text


async def test_while_a_copy_is_chosen(core, monkeypatch, caplog):
    core.resident("m", "a", "b")
    monkeypatch.setattr(core.forwarder, "pick", broken)
    await check_answered(core, core.call(), caplog)


async def test_while_a_name_is_read(core, monkeypatch, caplog):
    monkeypatch.setattr(core.forwarder.aliases, "resolve", broken_later)
    call = FakeCall(FOREIGN, [(b"mm-vmodel-id", b"fraud")], framing.pack(b""))
    core.dispatcher.dispatch(call)
    await check_answered(core, call, caplog)


async def test_while_a_call_with_a_resolved_name_begins(core, monkeypatch, caplog):
    core.resident("fraud@8", "a", "b")
    core.alias("fraud", "fraud@8", feed=False)
    monkeypatch.setattr(core.forwarder, "pick", broken)
    call = FakeCall(FOREIGN, [(b"mm-vmodel-id", b"fraud")], framing.pack(b""))
    core.dispatcher.dispatch(call)
    await check_answered(core, call, caplog)


async def test_while_a_copy_is_verified(core, monkeypatch, caplog):
    core.resident("m")
    core.world.lose("a")
    monkeypatch.setattr(core.forwarder.verifier, "verify", broken_later)
    await check_answered(core, core.call(), caplog)


async def test_while_an_alias_is_read_again(core, monkeypatch, caplog):
    core.alias("fraud", "gone")
    monkeypatch.setattr(core.forwarder.aliases, "read", broken_later)
    await check_answered(core, core.call("fraud"), caplog)


async def test_once_a_model_is_loaded(core, monkeypatch, caplog):
    core.register()
    core.world.pod("a")

    def load(request):
        monkeypatch.setattr(core.forwarder, "pick", broken)
        return fakecalls.loaded()

    core.agents.answers["a"] = load
    await check_answered(core, core.call(), caplog)


async def test_when_a_reply_arrives(core, monkeypatch, caplog):
    core.resident("m")
    call = core.call()
    monkeypatch.setattr(replies, "returned", broken)
    core.sent("a")[0].reply(headers=[(b"x", b"1")])
    await check_answered(core, call, caplog)


async def test_when_a_connection_is_lost(core, monkeypatch, caplog):
    core.resident("m")
    call = core.call()
    monkeypatch.setattr(core.forwarder, "lost", broken)
    core.sent("a")[0].lose(LostKind.SENT)
    await check_answered(core, call, caplog)


async def test_when_a_reply_begins_that_is_read_message_by_message(core, monkeypatch, caplog):
    core.resident("m")
    call = core.call()
    monkeypatch.setattr(replies, "returned", broken)
    core.sent("a")[0].sink.on_stream(Stream())
    await check_answered(core, call, caplog)


async def test_while_a_reply_is_passed_on(core, caplog):
    core.resident("m")
    call = core.call()
    call.start = lambda headers=(): None
    core.sent("a")[0].sink.on_stream(Stream())
    await check_answered(core, call, caplog)
    assert core.sent("a")[0].cancelled, "nobody reads the rest of the reply"


async def test_before_another_try(core, monkeypatch, caplog):
    core.resident("m")
    core.world.pool("a").full = True
    call = core.call()
    for attempt in range(MAX_TRIES):
        if attempt == 1:
            monkeypatch.setattr(core.forwarder, "must_verify", broken)
        await until(lambda: call.answers or not core.sent("a")[-1].over, why="the call is sent or answered")
        if call.answers:
            break
        core.sent("a")[-1].not_here()
    await check_answered(core, call, caplog)


async def test_while_a_streamed_request_is_read(core, monkeypatch, caplog):
    """The pod waits for the rest of the request, so no reply would ever come."""
    core.resident("m")
    call = StreamCall(FOREIGN, [(b"mm-model-id", b"m")], [framing.pack(b"1")], open=True)
    monkeypatch.setattr(call, "read", broken_later)
    core.dispatcher.dispatch(call)
    await check_answered(core, call, caplog)
    assert [sent.cancelled for sent in core.sent("a")] == [True]


async def test_while_a_request_for_several_models_is_read(core, monkeypatch, caplog):
    call = StreamCall(FOREIGN, [(b"mm-model-id", b"m"), (b"mm-model-id", b"n")])
    monkeypatch.setattr(call, "read", broken_later)
    core.dispatcher.dispatch(call)
    await check_answered(core, call, caplog)


async def test_while_a_caller_is_identified(core, caplog):
    slow = SlowTokens(broken=True)
    guarded = dataclasses.replace(
        core, dispatcher=Dispatcher(core.forwarder, Routes(), guard_of("required", {}, {}, others=[slow]))
    )
    slow.known.set()
    call = guarded.call(headers=[(b"authorization", b"Bearer slow-anna")])
    await check_answered(core, call, caplog)


async def test_a_call_whose_name_is_being_read_is_answered_when_the_router_stops(core):
    core.etcd.gate.clear()
    call = FakeCall(FOREIGN, [(b"mm-vmodel-id", b"fraud")], framing.pack(b""))
    core.dispatcher.dispatch(call)
    await until(lambda: core.etcd.reads, why="the name is read")
    await core.forwarder.tasks.close()
    assert (call.code, call.text) == (Code.UNAVAILABLE, "this router is stopping: try again")


class Stream:
    """A reply whose messages cannot be read because of a fault."""

    headers, encoding = [(b"x", b"1")], b""

    async def read(self):
        raise ZeroDivisionError
