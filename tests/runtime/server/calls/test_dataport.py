"""Calls on the data port: the copy that answers, the contents of the reply, and refusals."""

import asyncio
import gzip
import math
import threading
import time

import numpy as np
import pytest

from mesh.pb import details_pb2
from mesh.pb import inference_pb2 as pb
from mesh.runtime.server.onnx import session
from mesh.runtime.server.v2 import requests
from mesh.statuses import Code, MeshError, Reason
from mesh.v2.datatypes import DATATYPES, Datatype
from mesh.wire import encoding, framing, headers
from mesh.wire.metadata import decode_bin, encode_bin, encode_text
from placement.fence import Mode
from tests.runtime.server.conftest import ONE, answered, outputs, reply
from tests.runtime.server.v2.test_tensors import contents_of, raw_of
from tests.support import models
from tests.support.fakecalls import FakeCall
from tests.support.onnxserver import SERVICE, request

TOKEN = b"agent-1.7"
OF_NAME = {kind.name: kind for kind in DATATYPES}
SIZES = {kind.name: kind.size for kind in DATATYPES}


def named(call: FakeCall) -> set[bytes]:
    """Returns the names of the headers in an answer."""
    return {name for name, _ in call.answers[0][3]}


# -- which copy


async def test_a_call_finds_its_copy_by_header_or_by_name(parts):
    """The id in a header takes precedence over the name in the message. The reply repeats the request's id."""
    await parts.load("a", models.constant(1))
    await parts.load("b", models.constant(2))
    for message, more, name, value in (
        (request("a", x=ONE), (), "a", 1),
        (request("a", x=ONE), ((headers.MODEL_ID, b"b"),), "b", 2),
        (request("alias", x=ONE), ((headers.MODEL_ID_BIN, encode_bin(b"b")),), "b", 2),
        (request("", x=ONE), ((headers.MODEL_ID, b"a"),), "a", 1),
    ):
        call = parts.send(message, *more)
        answer = await reply(call)
        assert (answer.model_name, answer.id) == (name, "42")
        assert (await outputs(call))[0].item() == value
        assert headers.LOAD in named(call)


async def test_ids_need_not_be_ascii(parts):
    await parts.load("modèle/1 é", models.constant(5))
    name = "modèle/1 é"
    for more in ((), ((headers.MODEL_ID, name.encode()),), ((headers.MODEL_ID_BIN, encode_bin(name.encode())),)):
        assert (await reply(parts.send(request(name, x=ONE), *more))).model_name == name


@pytest.mark.parametrize("method", ["ModelInfer", "ModelMetadata", "ModelReady"])
async def test_only_the_copy_that_is_meant_answers(parts, method):
    """A call with another token, without a token, or with an unknown id is answered *not here*, and is no use of the
    model."""
    await parts.load("m", models.constant(1), token=TOKEN, slot=0)
    message = request("m", x=ONE) if method == "ModelInfer" else pb.ModelReadyRequest(name="m").SerializeToString()
    others = pb.ModelReadyRequest(name="n").SerializeToString()
    for body, more in (
        (message, ((headers.COPY, b"agent-1.8"),)),
        (message, ((headers.COPY, b"agent-2.7"), (headers.MODEL_ID, b"m"))),
        (message, ((headers.MODEL_ID, b"m"),)),
        (message, ()),
        (others, ((headers.COPY, TOKEN),)),
        (message, ((headers.COPY, TOKEN), (headers.MODEL_ID, b"n"))),
    ):
        call = parts.send(body, *more, method=method)
        assert call.code is Code.UNAVAILABLE
        assert named(call) == {headers.NOT_HERE}
    assert parts.board.read(0).calls == 0
    call = await answered(parts.send(message, (headers.COPY, TOKEN), method=method))
    assert call.code is Code.OK
    assert headers.NOT_HERE not in named(call)


async def test_a_copy_without_a_token_answers_whatever_token_comes(parts):
    await parts.load("m", models.constant(3))
    call = parts.send(request("m", x=ONE), (headers.COPY, b"whatever"))
    assert (await outputs(call))[0].item() == 3


async def test_a_call_that_names_no_model_is_refused(parts):
    """A call without a model's name gets INVALID_ARGUMENT, because *not here* would only make the caller try other
    pods."""
    for more in ((), ((headers.MODEL_ID, b""),)):
        call = parts.send(request("", x=ONE), *more)
        assert call.code is Code.INVALID_ARGUMENT
        assert "names no model" in call.text
    call = parts.send(request("m"), (headers.MODEL_ID_BIN, b"!"))
    assert "base64" in call.text


# -- what is answered


async def test_a_regression_answers_as_onnxruntime_does(parts):
    copy = await parts.load("m", models.logistic_regression(1))
    for rows in (1, 7, 1):
        x = np.random.default_rng(rows).normal(size=(rows, 64)).astype(np.float32)
        expected = copy.session.run(["label", "probabilities"], {"x": x}, None)
        for found, wanted in zip(await outputs(parts.infer("m", x=x)), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)


async def test_typed_requests_get_typed_replies(parts):
    """A reply has only the requested outputs, in the requested order."""
    await parts.load("m", models.logistic_regression(1, features=2))
    message = pb.ModelInferRequest(model_name="m", outputs=[{"name": "probabilities"}, {"name": "label"}])
    message.inputs.add(name="x", datatype="FP32", shape=[1, 2], contents={"fp32_contents": [0.5, -1]})
    answer = await reply(parts.send(message.SerializeToString()))
    assert [output.name for output in answer.outputs] == ["probabilities", "label"]
    assert sum(answer.outputs[0].contents.fp32_contents) == pytest.approx(1)
    assert not answer.raw_output_contents
    del message.outputs[0]
    assert [o.name for o in (await reply(parts.send(message.SerializeToString()))).outputs] == ["label"]


@pytest.mark.parametrize("datatype", sorted(models.ONNX_TYPES))
async def test_every_datatype_goes_through_a_model(parts, datatype):
    """Raw contents of every datatype come back unchanged. Two calls are made, because the second one may run inline."""
    await parts.load("m", models.identity(datatype))
    size = SIZES[datatype]
    raw = bytes(range(2 * size)) if size > 1 else b"\1\0" if size else b"\1\0\0\0a\3\0\0\0\xc3\xa9b"
    message = pb.ModelInferRequest(model_name="m", raw_input_contents=[raw])
    message.inputs.add(name="x", datatype=datatype, shape=[2])
    for _ in range(2):
        answer = await reply(parts.send(message.SerializeToString()))
        assert list(answer.raw_output_contents) == [raw]
        assert (answer.outputs[0].datatype, list(answer.outputs[0].shape)) == (datatype, [2])


async def test_texts_go_through_a_model(parts):
    await parts.load("m", models.shout())
    message = pb.ModelInferRequest(model_name="m")
    message.inputs.add(name="x", datatype="BYTES", shape=[2], contents={"bytes_contents": [b"hi", "é".encode()]})
    answer = await reply(parts.send(message.SerializeToString()))
    assert list(answer.outputs[0].contents.bytes_contents) == [b"hi!", "é!".encode()]


async def test_large_messages_are_answered_too(parts):
    """The raw contents of a large message are cut out before protobuf reads the rest."""
    await parts.load("m", models.identity(shape=(None,)))
    x = np.arange(100_000, dtype=np.float32)
    (found,) = await outputs(parts.infer("m", x=x))
    np.testing.assert_array_equal(found, x)


@pytest.mark.parametrize("beside", [None, "FP32", "BF16"])
@pytest.mark.parametrize("datatype", sorted(models.ONNX_TYPES))
async def test_every_datatype_shape_and_encoding_by_both_ways_of_running(parts, datatype, beside):
    """Every datatype, shape and encoding comes back unchanged: alone, next to an ordinary input, and next to BF16,
    which runs differently. Other values are sent in between to reveal reused memory."""
    datatypes = [datatype] if beside is None else [datatype, beside]
    kinds = [OF_NAME[name] for name in datatypes]
    raw_only = not all(kind.field for kind in kinds)
    model = ""

    def sample(kind: Datatype, shape: tuple[int, ...], seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        if kind.dtype.hasobject:
            array = np.empty(shape, object)
            for index in np.ndindex(shape):
                array[index] = "é" * int(rng.integers(5))
            return array
        return (rng.random(shape) * 100).astype(kind.dtype)

    async def asked(shape: tuple[int, ...], typed: bool, seed: int) -> None:
        message = pb.ModelInferRequest(model_name=model, id=str(seed))
        arrays = [sample(kind, shape, seed) for kind in kinds]
        for number, (kind, array) in enumerate(zip(kinds, arrays, strict=True)):
            one = message.inputs.add(name=f"x{number}", datatype=kind.name, shape=shape)
            if typed:
                one.contents.CopyFrom(contents_of(kind, array))
            else:
                message.raw_input_contents.append(raw_of(array))
        answer = await reply(parts.send(message.SerializeToString()))
        assert [tuple(output.shape) for output in answer.outputs] == [shape] * len(kinds)
        for number, (kind, array) in enumerate(zip(kinds, arrays, strict=True)):
            output = answer.outputs[number]
            assert (output.name, output.datatype) == (f"y{number}", kind.name)
            if typed:
                assert output.contents == contents_of(kind, array)
            else:
                assert answer.raw_output_contents[number] == raw_of(array)

    for shape in ((), (0,), (3,), (2, 0, 3), (2, 3)):
        model = f"rank {len(shape)}"
        copy = await parts.load(model, models.all_types(*datatypes, shape=[None] * len(shape)))
        assert not copy.note
        for typed in (False,) if raw_only else (False, True):
            for seed in (1, 2, 1):
                await asked(shape, typed, seed)


@pytest.mark.parametrize("datatype", ["FP32", "BYTES", "INT64"])
async def test_inputs_of_type_optional_may_be_left_out_or_given(parts, datatype):
    """Inputs whose type is not optional must be given."""
    await parts.load("m", models.with_optional(datatype), slot=0)
    kind = OF_NAME[datatype]
    first, second = (
        np.array(values).astype(str).astype(object) if kind.dtype.hasobject else np.array(values, kind.dtype)
        for values in ([1, 2], [7])
    )
    for given, expected in ((None, first), (second, second)):
        message = pb.ModelInferRequest(model_name="m")
        for name, array in (("x", first), ("o", given)):
            if array is not None:
                message.inputs.add(name=name, datatype=datatype, shape=array.shape)
                message.raw_input_contents.append(raw_of(array))
        answer = await reply(parts.send(message.SerializeToString()))
        assert answer.raw_output_contents[0] == raw_of(expected)
    call = parts.send(pb.ModelInferRequest(model_name="m").SerializeToString())
    assert call.code is Code.INVALID_ARGUMENT
    assert "needs input 'x'" in call.text


@pytest.mark.parametrize(("model", "required"), [(models.with_default, ["x"]), (models.with_optional, ["x"])])
async def test_metadata_lists_required_inputs_alone(parts, model, required):
    """Clients fill in every input that metadata lists."""
    await parts.load("m", model())
    call = parts.send(pb.ModelMetadataRequest(name="m").SerializeToString(), method="ModelMetadata")
    found = pb.ModelMetadataResponse.FromString(call.answers[0][2][5:])
    assert [one.name for one in found.inputs] == required


async def test_inputs_with_a_default_may_be_left_out_or_given(parts):
    """An ONNX file lists an input with a default both as an input and as an initializer."""
    await parts.load("m", models.with_default())
    assert await parts.value("m") == 11
    (found,) = await outputs(parts.infer("m", x=ONE, offset=np.array([2], np.float32)))
    assert found.item() == 3


async def test_a_model_without_inputs_answers_raw(parts):
    """A request without inputs has neither typed nor raw contents. The reply to it is raw."""
    await parts.load("m", models.without_inputs())
    (found,) = await outputs(parts.infer("m"))
    assert found.tolist() == [1, 2]


async def test_outputs_that_v2_cannot_carry_are_left_out(parts):
    """An output such as a map is refused if it is requested."""
    await parts.load("m", models.with_map_output())
    x = np.zeros((2, 4), np.float32)
    assert [output.name for output in (await reply(parts.infer("m", x=x))).outputs] == ["label"]
    message = pb.ModelInferRequest.FromString(request("m", x=x))
    message.outputs.add(name="scores")
    call = parts.send(message.SerializeToString())
    assert call.code is Code.INVALID_ARGUMENT
    assert "'scores' is seq(map(int64,tensor(float)))" in call.text


async def test_metadata_and_ready(parts):
    """Metadata describes the model's inputs and outputs, with -1 for varying dimensions, and a loaded model is
    ready."""
    await parts.load("m", models.with_map_output())
    call = parts.send(pb.ModelMetadataRequest(name="m").SerializeToString(), method="ModelMetadata")
    frame = call.answers[0][2]
    metadata = pb.ModelMetadataResponse.FromString(frame[5:])
    assert (metadata.name, metadata.platform) == ("m", "onnx_onnxv1")
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs] == [("x", "FP32", [-1, 4])]
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.outputs] == [("label", "INT64", [-1])]
    call = parts.send(pb.ModelReadyRequest(name="m").SerializeToString(), method="ModelReady")
    assert pb.ModelReadyResponse.FromString(call.answers[0][2][5:]).ready


async def test_the_server_says_how_it_is(parts):
    assert pb.ServerLiveResponse.FromString(parts.send(b"", method="ServerLive").answers[0][2][5:]).live
    assert pb.ServerReadyResponse.FromString(parts.send(b"", method="ServerReady").answers[0][2][5:]).ready
    frame = parts.send(b"", method="ServerMetadata").answers[0][2]
    assert pb.ServerMetadataResponse.FromString(frame[5:]).name == "mesh-onnx"


# -- what is refused


async def test_wrong_requests_are_refused_and_count_as_uses(parts):
    """Invalid requests get INVALID_ARGUMENT with an explanation and a machine-readable reason. They count as uses of
    the model."""
    await parts.load("m", models.matmul(), slot=0)
    ok, wide = np.ones((1, 2), np.float32), np.ones((2, 1), np.float32)
    for inputs, says in (
        ({"a": ok}, "needs input 'b'"),
        ({"a": ok, "c": ok}, "no input 'c'"),
        ({"a": ok.astype(np.int64), "b": ok}, "INT64"),
        ({"a": ok[0], "b": ok}, "shape [2]"),
    ):
        call = parts.infer("m", **inputs)
        assert call.code is Code.INVALID_ARGUMENT
        assert says in call.text
        ((name, value),) = call.answers[0][4]
        assert name == b"grpc-status-details-bin"
        status = details_pb2.Status.FromString(decode_bin(value))
        assert details_pb2.ErrorInfo.FromString(status.details[0].value).reason == "BAD_REQUEST"
    use = parts.board.read(0)
    assert (use.calls, use.failed, use.busy_ns, use.in_flight, use.running) == (4, 4, 0, 0, 0)
    assert (await outputs(parts.infer("m", a=ok, b=wide)))[0].tolist() == [[2]]


async def test_what_a_model_that_has_run_cannot_do_with_is_the_callers_mistake(parts):
    """If a model has run before, shapes that fit its inputs but not each other are the caller's mistake. The error has
    onnxruntime's text, whether the call ran inline or in a thread."""
    await parts.load("m", models.matmul(), slot=0)
    wrong = np.ones((3, 5), np.float32)
    for array in (wrong, np.ones((300, 500), np.float32)):
        call = await answered(parts.infer("m", a=array, b=array))
        assert call.code is Code.INVALID_ARGUMENT
        assert "the model does not accept this input" in call.text
        assert "MatMul" in call.text
    assert (parts.board.read(0).failed, parts.board.read(0).running) == (2, 0)


async def test_a_model_that_has_never_run_is_to_blame_itself(parts):
    """Until a model has run successfully, a failed run is the model's fault. After that, the input is to blame."""
    copy = await parts.load("m", models.picky(), slot=0)
    assert copy.note.startswith("its warm-up call, with generated input, failed: the model failed: ")
    good = np.ones((4, 1), np.float32)
    assert (await answered(parts.infer("m", x=ONE))).code is Code.INTERNAL
    assert (await answered(parts.infer("m", x=good))).code is Code.OK
    assert (await answered(parts.infer("m", x=ONE))).code is Code.INVALID_ARGUMENT


def raised(name: str, text: str = "no") -> Exception:
    """Returns an exception like those that onnxruntime raises."""
    return type(name, (Exception,), {"__module__": "onnxruntime.capi.onnxruntime_pybind11_state"})(text)


@pytest.mark.parametrize(
    ("error", "proven", "device", "expected"),
    [
        pytest.param(raised("Fail"), True, "cpu", Code.INVALID_ARGUMENT, id="the-input"),
        pytest.param(raised("RuntimeException"), True, "cpu", Code.INVALID_ARGUMENT, id="the-input-in-a-kernel"),
        pytest.param(raised("Fail"), False, "cpu", Code.INTERNAL, id="never-run"),
        pytest.param(raised("InvalidArgument"), False, "cpu", Code.INVALID_ARGUMENT, id="says-so-itself"),
        pytest.param(raised("EPFail"), True, "cpu", Code.INTERNAL, id="provider"),
        pytest.param(raised("Fail"), True, "cuda", Code.INTERNAL, id="device"),
        pytest.param(raised("Fail", "bad allocation"), True, "cpu", Code.RESOURCE_EXHAUSTED, id="memory"),
        pytest.param(MemoryError(), True, "cpu", Code.RESOURCE_EXHAUSTED, id="memory-of-our-own"),
        pytest.param(KeyError("x"), True, "cpu", Code.INTERNAL, id="our-own"),
        pytest.param(MeshError(Reason.DEADLINE, "late"), True, "cpu", Code.DEADLINE_EXCEEDED, id="ended"),
    ],
)
def test_whose_fault_a_failed_run_is(error, proven, device, expected):
    """The exception's class and the model's past decide who is to blame for a failed run. Lack of memory is recognised
    separately, because onnxruntime has no class for it."""
    assert session.run_error(error, proven=proven, device=device).reason.code is expected


@pytest.mark.parametrize("message", [b"\xff", b"\x0a\x05ab", b"\x3a\xff\xff\xff\xff\x0f" + b"x" * 20_000])
async def test_garbage_is_refused(parts, message):
    """Small and large messages that are not protobuf are refused."""
    await parts.load("m", models.constant(1))
    call = parts.send(message, (headers.MODEL_ID, b"m"))
    assert call.code is Code.INVALID_ARGUMENT
    assert "not a ModelInferRequest" in call.text


async def test_compressed_messages_are_read(parts):
    """Broken compressed messages are refused, and so are messages that exceed the limit once decompressed."""
    await parts.load("m", models.constant(4))

    def send(body: bytes) -> FakeCall:
        frame = b"\1" + len(body).to_bytes(4, "big") + body
        call = FakeCall(SERVICE + b"ModelInfer", [(headers.MODEL_ID, b"m")], frame, encoding=b"gzip")
        parts.port.handle(call)
        return call

    assert (await outputs(send(gzip.compress(request("m", x=ONE)))))[0].item() == 4
    assert send(b"no gzip").code is Code.INVALID_ARGUMENT
    bomb = await answered(send(gzip.compress(bytes(2 << 20))))  # the size is found in a thread
    assert bomb.code is Code.RESOURCE_EXHAUSTED


def many_texts() -> bytes:
    """Returns a request with 4,000,000 empty strings in typed contents."""
    fields = encoding.varint(4_000_000 * 2)
    inside = pb.ModelInferRequest.InferInputTensor(name="x", datatype="BYTES", shape=[4_000_000]).SerializeToString()
    inside += b"\x2a" + fields + b"\x42\x00" * 4_000_000
    return b"\x2a" + encoding.varint(len(inside)) + inside


def many_raw_texts() -> bytes:
    """Returns a request with 4,000,000 empty strings in raw contents."""
    one = pb.ModelInferRequest(inputs=[{"name": "x", "datatype": "BYTES", "shape": [4_000_000]}])
    return pb.ModelInferRequest(inputs=one.inputs, raw_input_contents=[bytes(16_000_000)]).SerializeToString()


def many_dimensions() -> bytes:
    """Returns a request with a shape of 3,000,000 dimensions."""
    return pb.ModelInferRequest(
        inputs=[{"name": "x", "datatype": "BYTES", "shape": [1] * 3_000_000}]
    ).SerializeToString()


@pytest.mark.parametrize(
    ("message", "says"),
    [
        pytest.param(many_texts, "4000000 strings", id="texts"),
        pytest.param(many_raw_texts, "4000000 strings", id="raw-texts"),
        pytest.param(many_dimensions, "dimensions", id="dimensions"),
        pytest.param(lambda: b"\x2a\x03\x0a\x01x" * 200_000, "more than 10000 fields", id="inputs"),
        pytest.param(lambda: b"\x2a\x00" * 4_000, "no input ''", id="inputs-of-a-small-message"),
        pytest.param(lambda: b"\x32\x03\x0a\x01y" * 3_000, "needs input", id="outputs"),
    ],
)
async def test_large_calls_are_counted_first_and_read_beside_the_loop(make, monkeypatch, message, says):
    """A large call is on the board before a thread reads it. Meanwhile, the event loop answers other calls."""
    parts = make(max_message=32 << 20)
    await parts.load("m", models.shout(), slot=0)
    await parts.load("fast", models.constant(3), slot=1)
    await parts.value("fast")
    threads, real = [], requests.read

    def noted(heavy: requests.Heavy) -> requests.Request:
        threads.append((threading.current_thread(), parts.board.read(0).in_flight))
        return real(heavy)

    monkeypatch.setattr(requests, "read", noted)
    call = parts.send(message(), (headers.MODEL_ID, b"m"))
    assert await parts.value("fast") == 3
    await answered(call)
    assert call.code is Code.INVALID_ARGUMENT
    assert says in call.text
    assert all(thread is not threading.main_thread() and in_flight == 1 for thread, in_flight in threads)
    use = parts.board.read(0)
    assert (use.calls, use.failed, use.in_flight, use.running) == (1, 1, 0, 0)


async def test_large_calls_are_answered_as_small_ones_are(make):
    """Typed calls of every size around the bounds get the same kind of answer, with their id and the requested
    outputs."""
    parts = make(max_message=32 << 20)
    await parts.load("m", models.identity(shape=(None,)))
    for count in (10, 4_090, 4_100, 300_000):
        x = np.arange(count, dtype=np.float32)
        message = pb.ModelInferRequest(model_name="m", id=str(count), outputs=[{"name": "y"}])
        message.inputs.add(name="x", datatype="FP32", shape=[count], contents={"fp32_contents": x})
        answer = await reply(parts.send(message.SerializeToString()))
        assert answer.id == str(count)
        np.testing.assert_array_equal(answer.outputs[0].contents.fp32_contents, x)


async def test_a_large_call_is_refused_where_too_many_bytes_wait(make, monkeypatch):
    parts = make(max_message=32 << 20)
    await parts.load("m", models.shout(), slot=0)
    monkeypatch.setattr(requests, "read", None)
    message = many_texts()
    asked = []
    monkeypatch.setattr(parts.runs, "refuse", lambda size: asked.append(size) or MeshError(Reason.OVERLOADED, "full"))
    assert parts.send(message, (headers.MODEL_ID, b"m")).code is Code.RESOURCE_EXHAUSTED
    assert asked == [len(message) + 5]


async def test_errors_are_short_whatever_they_repeat(parts):
    """Clients accept 8 KiB of trailers, and these contain the error's text twice."""
    await parts.load("m", models.constant(1))
    for name, datatype in (("n" * 1_000_000, "FP32"), ("é" * 400_000, "FP32"), ("x", "d" * 10_000)):
        message = pb.ModelInferRequest(model_name="m", raw_input_contents=[bytes(4)])
        message.inputs.add(name=name, datatype=datatype, shape=[1, 1])
        call = await answered(parts.send(message.SerializeToString()))
        assert call.code is Code.INVALID_ARGUMENT
        ((_, text, _, _, trailers),) = call.answers
        assert len(encode_text(text)) + sum(len(value) for _, value in trailers) < 8000
    call = parts.send(b"", method="n" * 100_000)
    assert len(call.text) < 300


async def test_unknown_methods_are_unimplemented(parts):
    call = parts.send(b"", method="RepositoryIndex")
    assert call.code is Code.UNIMPLEMENTED
    assert "RepositoryIndex" in call.text


class Streamed(FakeCall):
    """A request whose messages arrive one by one."""

    def __init__(self, *frames: bytes) -> None:
        super().__init__(frame=None)
        self.frames = list(frames)

    async def read(self) -> bytes | None:
        await asyncio.sleep(0)
        return self.frames.pop(0) if self.frames else None


async def test_a_request_that_comes_as_a_stream_is_read(parts):
    """A streamed request is accepted if it has exactly one message."""
    await parts.load("m", models.constant(6))
    frame = framing.pack(request("m", x=ONE))
    good, none, two = Streamed(frame), Streamed(), Streamed(frame, frame)
    for call in (good, none, two):
        parts.port.handle(call)
        await answered(call)
    assert (await outputs(good))[0].item() == 6
    assert none.code is two.code is Code.INVALID_ARGUMENT


async def test_a_call_whose_deadline_has_passed_is_not_run(parts):
    await parts.load("m", models.constant(1), slot=0)
    call = parts.infer("m", seconds=-1, x=ONE)
    assert call.code is Code.DEADLINE_EXCEEDED
    assert parts.board.read(0).busy_ns == 0


async def test_values_that_are_no_numbers_pass(parts):
    """NaN and infinities pass through a model unchanged."""
    await parts.load("m", models.identity(shape=(None, 1)))
    x = np.array([[np.nan], [np.inf], [-np.inf]], np.float32)
    (found,) = await outputs(parts.infer("m", x=x))
    assert math.isnan(found[0].item())
    assert found[1:].tolist() == [[np.inf], [-np.inf]]


# -- the fence


@pytest.mark.parametrize("method", ["ModelInfer", "ModelMetadata", "ModelReady"])
@pytest.mark.parametrize(
    ("mode", "left", "said", "answer"),
    [
        pytest.param(Mode.PROVEN, 10, None, None, id="proven"),
        pytest.param(Mode.PROVEN, 10, headers.ETCD_AWAY, None, id="proven, etcd away"),
        pytest.param(Mode.PROVEN, 0, headers.VERIFIED, headers.NOT_HERE, id="proof ended"),
        pytest.param(Mode.GRACE, 10, None, headers.VERIFY_FIRST, id="grace, nothing said"),
        pytest.param(Mode.GRACE, 10, headers.VERIFIED, None, id="grace, verified"),
        pytest.param(Mode.GRACE, 10, headers.ETCD_AWAY, None, id="grace, etcd away"),
        pytest.param(Mode.GRACE, 0, headers.VERIFIED, headers.NOT_HERE, id="grace ended"),
        pytest.param(Mode.VERIFIED, 10, headers.VERIFIED, None, id="verified"),
        pytest.param(Mode.VERIFIED, 10, headers.ETCD_AWAY, headers.VERIFY_FIRST, id="verified only, etcd away"),
        pytest.param(Mode.CLOSED, 0, headers.VERIFIED, headers.NOT_HERE, id="closed"),
    ],
)
async def test_the_fence_is_obeyed_by_every_method(parts, method, mode, left, said, answer):
    """A call that the fence forbids does not run the model, and does not count as a use."""
    await parts.load("a", models.constant(1), slot=0)
    now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    parts.board.permit(now + left * 10**9 if mode else 0, mode)
    if method == "ModelInfer":
        message = request("a", x=ONE)
    else:
        message = getattr(pb, f"{method}Request")(name="a").SerializeToString()
    more = () if said is None else ((said, b"1"),)
    call = parts.send(message, *more, method=method)
    await answered(call)
    if answer is None:
        assert call.code is Code.OK, call.text
    else:
        assert call.code is Code.UNAVAILABLE
        assert named(call) == {answer}
        assert parts.copies.get("a").row.in_flight == 0
    assert parts.board.read(0).calls == (1 if answer is None and method == "ModelInfer" else 0)


async def test_a_copy_that_is_not_here_is_so_whatever_the_fence_says(parts):
    await parts.load("a", models.constant(1))
    for mode in Mode:
        parts.board.permit(time.clock_gettime_ns(time.CLOCK_BOOTTIME) + 10**10 if mode else 0, mode)
        call = parts.send(request("b", x=ONE), (headers.VERIFIED, b"1"))
        await answered(call)
        assert named(call) == {headers.NOT_HERE}


# -- calls by an alias


AS = (headers.AS, headers.named_as("fraud é/x", "8"))


@pytest.mark.parametrize("count", [10, 4_090, 300_000], ids=["small", "medium", "heavy"])
@pytest.mark.parametrize("typed", [True, False], ids=["typed", "raw"])
async def test_a_call_by_an_alias_is_answered_under_its_name_and_version(make, count, typed):
    """A reply to a call by an alias has the alias's name and version, as the router gave them, whatever its size. A
    call by the model's id is answered under that id, without a version."""
    parts = make(max_message=32 << 20)
    await parts.load("m", models.identity(shape=(None,)))
    x = np.arange(count, dtype=np.float32)
    message = pb.ModelInferRequest(model_name="fraud é/x", model_version="8", id="7", outputs=[{"name": "y"}])
    message.inputs.add(name="x", datatype="FP32", shape=[count])
    if typed:
        message.inputs[0].contents.fp32_contents[:] = x
    else:
        message.raw_input_contents.append(x.tobytes())
    for more in ((AS,), (AS,), (), (AS,)):
        answer = await reply(parts.send(message.SerializeToString(), (headers.MODEL_ID, b"m"), *more))
        names = ("fraud é/x", "8") if more else ("m", "")
        assert (answer.model_name, answer.model_version, answer.id) == (*names, "7")
        if typed:
            np.testing.assert_array_equal(answer.outputs[0].contents.fp32_contents, x)
        else:
            assert answer.raw_output_contents[0] == x.tobytes()


async def test_more_aliases_than_are_remembered_are_answered(parts):
    """Calls by a hundred aliases of one model are each answered under the alias's name."""
    await parts.load("m", models.constant(1))
    for number in (*range(100), 0, 50):
        name = f"alias-{number}"
        more = (headers.MODEL_ID, b"m"), (headers.AS, headers.named_as(name, ""))
        answer = await reply(parts.send(request(name, x=ONE), *more))
        assert (answer.model_name, answer.model_version) == (name, "")


async def test_metadata_has_the_names_and_versions_that_the_router_knows(parts):
    """Metadata requested by an alias has the alias's name and versions. Metadata requested by the model's id has that
    id and the model's own version."""
    await parts.load("m", models.constant(1))
    message = pb.ModelMetadataRequest(name="fraud").SerializeToString()
    for more, name, listed in (
        ((AS, (headers.VERSIONS, headers.listed(["7", "8/b"]))), "fraud é/x", ["7", "8/b"]),
        (((headers.VERSIONS, headers.listed(["1"])),), "m", ["1"]),
        ((), "m", []),
    ):
        call = parts.send(message, (headers.MODEL_ID, b"m"), *more, method="ModelMetadata")
        metadata = pb.ModelMetadataResponse.FromString(call.answers[0][2][5:])
        assert (metadata.name, list(metadata.versions)) == (name, listed)
        assert [tensor.name for tensor in metadata.inputs] == ["x"]
