"""V2 tensors: every datatype, raw and typed, in both directions, and clear refusals of what does not fit."""

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mesh.pb import inference_pb2 as pb
from mesh.runtime.server.v2 import intake, requests
from mesh.runtime.server.v2.intake import Intake
from mesh.runtime.server.v2.reply import ReplyWriter
from mesh.runtime.server.v2.tensors import Tensor
from mesh.statuses import MeshError, Reason
from mesh.v2.datatypes import DATATYPES, Datatype
from mesh.wire import encoding
from tests.support.examples import examples

KINDS = {kind.name: kind for kind in DATATYPES}
TYPED = [kind for kind in DATATYPES if kind.field]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


def tensor(kind: Datatype | str, shape: Any = None, name: str = "x", **more: Any) -> Tensor:
    return Tensor(name, KINDS[kind] if isinstance(kind, str) else kind, shape, **more)


def raw_of(array: np.ndarray) -> bytes:
    """Returns raw contents as a client encodes them."""
    if array.dtype.hasobject:
        return b"".join(struct.pack("<I", len(text.encode())) + text.encode() for text in array.ravel())
    return array.tobytes()


def contents_of(kind: Datatype, array: np.ndarray) -> pb.InferTensorContents:
    """Returns typed contents as a client encodes them."""
    values = [text.encode() for text in array.ravel()] if array.dtype.hasobject else array.ravel().tolist()
    return pb.InferTensorContents(**{kind.field: values})


def sent(kind: Datatype, array: np.ndarray, name: str = "x", **more: Any) -> pb.ModelInferRequest.InferInputTensor:
    return pb.ModelInferRequest.InferInputTensor(name=name, datatype=kind.name, shape=array.shape, **more)


def decoded(kind: Datatype, shape: Any, request: pb.ModelInferRequest) -> np.ndarray:
    feed, _ = Intake({"x": tensor(kind, shape)}).decode(request.inputs, request.raw_input_contents)
    return feed["x"]


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Returns whether type, shape and every bit are equal, with NaN equal to NaN."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return one.tolist() == other.tolist() if one.dtype.hasobject else one.tobytes() == other.tobytes()


@st.composite
def arrays(draw: st.DrawFn, kinds: list[Datatype]) -> tuple[Datatype, np.ndarray]:
    kind = draw(st.sampled_from(kinds))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    if kind.dtype.hasobject:
        array = np.empty(shape, object)
        for index in np.ndindex(shape):
            array[index] = draw(TEXT)
        return kind, array
    return kind, draw(hnp.arrays(kind.dtype, shape))


@given(arrays(list(DATATYPES)))
@settings(max_examples=examples(100), deadline=None)
def test_raw_contents_arrive_as_they_were_sent(sample):
    """Raw contents of every datatype and shape arrive unchanged, bit by bit. Two requests are made, because the second
    one takes the shortcut."""
    kind, array = sample
    request = pb.ModelInferRequest(inputs=[sent(kind, array)], raw_input_contents=[raw_of(array)])
    taking = Intake({"x": tensor(kind)})
    for _ in range(2):
        feed, size = taking.decode(request.inputs, request.raw_input_contents)
        assert same(feed["x"], array)
        assert size == len(raw_of(array))


@given(arrays(TYPED))
@settings(max_examples=examples(100), deadline=None)
def test_typed_contents_arrive_as_they_were_sent(sample):
    kind, array = sample
    request = pb.ModelInferRequest(inputs=[sent(kind, array, contents=contents_of(kind, array))])
    request = pb.ModelInferRequest.FromString(request.SerializeToString())
    found = decoded(kind, None, request)
    if array.dtype.kind == "f":  # a signalling NaN may become a quiet one on the way through protobuf's own code
        np.testing.assert_array_equal(found, array)
    else:
        assert same(found, array)


@given(arrays(list(DATATYPES)), st.booleans(), st.text(max_size=200))
@settings(max_examples=examples(100), deadline=None)
def test_replies_say_what_the_model_answered(sample, raw, request_id):
    """Replies are encoded by hand. Protobuf reads the model, id, name, datatype, shape and contents from them."""
    kind, array = sample
    answer = ReplyWriter("modèl", [tensor(kind, name="y")])
    for _ in range(2):
        frame = answer.encode([array], request_id.encode(), raw=raw)
        assert frame[:5] == struct.pack(">BI", 0, len(frame) - 5)
        assert b"".join(answer.pieces([array], request_id.encode(), raw=raw)) == frame
        reply = pb.ModelInferResponse.FromString(frame[5:])
        assert (reply.model_name, reply.id) == ("modèl", request_id)
        (output,) = reply.outputs
        assert (output.name, output.datatype, tuple(output.shape)) == ("y", kind.name, array.shape)
        if raw or not kind.field:
            assert list(reply.raw_output_contents) == [raw_of(array)]
            assert not output.HasField("contents")
        else:
            assert not reply.raw_output_contents
            if array.dtype.kind == "f":
                np.testing.assert_array_equal(getattr(output.contents, kind.field), array.ravel())
            else:
                assert output.contents == contents_of(kind, array)


@given(arrays(list(DATATYPES)), arrays(list(DATATYPES)))
@settings(max_examples=examples(50), deadline=None)
def test_several_outputs_keep_their_order(one, other):
    """If one of the outputs can only be raw, all of them are."""
    pairs = [one, other]
    answer = ReplyWriter("m", [tensor(kind, name=f"y{index}") for index, (kind, _) in enumerate(pairs)])
    reply = pb.ModelInferResponse.FromString(answer.encode([array for _, array in pairs], b"", raw=False)[5:])
    assert [output.name for output in reply.outputs] == ["y0", "y1"]
    if all(kind.field for kind, _ in pairs):
        assert not reply.raw_output_contents
    else:
        assert list(reply.raw_output_contents) == [raw_of(array) for _, array in pairs]


@given(
    st.lists(st.binary(max_size=40), max_size=4),
    st.text(max_size=10),
    st.lists(st.sampled_from(["a", "b"]), max_size=2),
)
def test_a_split_message_is_the_same_message(raws, model, inputs):
    """Cutting the raw contents out of a message keeps their order and changes nothing else."""
    request = pb.ModelInferRequest(model_name=model, id="7", raw_input_contents=raws)
    for name in inputs:
        request.inputs.add(name=name, shape=[1, 2])
    request.parameters["p"].bool_param = True
    rest, found = requests.split(memoryview(request.SerializeToString()))
    assert [bytes(raw) for raw in found] == raws
    del request.raw_input_contents[:]
    assert pb.ModelInferRequest.FromString(rest) == request


@given(st.binary(max_size=60))
def test_splitting_garbage_raises_value_errors_alone(data):
    try:
        rest, raws = requests.split(memoryview(data))
    except ValueError:
        return
    assert len(rest) + sum(map(len, raws)) <= len(data)


def test_arrays_that_do_not_lie_well_in_memory_are_copied():
    """Raw contents that are not aligned in their message are copied, because kernels may rely on alignment."""
    array = np.arange(5, dtype=np.float64)
    for shift in range(8):
        message = memoryview(b"." * shift + array.tobytes())[shift:]
        found = intake.from_raw(tensor("FP64"), message, 5, (5,))
        assert found.flags.aligned
        assert same(found, array)


def test_any_byte_but_zero_is_true():
    """As in C, any byte but zero is read as true. In memory it becomes 1."""
    request = pb.ModelInferRequest(
        inputs=[pb.ModelInferRequest.InferInputTensor(name="x", datatype="BOOL", shape=[4])],
        raw_input_contents=[b"\0\1\2\xff"],
    )
    assert decoded(KINDS["BOOL"], None, request).tobytes() == b"\0\1\1\1"


def test_a_large_output_is_written_whole():
    """A large output is written completely, contiguous or not, with and without an id."""
    array = np.arange(100_000, dtype=np.float32).reshape(100, 1000)
    answer = ReplyWriter("m", [tensor("FP32", name="y")])
    for request_id in (b"", b"id"):
        for sample in (array, array.T):
            frame = answer.encode([sample], request_id, raw=True)
            reply = pb.ModelInferResponse.FromString(frame[5:])
            assert reply.raw_output_contents[0] == sample.tobytes()
            assert b"".join(answer.pieces([sample], request_id, raw=True)) == frame


def test_the_pieces_of_a_large_reply_are_the_models_own_memory():
    """The pieces of a reply refer to the memory of a large contiguous output instead of copying it."""
    array = np.arange(100_000, dtype=np.float32)
    pieces = ReplyWriter("m", [tensor("FP32", name="y")]).pieces([array], b"id", raw=True)
    assert np.shares_memory(np.frombuffer(pieces[-1], np.float32), array)


# -- refusals

FP32 = KINDS["FP32"]
ROW = np.zeros((1, 4), np.float32)
SHAPE = (None, 4)


def refused(inputs: list[Any], raws: list[bytes], tensors_: dict[str, Tensor] | None = None) -> str:
    """Returns the text of the error with which a request is refused."""
    request = pb.ModelInferRequest(inputs=inputs, raw_input_contents=raws)
    with pytest.raises(MeshError) as error:
        Intake(tensors_ or {"x": tensor("FP32", SHAPE)}).decode(request.inputs, request.raw_input_contents)
    assert error.value.reason is Reason.BAD_REQUEST
    return error.value.text


def an_input(name: str = "x", datatype: str = "FP32", shape: Any = (1, 4), **more: Any) -> Any:
    return pb.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=shape, **more)


RAW = ROW.tobytes()
VALUES = pb.InferTensorContents(fp32_contents=[0] * 4)


@pytest.mark.parametrize(
    ("inputs", "raws", "says"),
    [
        pytest.param([an_input("z")], [RAW], "no input 'z'; it has 'x'", id="name"),
        pytest.param([], [], "also needs input 'x'", id="missing"),
        pytest.param([an_input(datatype="INT32")], [RAW], "is INT32, but the model takes FP32", id="type"),
        pytest.param([an_input(datatype="FLOAT")], [RAW], "is FLOAT, but the model takes FP32", id="no-type"),
        pytest.param([an_input(datatype="")], [RAW], "of no datatype", id="empty-type"),
        pytest.param([an_input(shape=(1, 3))], [RAW], r"shape [1, 3], but the model takes [-1, 4]", id="shape"),
        pytest.param([an_input(shape=(4,))], [RAW], "shape [4], but the model takes", id="rank"),
        pytest.param([an_input(shape=())], [RAW], "shape [], but the model takes", id="no-shape"),
        pytest.param([an_input(shape=(-1, 4))], [RAW], "negative", id="negative"),
        pytest.param([an_input(shape=(1 << 40, 4))], [RAW], "the limit is", id="enormous"),
        pytest.param([an_input(shape=(2, 4))], [RAW], "has 16 bytes of raw contents, but shape [2, 4]", id="too-few"),
        pytest.param([an_input()], [RAW + b"\0"], "17 bytes", id="too-many"),
        pytest.param([an_input()], [b""], "0 bytes", id="empty"),
        pytest.param([an_input()], [RAW, RAW], "1 inputs have 2 raw contents", id="two-raws"),
        pytest.param([an_input(), an_input()], [RAW], "'x' is given twice", id="surplus"),
        pytest.param([an_input(), an_input()], [RAW, RAW], "'x' is given twice", id="twice"),
        pytest.param([an_input(contents=VALUES)], [RAW], "has both typed and raw contents", id="both"),
        pytest.param([an_input()], [], "no contents, but shape [1, 4] of FP32 takes 4 fp32_contents", id="no-contents"),
        pytest.param(
            [an_input(contents=pb.InferTensorContents(fp32_contents=[0] * 3))], [], "3 fp32_contents", id="typed-few"
        ),
        pytest.param(
            [an_input(contents=pb.InferTensorContents(fp64_contents=[0] * 4))], [], "4 fp64_contents", id="wrong-field"
        ),
        pytest.param(
            [an_input(contents=pb.InferTensorContents(fp32_contents=[0] * 4, int_contents=[1]))],
            [],
            "1 int_contents, 4 fp32_contents",
            id="two-fields",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_a_text(inputs, raws, says):
    assert says in refused(inputs, raws)


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_floats_have_no_typed_contents(datatype):
    """V2 has only raw contents for half floats."""
    text = refused([an_input(datatype=datatype, contents=VALUES)], [], {"x": tensor(datatype, SHAPE)})
    assert f"{datatype} has no typed contents: send raw_input_contents" in text


@pytest.mark.parametrize(
    ("datatype", "values"), [("INT8", [1, 128]), ("INT16", [-40000]), ("UINT8", [256]), ("UINT16", [65536])]
)
def test_integers_out_of_range_are_refused(datatype, values):
    """The typed field is wider than the datatype, so such integers can be sent."""
    kind = KINDS[datatype]
    contents = pb.InferTensorContents(**{kind.field: values})
    text = refused([an_input(datatype=datatype, shape=[len(values)], contents=contents)], [], {"x": tensor(kind)})
    assert f"outside {datatype}" in text


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        pytest.param(b"\1\0\0\0a\5\0\0\0b", "element 1 of its raw contents is truncated", id="text-cut"),
        pytest.param(b"\1\0\0\0a\5\0", "element 1 of its raw contents is truncated", id="length-cut"),
        pytest.param(b"\1\0\0\0a", "has 1 elements", id="too-few"),
        pytest.param(b"\1\0\0\0a" * 3, "more elements in its raw contents than the 2", id="too-many"),
        pytest.param(b"\1\0\0\0a\1\0\0\0\xff", "element 1 is not UTF-8", id="no-text"),
        pytest.param(b"\1\0\0\0a\xff\xff\xff\xff", "truncated", id="enormous"),
    ],
)
def test_bad_texts_are_refused(raw, says):
    assert says in refused([an_input(datatype="BYTES", shape=[2])], [raw], {"x": tensor("BYTES", (None,))})


def test_typed_texts_must_be_utf8_too():
    contents = pb.InferTensorContents(bytes_contents=[b"a", b"\xff"])
    kinds = {"x": tensor("BYTES", (None,))}
    assert "not UTF-8" in refused([an_input(datatype="BYTES", shape=[2], contents=contents)], [], kinds)


def test_a_refusal_is_not_remembered_as_good():
    """The shortcut knows only requests that passed every check, so each repetition is refused again."""
    taking = Intake({"x": tensor("FP32", SHAPE)})
    for inputs, raws in (([an_input(shape=(1, 3))], [RAW]), ([an_input()], [b""])):
        request = pb.ModelInferRequest(inputs=inputs, raw_input_contents=raws)
        for _ in range(3):
            with pytest.raises(MeshError):
                taking.decode(request.inputs, request.raw_input_contents)


def test_optional_inputs_may_be_left_out():
    """A required input must still be given."""
    kinds = {"x": tensor("FP32", SHAPE), "o": tensor("FP32", (None, 4), name="o", optional=True)}
    request = pb.ModelInferRequest(inputs=[an_input()], raw_input_contents=[RAW])
    feed, _ = Intake(kinds).decode(request.inputs, request.raw_input_contents)
    assert list(feed) == ["x"]
    assert "needs input 'x'" in refused([an_input("o")], [RAW], kinds)


def outputs_of(*names: str, **parameters: str) -> Any:
    request = pb.ModelInferRequest()
    for name in names:
        output = request.outputs.add(name=name)
        for key, value in parameters.items():
            output.parameters[key].string_param = value
    return request.outputs


def test_requested_outputs_come_in_the_order_of_the_request():
    """Outputs that are not requested are left out."""
    kinds = {name: tensor("FP32", name=name) for name in "abc"}
    assert [found.name for found in intake.requested(outputs_of("c", "a"), kinds, {})] == ["c", "a"]


@pytest.mark.parametrize(
    ("outputs", "says"),
    [
        pytest.param(outputs_of("z"), "no output 'z'; it has 'a', 'b'", id="unknown"),
        pytest.param(outputs_of("a", "a"), "'a' is requested twice", id="twice"),
        pytest.param(outputs_of("maps"), "'maps' is seq(map), which V2 cannot carry", id="not-a-tensor"),
    ],
)
def test_outputs_that_cannot_be_answered_are_refused(outputs, says):
    kinds = {name: tensor("FP32", name=name) for name in "ab"}
    with pytest.raises(MeshError) as error:
        intake.requested(outputs, kinds, {"maps": "seq(map)"})
    assert error.value.reason is Reason.BAD_REQUEST
    assert says in error.value.text


EXTENSIONS = ["shared_memory_region", "shared_memory_byte_size", "shared_memory_offset", "classification"]


@pytest.mark.parametrize("name", EXTENSIONS)
def test_an_output_of_an_extension_is_refused_by_its_name(name):
    """A request for an output that needs an extension is refused with UNIMPLEMENTED and the extension's name, as over
    REST."""
    with pytest.raises(MeshError, match=f"output 'a': {name}: the .* not supported") as error:
        intake.requested(outputs_of("a", **{name: "3"}), {"a": tensor("FP32", name="a")}, {})
    assert error.value.reason is Reason.UNSUPPORTED


@pytest.mark.parametrize("name", EXTENSIONS)
@pytest.mark.parametrize("given", ["raw", "typed", "apart", "nothing", "beside"])
def test_an_input_of_an_extension_is_refused_by_its_name(name, given):
    """An input that needs an extension is refused with the extension's name, with or without contents, even if the same
    input passed before without the extension's parameter."""
    plain, special = an_input(), an_input()
    special.parameters[name].string_param = "region"
    taking = Intake({"x": tensor("FP32", SHAPE)})
    taking.decode([plain], [RAW])
    raws, typed = {"raw": ([RAW], None), "apart": ([], [VALUES.SerializeToString()])}.get(given, ([], None))
    inputs = [special]
    if given == "typed":
        special.contents.CopyFrom(VALUES)
    elif given == "beside":
        taking = Intake({"x": tensor("FP32", SHAPE), "z": tensor("FP32", SHAPE, name="z")})
        inputs, raws = [an_input("z"), special], [RAW]
    with pytest.raises(MeshError, match=f"input 'x': {name}: the .* not supported") as error:
        taking.decode(inputs, raws, typed)
    assert error.value.reason is Reason.UNSUPPORTED


def test_a_model_that_answers_another_type_than_it_says_is_internal():
    """If a model returns another type than it declares, the caller gets INTERNAL rather than a reply that contradicts
    itself."""
    answer = ReplyWriter("m", [tensor("FP32", name="y")])
    for raw in (True, False):
        with pytest.raises(MeshError, match="as int32, but its file") as error:
            answer.encode([np.zeros(3, np.int32)], b"", raw=raw)
        assert error.value.reason is Reason.INTERNAL


@given(st.integers(0, 2**64 - 1))
def test_varints_are_those_of_protobuf(value):
    expected = pb.InferTensorContents(uint64_contents=[value]).SerializeToString()[2:]
    assert encoding.varint(value) == expected
