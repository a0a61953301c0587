"""Retrying, which has the same rules for unary calls and streams: equal failures have equal outcomes."""

import asyncio

import pytest

from mesh.statuses import Code, Reason
from mesh.wire import framing
from mesh.wire.client import LostKind, Reply
from placement.retry import MAX_TRIES
from router.calls import answers, streams
from tests.support import fakecalls
from tests.support.fakecalls import FakeCall, StreamCall
from tests.support.waiting import until

UNSAFE = b"/some.Predictor/predict"
OF_M = [(b"mm-model-id", b"m")]


def resident(core, *pods):
    """Registers the model and shows it as loaded in these pods, which are tried in that order."""
    core.register()
    for number, pod in enumerate(pods):
        core.world.pod(pod)
        core.world.copy("m", pod)
        core.world.view.pods[pod].load = 10 * number
        core.agents.answers[pod] = fakecalls.loaded()


@pytest.fixture(params=["unary", "stream"])
def carry(request, core):
    """Returns a function that dispatches a call of the model, as a unary call or as a stream."""

    def carry(*, safe=True, deadline=None, frame=None):
        when = None if deadline is None else asyncio.get_running_loop().time() + deadline
        frame = frame or (core.frame() if safe else framing.pack(b"x"))
        how = {"deadline": when} if safe else {"deadline": when, "method": UNSAFE, "headers": OF_M}
        call = FakeCall(frame=frame, **how) if request.param == "unary" else StreamCall(messages=[frame], **how)
        core.dispatcher.dispatch(call)
        return call

    return carry


async def play(core, call, *troubles):
    """Answers the attempts of a call with these failures, then with replies, until the call is answered. Returns the
    pods in order."""
    pods, left = [], list(troubles)

    def waiting():
        return [(pod, sent) for pod in core.agents.answers for sent in core.sent(pod) if not sent.over]

    while True:
        await until(lambda: call.answers or waiting(), interval=0.001, why="the call is sent or answered")
        if call.answers:
            return pods
        ((pod, sent),) = waiting()
        pods.append(pod)
        trouble = left.pop(0) if left else "reply"
        if isinstance(trouble, LostKind):
            sent.lose(trouble)
        else:
            getattr(sent, trouble)()
        await asyncio.sleep(0)


LOST, UNSENT, BEGUN = LostKind.SENT, LostKind.UNSENT, LostKind.STARTED
TABLE = {
    "answered": (True, [], Code.OK, "a"),
    "not here": (False, ["not_here"], Code.OK, "ab"),
    "not here twice": (True, ["not_here", "not_here"], Code.OK, "abc"),
    "unsent": (False, [UNSENT], Code.OK, "ab"),
    "unsent, then not here": (False, [UNSENT, "not_here"], Code.OK, "abc"),
    "lost": (True, [LOST], Code.OK, "ab"),
    "lost, unsafe": (False, [LOST], Code.UNAVAILABLE, "a"),
    "lost twice": (True, [LOST, LOST], Code.UNAVAILABLE, "ab"),
    "not here, then lost": (True, ["not_here", LOST], Code.OK, "abc"),
    "lost, then unsent": (True, [LOST, UNSENT], Code.OK, "abc"),
    "begun": (True, [BEGUN], Code.UNAVAILABLE, "a"),
    "verify first": (False, ["verify_first"], Code.OK, "aa"),
    "verify first and lost": (True, ["verify_first", LOST], Code.OK, "aab"),
}


@pytest.mark.parametrize(("safe", "troubles", "code", "pods"), TABLE.values(), ids=TABLE)
async def test_the_table(core, carry, safe, troubles, code, pods):
    resident(core, "a", "b", "c")
    call = carry(safe=safe)
    assert "".join(await play(core, call, *troubles)) == pods
    assert call.code is code


async def test_a_pod_that_says_not_here_again_and_again_is_given_up(core, carry):
    resident(core, "a")
    call = carry()
    assert await play(core, call, *["not_here"] * 20) == ["a"] * MAX_TRIES
    assert call.code is Code.UNAVAILABLE
    assert "a does not hold the model" in call.text
    assert _retry_after(call) == 1.0


async def test_without_a_free_connection_nothing_is_loaded(core, carry):
    resident(core, "a")
    core.world.pool("a").full = True
    call = carry()
    assert await play(core, call, UNSENT) == ["a"]
    assert call.code is Code.RESOURCE_EXHAUSTED
    assert core.agents.loads == []


async def test_what_cannot_be_tried_again_before_its_deadline_is_not_waited_for(core, carry):
    """A caller whose deadline does not permit a retry gets the known failure at once, instead of a timeout later."""
    resident(core, "a", "b")
    call = carry(deadline=0.15)
    assert await play(core, call, LOST) == ["a"]
    assert (call.code, "lost in the middle of the call" in call.text) == (Code.UNAVAILABLE, True)
    assert "because its deadline comes first" in call.text


async def test_a_pod_that_goes_before_anything_is_sent_is_not_waited_for(core, carry):
    resident(core, "a", "b")
    pod, left = core.world.view.pods["a"], core.agents.answers.pop("a")
    pool, pod.pool = pod.pool, None
    call = carry()
    assert await play(core, call) == ["b"]
    pod.pool, core.agents.answers["a"] = pool, left


async def test_calls_are_cold_where_they_waited_for_a_load(core, carry):
    """A call that waited for a load counts as cold, even if it first found a copy that had already gone."""
    resident(core, "a")
    call = carry()
    await play(core, call, "not_here")
    meter = core.forwarder.meter
    await until(lambda: sum(meter.cold.counts) == 1, interval=0.001, why="the call is counted as cold")
    assert sum(meter.hits.counts) == 0


async def test_a_server_that_is_lost_within_a_reply_counts_as_lost(core, carry):
    """A model that kills servers during its replies must not be called in the next server unchecked."""
    resident(core, "a")
    call = carry()
    await until(lambda: core.sent("a"), interval=0.001)

    class Broken:
        headers, encoding = [], b""

        async def read(self):
            raise fakecalls.Lost(BEGUN, "it died")

    call.start = lambda headers=(): None
    core.sent("a")[0].over = True
    core.sent("a")[0].sink.on_stream(Broken())
    await core.answered(call)
    assert call.code is Code.UNAVAILABLE
    assert core.forwarder.meter.lost.value == 1
    assert "m" in core.forwarder.deaths.watched


# --- what only streams have ---


async def test_a_fault_of_the_router_itself_is_an_answer_to_a_stream(core, monkeypatch):
    """Without an answer, a caller without a deadline would wait forever."""
    resident(core, "a")

    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(core.dispatcher.forwarder, "pick", broken)
    call = StreamCall(messages=[core.frame()])
    core.dispatcher.dispatch(call)
    await core.answered(call)
    assert (call.code, call.text) == (Code.INTERNAL, "internal error; the router's log has the cause")
    assert core.dispatcher.forwarder.in_flight == 0


async def test_messages_that_were_kept_are_sent_again(core):
    resident(core, "a", "b")
    messages = [core.frame(), framing.pack(b"second"), framing.pack(b"third")]
    call = StreamCall(messages=messages)
    core.dispatcher.dispatch(call)
    (first,) = [await core.reaches("a")]
    await until(lambda: len(first.messages) == 3, interval=0.001)
    first.not_here()
    second = await core.reaches("b")
    await until(lambda: len(second.messages) == 3, interval=0.001)
    assert second.messages == first.messages == messages
    second.reply()
    await core.answered(call)
    assert call.code is Code.OK


@pytest.mark.parametrize("trouble", ["not_here", "verify_first"])
async def test_a_stream_that_has_sent_too_much_is_not_sent_again(core, trouble):
    resident(core, "a", "b")
    large = framing.pack(bytes(streams._KEPT))
    call = StreamCall(messages=[core.frame(), large, large])
    core.dispatcher.dispatch(call)
    sent = await core.reaches("a")
    await until(lambda: len(sent.messages) == 3, interval=0.001)
    getattr(sent, trouble)()
    await core.answered(call)
    assert call.code is Code.UNAVAILABLE
    assert "too much of the request was sent" in call.text
    assert core.sent("b") == []


@pytest.mark.parametrize("pieces", [1, 2])
async def test_a_message_in_pieces_is_sent_again_only_if_its_first_piece_was_all_that_was_sent(core, pieces):
    """The first piece of a large message is kept, the later ones are not. Once the second piece was sent, the call
    is not sent again, even if the pod has run nothing."""
    resident(core, "a", "b")
    sizes = [streams._KEPT, streams._KEPT + 1][:pieces]
    messages = [bytes([number]) * size for number, size in enumerate(sizes)]
    call = StreamCall(UNSAFE, OF_M, messages, open=True)
    core.dispatcher.dispatch(call)
    sent = await core.reaches("a")
    await until(lambda: sent.messages == messages, interval=0.001)
    assert (core.forwarder.budget.held > 0) == (pieces == 1), "nothing is kept that will not be sent again"
    sent.not_here()
    if pieces == 1:
        again = await core.reaches("b")
        await until(lambda: again.messages == messages, interval=0.001)
        call.cancel()
    else:
        await core.answered(call)
        assert (call.code, core.sent("b")) == (Code.UNAVAILABLE, [])


async def test_a_stream_keeps_nothing_once_its_reply_has_begun(core):
    resident(core, "a")
    call = StreamCall(open=True)
    core.dispatcher.dispatch(call)
    sent = await core.reaches("a")
    await until(lambda: sent.messages, interval=0.001)
    sent.over = True
    sent.sink.on_reply(Reply(0, frame=framing.pack(b"")))
    await core.answered(call)
    assert call.code is Code.OK


def _retry_after(call):
    from mesh.wire.localcall import LocalAnswer
    from router.rest import errors

    code, text, _, headers, trailers = call.answers[0]
    assert answers.DETAILS in dict(trailers)
    _, body = errors.of_answer(LocalAnswer(code, text, None, headers, trailers))
    assert body["reason"] == Reason.UNAVAILABLE.name
    return body["retry_after"]


def test_large_messages_arrive_in_pieces_only_if_they_are_passed_on_unread(core):
    """A message is needed as a whole if it contains the id, if it goes to several models, or if the router answers
    itself. Other large messages arrive in pieces."""
    one, several = [(b"mm-model-id", b"m")], [(b"mm-model-id", b"m"), (b"mm-model-id", b"n")]
    core.dispatcher.serve({b"/grpc.health.v1.Health/Watch": lambda call: None})
    forwards = core.dispatcher.forwards
    assert forwards(FakeCall(UNSAFE, one))
    assert not forwards(FakeCall(UNSAFE, several))
    assert not forwards(FakeCall(headers=one))
    assert not forwards(FakeCall(b"/grpc.health.v1.Health/Watch", one))
    assert not forwards(FakeCall(b"/mmesh.ModelRuntime/loadModel", one))
