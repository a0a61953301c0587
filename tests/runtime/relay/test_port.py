"""Unary calls at the relay's data port. Most of them need no task; a call gets one only if it has to wait."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from mesh.envoy.egress import LOCAL
from mesh.pb import inference_pb2 as v2
from mesh.pb import modelruntime_pb2 as pb
from mesh.runtime.relay.calls import RelayPort
from mesh.runtime.relay.envoyegress import EnvoyEgress
from mesh.runtime.relay.journal import Journal
from mesh.runtime.relay.methods import Methods
from mesh.runtime.relay.table import RelayedCopy, Table
from mesh.runtime.sharedmemory.board import Board
from mesh.statuses import Code
from mesh.v2 import PREFIX
from mesh.wire import framing
from mesh.wire.budget import Budget
from mesh.wire.call import Header
from mesh.wire.headers import NOT_HERE, addressed
from mesh.wire.reply import LostKind
from tests.support.fakecalls import FakeCall, FakePool, Sent, StreamCall
from tests.support.waiting import until

METHODS = pb.RuntimeStatusResponse(
    methodInfos={
        "a.B/c": pb.RuntimeStatusResponse.MethodInfo(),
        "a.B/named": {"idInjectionPath": [1]},
        "inference.GRPCInferenceService/ModelInfer": {"idInjectionPath": [1]},
    }
)
FRAME = b"\0\0\0\0\x03\x0a\x01m"


class FakeLink:
    """A link whose server never changes."""

    def __init__(self) -> None:
        self.is_up = True
        self.epoch = 3
        self.control = SimpleNamespace(takes_versions=False)
        self.waited_for: list[int] = []

    async def up(self) -> bool:
        return True

    async def noticed(self, epoch: int) -> None:
        self.waited_for.append(epoch)

    async def survived(self) -> None:
        pass


class FakeEnvoy:
    """An Envoy that runs, or is restarting."""

    def __init__(self) -> None:
        self.running = asyncio.Event()
        self.running.set()

    @property
    def is_up(self) -> bool:
        return self.running.is_set()

    async def up(self) -> None:
        await self.running.wait()


class Relay:
    """A data port with one copy, `m`, whose egress sends to a fake pool."""

    def __init__(self) -> None:
        self.board = Board.private(1)
        self.table = Table(self.board, Journal(None))
        self.copy = RelayedCopy("m", b"life.7", self.table.row(None))
        self.table.copies.add(self.copy)
        self.link, self.envoy = FakeLink(), FakeEnvoy()
        minder: Any = self.envoy
        self.egress = EnvoyEgress(minder, "/nowhere", max_message=1000, budget=Budget(1 << 20))
        self.pool = FakePool("unix:/nowhere")
        self.egress._pool = self.pool  # type: ignore[assignment]
        link: Any = self.link
        self.port = RelayPort(self.table, self.board, link, self.egress, max_message=1000)
        self.port.methods = Methods(METHODS)

    def call(self, method: bytes = b"/a.B/c", *more: Header, deadline: float | None = None) -> FakeCall:
        """Makes a call of the copy, and begins it."""
        call = FakeCall(method, [*addressed("m", b"life.7"), *more], FRAME, deadline=deadline)
        self.port.handle(call)
        return call

    def sent(self, number: int = 0) -> Sent:
        """Returns a call that was sent to the server, by its place in the order of sending."""
        return self.pool.sent[number]

    def check_nothing_is_left(self, *, failed: int) -> None:
        """Checks that no call is in flight, and how many calls were counted as failed."""
        assert (self.port.in_flight, self.copy.calls, self.copy.row.in_flight, self.copy.row._running) == (
            0,
            set(),
            0,
            0,
        )
        assert self.copy.row._failed == failed


@pytest.fixture
async def relay() -> Relay:
    return Relay()


def tasks() -> int:
    """Returns the number of tasks besides the test's."""
    return len(asyncio.all_tasks()) - 1


async def test_a_call_and_its_reply_need_no_task(relay: Relay) -> None:
    """The usual call is sent at once under the copy's id, and its reply is passed back within the same turn of the
    event loop."""
    call = relay.call(b"/a.B/named", (b"own", b"1"), deadline=asyncio.get_running_loop().time() + 60)
    assert (relay.port.in_flight, relay.copy.row._running, tasks()) == (1, 1, 0)
    sent = relay.sent()
    assert (sent.headers[b"mm-model-id"], sent.headers[b"own"], sent.frame) == (b"m", b"1", FRAME)
    assert sent.timeout is not None
    sent.reply(b"\0\0\0\0\x02ok", [(b"h", b"1")], trailers=[(b"t", b"2"), (b"mesh-own", b"3")])
    ((code, _, frame, headers, trailers),) = call.answers
    assert (code, frame) == (0, b"\0\0\0\0\x02ok")
    assert (b"h", b"1") in headers
    assert trailers == [(b"t", b"2")]
    relay.check_nothing_is_left(failed=0)


async def test_a_failure_of_the_server_is_passed_back(relay: Relay) -> None:
    call = relay.call()
    relay.sent().fail(Code.ABORTED, "no such luck")
    assert (call.code, call.text) == (Code.ABORTED, "no such luck")
    relay.check_nothing_is_left(failed=1)


@pytest.mark.parametrize("takes_versions", [True, False])
async def test_a_server_with_names_of_its_own_gets_them_and_the_caller_does_not(
    relay: Relay, takes_versions: bool
) -> None:
    """The server gets its own name for the model, and the caller the id, in replies and errors alike. The relay removes
    the version from the request if the server would take it for one of its own."""
    relay.copy.name = "0f0f"
    relay.link.control.takes_versions = takes_versions
    asked = v2.ModelInferRequest(model_name="alias", model_version="1", id="7")
    headers = addressed("m", b"life.7")
    calls = [FakeCall(PREFIX + b"ModelInfer", headers, framing.pack(asked.SerializeToString())) for _ in range(2)]
    for call in calls:
        relay.port.handle(call)
    sent = v2.ModelInferRequest.FromString(framing.unpack(relay.sent().frame, b"", limit=1000))
    assert sent == v2.ModelInferRequest(model_name="0f0f", model_version="1" if takes_versions else "", id="7")
    relay.sent(0).reply(framing.pack(v2.ModelInferResponse(model_name="0f0f", model_version="3").SerializeToString()))
    reply = v2.ModelInferResponse.FromString(framing.unpack(calls[0].answers[0][2], b"", limit=1000))
    assert reply == v2.ModelInferResponse(model_name="m", model_version="3")
    relay.sent(1).fail(Code.INVALID_ARGUMENT, "model '0f0f' has no input x")
    assert calls[1].text == "model 'm' has no input x"
    relay.check_nothing_is_left(failed=1)


async def test_a_model_whose_process_died_is_withdrawn_and_its_call_is_not_repeated(relay: Relay) -> None:
    """A call that may have ended its model's process must not reach another copy."""
    call = relay.call()
    relay.sent().fail(Code.INTERNAL, "Stub process 'm_0' is not healthy.")
    assert (call.code, call.text) == (Code.INTERNAL, "Stub process 'm_0' is not healthy.")
    assert relay.table.copies.get("m") is None
    assert relay.table.going["m", b"life.7"] is relay.copy
    relay.check_nothing_is_left(failed=1)


async def test_a_lost_model_is_not_here(relay: Relay) -> None:
    call = relay.call()
    relay.sent().fail(Code.NOT_FOUND, "no such model")
    assert (NOT_HERE, b"1") in call.answers[0][3]
    assert relay.table.copies.get("m") is None
    assert relay.table.going["m", b"life.7"] is relay.copy
    relay.check_nothing_is_left(failed=1)


async def test_every_call_that_meets_a_loss_may_be_answered_elsewhere(relay: Relay) -> None:
    """Calls in flight find the model lost one after the other. None of them treats the loss as the model's own answer,
    even if the copy has never answered."""
    calls = [relay.call(), relay.call()]
    for number in range(2):
        relay.sent(number).fail(Code.NOT_FOUND, "no such model")
    assert [(NOT_HERE, b"1") in call.answers[0][3] for call in calls] == [True, True]
    relay.check_nothing_is_left(failed=2)


async def test_a_call_that_waits_for_the_server_notices_that_its_copy_is_lost(relay: Relay) -> None:
    """A call waits while the link finds out which models the server has lost. If the call's model is lost, the server
    does not get the call."""
    relay.link.is_up = False
    relay.envoy.running.clear()
    call = relay.call()
    await asyncio.sleep(0)
    relay.table.lost("m", "the model server does not have it")
    relay.envoy.running.set()
    await until(lambda: bool(call.answers), why="the call is answered")
    assert (NOT_HERE, b"1") in call.answers[0][3]
    assert not relay.pool.sent


async def test_a_caller_that_goes_ends_its_call_at_the_server(relay: Relay) -> None:
    call = relay.call()
    call.cancel()
    assert relay.sent().cancelled
    relay.check_nothing_is_left(failed=1)


async def test_a_caller_that_went_before_its_call_began(relay: Relay) -> None:
    call = FakeCall(b"/a.B/c", [*addressed("m", b"life.7")], FRAME)
    call.cancel()
    relay.port.handle(call)
    assert relay.sent().cancelled
    relay.check_nothing_is_left(failed=1)


async def test_a_deadline_ends_a_call(relay: Relay) -> None:
    call = relay.call(deadline=asyncio.get_running_loop().time() + 0.01)
    await until(lambda: bool(call.answers), why="the deadline has passed")
    assert call.code == Code.DEADLINE_EXCEEDED
    assert relay.sent().cancelled
    relay.check_nothing_is_left(failed=1)


async def test_metadata_or_a_message_that_cannot_be_passed_on_is_refused(relay: Relay) -> None:
    """Invalid messages, and metadata that cannot be sent, are the caller's mistake: the code is INVALID_ARGUMENT."""
    call = FakeCall(b"/a.B/named", [*addressed("m", b"life.7")], b"\0\0\0\0\x02\xff\xff")
    relay.port.handle(call)
    assert call.code == Code.INVALID_ARGUMENT
    assert not relay.pool.sent
    relay.check_nothing_is_left(failed=1)

    def refuses(*_: object, **__: object) -> None:
        raise ValueError("b'x' is not a valid grpc-encoding")

    relay.pool.send = refuses  # type: ignore[assignment, method-assign]
    call = relay.call()
    assert (call.code, call.text) == (
        Code.INVALID_ARGUMENT,
        "the call's metadata cannot be passed on: b'x' is not a valid grpc-encoding",
    )
    relay.check_nothing_is_left(failed=2)


async def test_a_call_waits_while_envoy_is_restarted(relay: Relay) -> None:
    """A call that arrives while Envoy is restarting becomes a task, which sends the call once Envoy runs again."""
    relay.envoy.running.clear()
    call = relay.call()
    await asyncio.sleep(0)
    assert (relay.pool.sent, tasks(), relay.copy.row.in_flight) == ([], 1, 1)
    relay.envoy.running.set()
    await until(lambda: bool(relay.pool.sent), why="the call is sent")
    relay.sent().reply()
    await until(lambda: bool(call.answers), why="the call is answered")
    assert call.code == Code.OK
    relay.check_nothing_is_left(failed=0)


async def test_a_call_that_envoy_did_not_get_is_sent_again(relay: Relay) -> None:
    call = relay.call()
    relay.sent().lose(LostKind.UNSENT)
    await until(lambda: len(relay.pool.sent) == 2, why="the call is sent again")
    relay.sent(1).reply()
    await until(lambda: bool(call.answers), why="the call is answered")
    assert call.code == Code.OK
    relay.check_nothing_is_left(failed=0)


@pytest.mark.parametrize("how", ["lost", "local"])
async def test_a_call_whose_connection_is_lost_waits_for_what_happened_to_the_server(relay: Relay, how: str) -> None:
    """A call that the server may have received is not sent again. An answer that Envoy itself makes because it has lost
    the server does not count as the server's answer."""
    call = relay.call()
    if how == "lost":
        relay.sent().lose(LostKind.SENT)
    else:
        relay.sent().fail(Code.UNAVAILABLE, "reset", [(LOCAL, b"upstream_reset")])
    await until(lambda: bool(call.answers), why="the call is answered")
    assert call.code == Code.UNAVAILABLE
    assert "the connection to the model server was lost during the call" in call.text
    assert relay.link.waited_for == [3]
    relay.check_nothing_is_left(failed=1)


async def test_an_unload_waits_for_calls_and_ends_those_that_last(relay: Relay) -> None:
    """After its grace period, a drain ends the calls that remain."""
    first = relay.call()
    drained = asyncio.create_task(relay.copy.drain(60))
    await asyncio.sleep(0)
    assert not drained.done()
    relay.sent().reply()
    await drained
    assert first.code == Code.OK
    second = relay.call()
    await relay.copy.drain(0)
    assert (second.code, second.text) == (
        Code.UNAVAILABLE,
        "the call was ended because its copy is being unloaded: call again",
    )
    assert relay.sent(1).cancelled
    relay.check_nothing_is_left(failed=1)


async def test_calls_of_a_limited_copy_wait_at_its_gate(relay: Relay) -> None:
    relay.copy.limit(1)
    calls = [relay.call() for _ in range(2)]
    await until(lambda: len(relay.pool.sent) == 1, why="the first is sent")
    await asyncio.sleep(0)
    assert len(relay.pool.sent) == 1
    relay.sent().reply()
    await until(lambda: len(relay.pool.sent) == 2, why="the second is sent")
    relay.sent(1).reply()
    await until(lambda: all(call.answers for call in calls), why="both are answered")
    relay.check_nothing_is_left(failed=0)


@pytest.mark.parametrize(
    ("place", "when"),
    [
        ("mesh.runtime.relay.metadata.to_server", "sent"),
        ("mesh.runtime.relay.metadata.to_client", "answered"),
        ("mesh.runtime.relay.metadata.to_server", "lost"),
    ],
)
async def test_a_fault_in_the_relay_fails_only_the_call(
    relay: Relay, monkeypatch: pytest.MonkeyPatch, place: str, when: str
) -> None:
    """The fault occurs while a call is sent, answered or taken over by a task. The call ends with INTERNAL, and is
    counted as ended."""
    if when == "sent":
        monkeypatch.setattr(place, lambda *_: 1 / 0)
    call = relay.call()
    monkeypatch.setattr(place, lambda *_: 1 / 0)
    if when == "answered":
        relay.sent().reply()
    elif when == "lost":
        relay.sent().lose(LostKind.UNSENT)
    assert call.code == Code.INTERNAL
    relay.check_nothing_is_left(failed=1)


async def test_a_fault_while_a_streamed_request_is_read_is_an_answer(relay, monkeypatch):
    """The server waits for the rest of the request, so no reply would ever come."""

    async def broken():
        raise ZeroDivisionError

    call = StreamCall(b"/a.B/c", addressed("m", b"life.7"), open=True)
    monkeypatch.setattr(call, "read", broken)
    relay.port.handle(call)
    await until(lambda: call.answers, why="the call is answered")
    assert (call.code, call.text) == (Code.INTERNAL, "internal error in the relay; its log has the cause")
    relay.check_nothing_is_left(failed=1)
