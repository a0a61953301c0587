"""Calls with several model ids: which models are called, what is answered, and what ends the call."""

import asyncio
import base64
import gzip

import pytest

from mesh.statuses import Code
from mesh.wire import framing
from router.settings import RouterSettings
from tests.support.exampleproto import PredictRequest, PredictResponse
from tests.support.fakecalls import FakeCall, StreamCall
from tests.support.waiting import until

PREDICT = b"/mmesh.ExamplePredictor/predict"
FRAME = framing.pack(PredictRequest(text="hello").SerializeToString())


def of(*names: str, header: bytes = b"mm-model-id") -> list[tuple[bytes, bytes]]:
    return [(header, name.encode()) for name in names]


def in_binary(*names: str, header: bytes = b"mm-model-id-bin") -> list[tuple[bytes, bytes]]:
    return [(header, base64.b64encode(name.encode()).rstrip(b"=")) for name in names]


@pytest.fixture(params=["unary", "stream"])
def calling(request, core):
    """Returns a function that dispatches a call with these headers, as a unary call or message by message."""

    def calling(headers, **more):
        unary = request.param == "unary"
        call = FakeCall(PREDICT, headers, FRAME, **more) if unary else StreamCall(PREDICT, headers, [FRAME], **more)
        core.dispatcher.dispatch(call)
        return call

    return calling


def waiting(core, pod="a"):
    """Returns the calls in flight to the pod, by model."""
    return {sent.headers[b"mm-model-id"].decode(): sent for sent in core.sent(pod) if not sent.over}


async def in_flight(core, *models):
    """Waits until these models are called at the same time, and returns the calls by model."""
    await until(lambda: set(waiting(core)) == set(models), interval=0.001, why=f"{models} are called")
    return waiting(core)


def answer(sent, text="hello", **more):
    model = sent.headers[b"mm-model-id"].decode()
    sent.reply(framing.pack(PredictResponse(results={model: text}).SerializeToString()), **more)


def results(call):
    """Returns the merged map of the answer."""
    (_, _, frame, _, _) = call.answers[0]
    return dict(PredictResponse.FromString(framing.unpack(frame, limit=1 << 20)).results)


@pytest.mark.parametrize("headers", [of, in_binary], ids=["plain", "binary"])
async def test_each_model_answers_and_the_replies_are_merged(core, calling, headers):
    """A call with three ids is sent to each model with the same request, and the reply is the merge of their
    replies."""
    for name in "abc":
        core.resident(name, "a")
    call = calling([*headers("a", "b", "c"), (b"own-header", b"1"), (b"mm-required", b"none")])
    sent = await in_flight(core, "a", "b", "c")
    for one in ("c", "a", "b"):
        assert sent[one].frame == FRAME
        assert sent[one].headers[b"own-header"] == b"1"
        assert b"mm-required" not in sent[one].headers
        answer(sent[one], one.upper())
    await core.answered(call)
    assert results(call) == {"a": "A", "b": "B", "c": "C"}


async def test_the_replies_are_joined_in_the_order_of_the_ids(core, calling):
    """The encoded replies are concatenated in the order of the ids, whichever model answers first. A model whose id
    occurs twice is called twice."""
    for name in "ab":
        core.resident(name, "a")
    call = calling(of("b", "a", "b"))
    await until(lambda: len(core.sent("a")) == 3, interval=0.001, why="three calls are sent")
    for number, sent in reversed(list(enumerate(core.sent("a")))):
        sent.reply(framing.pack(b"\x12\x01" + b"%d" % number))
    await core.answered(call)
    assert call.answers[0][2] == framing.pack(b"\x12\x010\x12\x011\x12\x012")


async def test_ids_joined_by_commas_are_several(core, calling):
    """Binary values that a client's library has joined with commas are several ids. A plain id may have a comma."""
    for name in ("a", "b", "c,d"):
        core.resident(name, "a")
    joined = b", ".join(value for _, value in in_binary("a", "b"))
    call = calling([(b"mm-model-id-bin", joined)])
    for sent in (await in_flight(core, "a", "b")).values():
        answer(sent)
    assert set(results(await core.answered(call))) == {"a", "b"}
    call = calling([*of("c,d"), *in_binary("c,d")])
    answer((await in_flight(core, "c,d"))["c,d"])
    assert results(await core.answered(call)) == {"c,d": "hello"}


async def test_vmodels_are_resolved_each(core, calling):
    """Several `mm-vmodel-id` headers name aliases, each of which stands for its model."""
    for name in "ab":
        core.resident(name, "a")
        core.alias(f"alias-of-{name}", name)
    call = calling(of("alias-of-a", "alias-of-b", header=b"mm-vmodel-id"))
    for sent in (await in_flight(core, "a", "b")).values():
        answer(sent)
    assert results(await core.answered(call)) == {"a": "hello", "b": "hello"}


async def test_missing_models_are_left_out(core, calling):
    """Ids that are not registered are left out. If one model is left, its reply is passed on as it is, even if it is
    compressed."""
    core.resident("a", "a")
    call = calling(of("x", "a", "y"))
    packed = gzip.compress(PredictResponse(results={"a": "1"}).SerializeToString())
    frame = b"\1" + len(packed).to_bytes(4, "big") + packed
    (await in_flight(core, "a"))["a"].reply(frame, headers=[(b"own", b"1")], encoding=b"gzip")
    await core.answered(call)
    assert call.answers[0][:4] == (0, "", frame, [(b"own", b"1"), (b"grpc-encoding", b"gzip")])


async def test_without_any_model_the_call_is_not_found(core, calling):
    call = await core.answered(calling(of("x", "y")))
    assert (call.code, call.text) == (Code.NOT_FOUND, "none of the requested models were found")


@pytest.mark.parametrize("value", [b"all", b"ALL"])
async def test_if_all_are_required_none_may_be_missing(core, calling, value):
    """With `mm-required: all`, one unregistered id fails the call and cancels the calls of the other models."""
    core.resident("a", "a")
    call = calling([*of("a", "x"), (b"mm-required", value)])
    await core.answered(call)
    assert (call.code, call.text) == (Code.NOT_FOUND, "model not found: x (mm-required: all)")
    assert not waiting(core)


async def test_any_other_failure_fails_the_call_and_ends_the_rest(core, calling):
    """The first failure of a model fails the whole call with its code and text. The other calls are cancelled."""
    for name in "abc":
        core.resident(name, "a")
    call = calling(of("a", "b", "c"))
    sent = await in_flight(core, "a", "b", "c")
    sent["b"].fail(Code.INVALID_ARGUMENT, "no such feature")
    await core.answered(call)
    assert (call.code, call.text) == (Code.INVALID_ARGUMENT, "no such feature")
    assert sent["a"].cancelled
    assert sent["c"].cancelled


async def test_a_models_own_not_found_is_no_missing_model(core, calling):
    """A NOT_FOUND that a model server answers is not taken for an id that is not registered."""
    for name in "ab":
        core.resident(name, "a")
    call = calling(of("a", "b"))
    (await in_flight(core, "a", "b"))["a"].fail(Code.NOT_FOUND, "no such row")
    await core.answered(call)
    assert (call.code, call.text) == (Code.NOT_FOUND, "no such row")


async def test_a_caller_that_goes_away_ends_all(core, calling):
    for name in "ab":
        core.resident(name, "a")
    call = calling(of("a", "b"))
    sent = await in_flight(core, "a", "b")
    call.cancel()
    await until(lambda: all(one.cancelled for one in sent.values()), interval=0.001, why="both calls are cancelled")
    assert not call.answers


async def test_the_deadline_is_that_of_each_call(core, calling):
    core.resident("a", "a")
    core.resident("b", "a")
    call = calling(of("a", "b"), deadline=asyncio.get_running_loop().time() + 0.1)
    await core.answered(call)
    assert call.code is Code.DEADLINE_EXCEEDED
    assert not waiting(core)


class TestFewAtOnce:
    """Calls with more ids than models may be called at the same time."""

    @pytest.fixture
    def settings(self):
        return RouterSettings("router", multi_parallelism=2, max_message=100)

    async def test_no_more_are_in_flight_than_allowed(self, core, calling):
        """The next model is called when one of the calls in flight was answered."""
        for name in "abcd":
            core.resident(name, "a")
        call = calling(of("a", "b", "c", "d"))
        answer((await in_flight(core, "a", "b"))["a"])
        sent = await in_flight(core, "b", "c")
        answer(sent["b"])
        answer(sent["c"])
        answer((await in_flight(core, "d"))["d"])
        assert set(results(await core.answered(call))) == {"a", "b", "c", "d"}

    async def test_replies_that_are_too_large_together_are_refused(self, core, calling):
        """Four models are asked, two at a time. The first two replies together already exceed `--max-message`, and fail
        the call."""
        for name in "abcd":
            core.resident(name, "a")
        call = calling(of("a", "b", "c", "d"))
        for sent in (await in_flight(core, "a", "b")).values():
            answer(sent, "x" * 80)
        await core.answered(call)
        assert call.code is Code.RESOURCE_EXHAUSTED
        assert "--max-message" in call.text
        assert not waiting(core)


async def test_merged_headers_are_bounded(core, calling):
    """Equal headers of several replies are passed on once. All headers together have less than 4 KiB, because clients
    do not accept many more."""
    for name in "ab":
        core.resident(name, "a")
    call = calling(of("a", "b"))
    for name, sent in (await in_flight(core, "a", "b")).items():
        answer(sent, headers=[(b"same", b"1"), (b"own", name.encode()), (b"long", name.encode() * 3000)])
    await core.answered(call)
    headers = call.answers[0][3]
    assert headers.count((b"same", b"1")) == 1
    assert sum(map(len, (part for header in headers for part in header))) < 4096


async def test_a_stream_cannot_go_to_several_models(core):
    """A call with several ids must have a request of exactly one message."""
    for messages in ([], [FRAME, FRAME]):
        call = StreamCall(PREDICT, of("a", "b"), messages)
        core.dispatcher.dispatch(call)
        await core.answered(call)
        assert (call.code, call.text) == (
            Code.INVALID_ARGUMENT,
            "a call with several model ids needs exactly one message",
        )


async def test_an_id_in_the_message_beats_several_in_headers(core):
    core.resident("m", "a")
    for call in (
        FakeCall(headers=of("x", "y"), frame=core.frame("m")),
        StreamCall(headers=of("x", "y"), messages=[core.frame("m")]),
    ):
        core.dispatcher.dispatch(call)
        (await in_flight(core, "m"))["m"].reply()
        await core.answered(call)
        assert call.code is Code.OK
