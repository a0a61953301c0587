"""Calls of a foreign model server over both edges and both egresses: unary calls and every kind of stream, and the
rules for methods and ids."""

import asyncio
import os
import re
import struct

import grpc
import pytest
import pytest_asyncio

from mesh.pb import inference_pb2
from mesh.v2 import SERVICE as V2
from tests.support.exampleproto import SERVICE, PredictRequest, PredictResponse
from tests.support.foreign import ForeignMesh
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

RULES = (
    *("--method", f"{SERVICE}/predict=3.7"),  # within an embedded message
    *("--method", f"{SERVICE}/predictEach=1"),
    *("--method", f"{SERVICE}/converse=1"),
    *("--method", f"{SERVICE}/predictAll"),  # allowed, without an id
    "--allow-any",
    "--v2",  # not listed
    *("--concurrency", "2"),
)
M = (("mm-model-id", "m"),)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["envoy", "grpc", "direct"])
async def it(request, tmp_path_factory, etcd_server):
    """A mesh of one example runtime with the model `m`.

    With "envoy" and "grpc", the runtime limits the concurrent calls of each model, and an egress of the same kind as
    the router's edge carries all calls. With "direct", there is no limit, and the relay sends calls of one message
    itself.
    """
    edge = "envoy" if request.param == "direct" else request.param
    rules = RULES if request.param != "direct" else [word for word in RULES if word not in ("--concurrency", "2")]
    async with ForeignMesh(
        tmp_path_factory.mktemp("calls"), etcd_server, *rules, edge=edge, egress=edge, direct=request.param == "direct"
    ) as it:
        await it.register("m", now=True)
        yield it


def method(it, name: str, shape: str):
    """Returns a method of the predictor for a client. `shape` is the kind of the method in grpc.aio's words, such as
    `unary_unary`."""
    return getattr(it.mesh.channel(), shape)(
        f"/{SERVICE}/{name}",
        request_serializer=PredictRequest.SerializeToString,
        response_deserializer=PredictResponse.FromString,
    )


def text_of(response) -> str:
    """Returns the only result of a response, which must be of model m."""
    (text,) = dict(response.results).values()
    assert list(response.results) == ["m"]
    return text


async def test_an_id_is_put_into_an_embedded_message(it):
    """A method's rule may place the id in an embedded message, which is created if the client sent none."""
    assert (await it.ask("m")).inner_model_name == "m"
    response = await it.ask("m", inner={"model_name": "of the client", "note": "n"}, model_name="untouched")
    assert (response.inner_model_name, response.model_name) == ("m", "untouched")


async def test_a_call_by_alias_reaches_the_server_with_the_id_of_the_model(it):
    """The id put into a call with `mm-vmodel-id` is the concrete one, that of the model behind the alias."""
    assert (await it.mesh.rest("PUT", "/mesh/v1/aliases/alias-of-m", {"target": "m"})).status == 201
    response = await it.predict(PredictRequest(text="hello"), metadata=(("mm-vmodel-id", "alias-of-m"),), timeout=20)
    assert (response.inner_model_name, text_of(response)) == ("m", "hello")


async def test_a_v2_message_names_the_routed_model_even_if_the_server_lists_no_v2_method(it):
    """A server that goes by the name in V2's messages gets the id of the model to which the call was routed: the model
    behind an alias, or the model in a stream's metadata, whatever the stream's messages name. V2's
    RepositoryModelUnload does not reach the server."""
    for model, number in (("own", b"3"), ("secret", b"7")):
        await it.register(model, now=True, content=number)
    assert (await it.mesh.rest("PUT", "/mesh/v1/aliases/alias-of-own", {"target": "own"})).status == 201
    coding = {
        "request_serializer": inference_pb2.ModelInferRequest.SerializeToString,
        "response_deserializer": inference_pb2.ModelInferResponse.FromString,
    }
    infer = it.mesh.channel().unary_unary(f"/{V2}/ModelInfer", **coding)
    for named in ("own", "alias-of-own"):
        response = await infer(inference_pb2.ModelInferRequest(model_name=named), timeout=20)
        assert (response.model_name, response.raw_output_contents[0]) == (named, struct.pack("<f", 3))
    each = it.mesh.channel().stream_stream(f"/{V2}/ModelStreamInfer", **coding)
    requests = [inference_pb2.ModelInferRequest(model_name=named) for named in ("own", "secret", "")]
    answers = [answer async for answer in each(iter(requests), metadata=(("mm-model-id", "own"),), timeout=20)]
    assert [answer.raw_output_contents[0] for answer in answers] == [struct.pack("<f", 3)] * 3
    unload = it.mesh.channel().unary_unary(f"/{V2}/RepositoryModelUnload")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await unload(b"", metadata=(("mm-model-id", "own"),), timeout=20)
    assert refused.value.details() == f"Method not found or not permitted: {V2}/RepositoryModelUnload"


async def test_a_method_that_is_not_listed_passes_unchanged_if_any_is_allowed(it):
    """With `allowAnyMethod`, methods that the server does not list reach it, except those of its management API."""
    other = it.mesh.channel().unary_unary("/example.Unlisted/method")
    with pytest.raises(grpc.aio.AioRpcError) as unknown:
        await other(b"", metadata=M, timeout=20)
    assert unknown.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "not permitted" not in (unknown.value.details() or ""), "the server's own answer"
    unload = it.mesh.channel().unary_unary("/mmesh.ModelRuntime/unloadModel")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await unload(b"", metadata=M, timeout=20)
    assert refused.value.details() == "Method not found or not permitted: mmesh.ModelRuntime/unloadModel"


@pytest.mark.parametrize("it", ["envoy", "grpc"], indirect=True, scope="module")
async def test_a_model_gets_no_more_calls_at_once_than_its_server_allows(it):
    """Calls beyond a copy's limit wait in the relay, and all are answered."""
    calls = [it.predict(PredictRequest(text="sleep 0.2"), metadata=M, timeout=30) for _ in range(7)]
    assert [text_of(response) for response in await asyncio.gather(*calls)] == ["sleep 0.2"] * 7
    told = [int(dict(await call.trailing_metadata())["example-most"]) for call in calls]
    assert max(told) == 2


async def test_a_server_stream_arrives_message_by_message(it):
    """A reply of several messages keeps their order, and the first message does not wait for later ones."""
    each = method(it, "predictEach", "unary_stream")
    texts = [str(number) for number in range(300)]
    call = each(PredictRequest(texts=texts), metadata=M, timeout=30)
    assert [text_of(response) async for response in call] == texts

    call = each(PredictRequest(texts=["first", "wait"]), metadata=M, timeout=30)
    first = await call.read()
    assert (text_of(first), first.model_name) == ("first", "m")
    call.cancel()


async def test_a_client_stream_is_read_to_its_end(it):
    """The server sees the end of a request of several messages when the client half-closes it."""
    call = method(it, "predictAll", "stream_unary")(metadata=M, timeout=30)
    for number in range(50):
        await call.write(PredictRequest(text=str(number)))
    await call.done_writing()
    assert text_of(await call) == " ".join(str(number) for number in range(50))


async def test_both_sides_converse_in_step(it):
    """In a bidirectional stream, each message is answered before the client sends the next one. Every message carries
    the id, and the trailers come last."""
    call = method(it, "converse", "stream_stream")(metadata=M, timeout=30)
    for number in range(50):
        await call.write(PredictRequest(text=str(number), model_name="of the client"))
        response = await call.read()
        assert (text_of(response), response.model_name) == (str(number), "m")
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK
    assert dict(await call.trailing_metadata())["example-trailer"] == "of the server"


async def test_a_stream_that_fails_in_its_middle_says_why(it):
    """When a stream fails, the client gets the messages before the failure, then the status, text and trailers."""
    call = method(it, "converse", "stream_stream")(metadata=M, timeout=30)
    await call.write(PredictRequest(text="hello"))
    assert text_of(await call.read()) == "hello"
    await call.write(PredictRequest(text="fail"))
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call.read()
    assert (failed.value.code(), failed.value.details()) == (grpc.StatusCode.DATA_LOSS, "as wanted")
    assert dict(await call.trailing_metadata())["example-trailer"] == "told"


async def test_a_stream_ends_at_the_server_when_its_client_goes(it):
    """The server notices when a client cancels a stream or its deadline passes."""
    before = it.noted("cancelled m")
    call = method(it, "converse", "stream_stream")(metadata=M, timeout=30)
    await call.write(PredictRequest(text="hello"))
    await call.read()
    call.cancel()
    await until(lambda: it.noted("cancelled m") == before + 1, why="the server sees the cancelled stream")
    call = method(it, "converse", "stream_stream")(metadata=M, timeout=0.5)
    await call.write(PredictRequest(text="hello"))
    await call.read()
    with pytest.raises(grpc.aio.AioRpcError) as passed:
        await call.read()
    assert passed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: it.noted("cancelled m") == before + 2, why="the server sees the deadline")


async def test_a_stream_of_a_lost_model_is_answered_after_a_load(it):
    """When the server has lost a stream's model, the stream's first message is sent again once the model is loaded."""
    name = f"n{os.urandom(3).hex()}"
    await it.register(name, now=True)
    await it.ask(name, "drop")
    call = method(it, "converse", "stream_stream")(metadata=(("mm-model-id", name),), timeout=30)
    await call.write(PredictRequest(text="hello"))
    assert dict((await call.read()).results) == {name: "hello"}
    assert it.noted(f"load {name}") == 2
    call.cancel()


async def test_a_message_that_cannot_be_read_is_refused_and_not_sent(it):
    """A message never reaches the server if its bytes are not a message, or if it has a number in place of the id."""
    before = it.noted("predict m")
    raw = it.mesh.channel().unary_unary(f"/{SERVICE}/predict")
    for message in (b"\x1a\x05ab", b"\x18\x01"):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await raw(message, metadata=M, timeout=20)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "the model id cannot be put into the request" in refused.value.details()
    assert it.noted("predict m") == before


async def test_a_large_message_passes(it):
    """A message of several megabytes passes in both directions, with and without compression by the client."""
    channel = grpc.aio.insecure_channel(it.mesh.grpc_address(), options=(("grpc.max_receive_message_length", -1),))
    it.mesh.channels.append(channel)
    predict = channel.unary_unary(f"/{SERVICE}/predict", PredictRequest.SerializeToString, PredictResponse.FromString)
    text = "x" * (5 << 20)
    assert text_of(await predict(PredictRequest(text=text), metadata=M, timeout=30)) == text
    call = predict(PredictRequest(text=text), metadata=M, timeout=30, compression=grpc.Compression.Gzip)
    assert text_of(await call) == text


async def test_a_pods_metrics_show_its_relay_and_egress(it, request):
    """A pod's metrics contain the memory of the agent, of the relay and, if the relay has one, of its Envoy."""
    (pod,) = (await it.mesh.rest("GET", "/mesh/v1/pods")).json["pods"]
    text = (await it.mesh.get(f"http://{pod['probe']}/metrics")).body.decode()
    memory = dict(re.findall(r'process_resident_memory_bytes\{process="(\S+)"\} (\S+)', text))
    envoy = set() if "grpc" in request.node.callspec.id else {"egress"}
    assert memory.keys() - {"agent"} == {"relay"} | envoy
    assert all(float(size) > 10 << 20 for size in memory.values())
