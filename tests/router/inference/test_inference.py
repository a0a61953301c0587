"""V2 without a transport: the server's own methods, and calls of models from inside the process."""

import types

import pytest

from mesh.pb import inference_pb2 as pb
from mesh.statuses import Code, MeshError, Reason
from mesh.wire import framing
from router.calls import answers
from router.inference.models import Caller, CallFailed, Models
from router.inference.server import V2Server

V2 = b"/inference.GRPCInferenceService/"


class Dispatcher:
    """A dispatcher that keeps its calls and answers them as a test says."""

    def __init__(self, answer):
        self.answer = answer
        self.calls = []

    def dispatch(self, call):
        self.calls.append(call)
        self.answer(call)


def models(answer, *, max_message=1 << 20):
    dispatcher = Dispatcher(answer)
    return dispatcher, Models(dispatcher.dispatch, max_message=max_message)


def replies(message):
    return lambda call: call.reply(framing.pack(message.SerializeToString()))


async def test_a_model_is_asked_as_a_grpc_client_would_ask_it():
    """A model call from inside the process has the method, message, metadata, deadline and peer of a gRPC client's
    call."""
    dispatcher, served = models(replies(pb.ModelMetadataResponse(name="m", platform="onnx")))
    caller = Caller(deadline=1e12, metadata=[(b"x-a", b"1")], peer="1.2.3.4")
    found = await served.metadata(pb.ModelMetadataRequest(name="m"), caller)
    assert found.platform == "onnx"
    (call,) = dispatcher.calls
    assert (call.method, call.headers, call.deadline, call.peer) == (
        V2 + b"ModelMetadata",
        [(b"x-a", b"1")],
        1e12,
        "1.2.3.4",
    )
    assert pb.ModelMetadataRequest.FromString(framing.unpack(call.frame, limit=99)).name == "m"


async def test_ready_says_what_the_model_says():
    _, served = models(replies(pb.ModelReadyResponse(ready=True)))
    assert (await served.ready(pb.ModelReadyRequest(name="m"), Caller())).ready


async def test_an_inference_passes_its_frame_as_it_is():
    """The dispatcher gets the frame of the request itself, which is neither encoded again nor copied."""
    dispatcher, served = models(replies(pb.ModelInferResponse(model_name="m")))
    frame = framing.pack(b"whatever")
    answer = await served.infer(frame, Caller())
    assert dispatcher.calls[0].frame is frame
    assert served.response(answer).model_name == "m"


async def test_a_failure_keeps_its_status_and_details():
    error = MeshError(Reason.QUARANTINED, "no more", retry_after=2.0)
    _, served = models(lambda call: answers.fail(call, error))
    with pytest.raises(CallFailed) as caught:
        await served.infer(framing.pack(b""), Caller())
    assert caught.value.answer.code == Code.FAILED_PRECONDITION
    assert caught.value.answer.metadata(answers.DETAILS) is not None


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        pytest.param(framing.pack(b"\xff\xff"), Reason.INTERNAL, id="no message"),
        pytest.param(framing.pack(b"x" * 100), Reason.TOO_LARGE, id="too large"),
    ],
)
async def test_an_answer_that_cannot_be_read_is_the_servers_fault(frame, reason):
    _, served = models(lambda call: call.reply(frame), max_message=50)
    with pytest.raises(MeshError, match="model server's answer") as caught:
        await served.metadata(pb.ModelMetadataRequest(name="m"), Caller())
    assert caught.value.reason is reason


@pytest.mark.parametrize(
    ("router", "states", "why"),
    [
        ("this router is stopping", ["ready"], "this router is stopping"),
        (None, [], "there is no runtime pod"),
        (None, [None], "there is no runtime pod"),
        (None, ["leaving", "starting"], "no runtime pod is ready (leaving, starting)"),
        (None, ["leaving", "ready"], None),
    ],
)
def test_the_server_is_ready_where_an_inference_can_be_served(router, states, why):
    pods = {
        str(number): types.SimpleNamespace(record=state and types.SimpleNamespace(state=state))
        for number, state in enumerate(states)
    }
    server = V2Server(types.SimpleNamespace(pods=pods), lambda: router)
    assert server.why_not_ready() == why
    assert server.ready(pb.ServerReadyRequest()).ready is (why is None)
    assert server.live(pb.ServerLiveRequest()).live
    assert server.metadata(pb.ServerMetadataRequest()).name == "mesh"
