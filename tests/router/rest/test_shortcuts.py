"""Shortcuts in the conversion of requests and replies. Each gives the same result as the full conversion, *the long
way*, or none."""

import json

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mesh.pb import inference_pb2 as pb
from mesh.statuses import MeshError
from mesh.wire import framing
from router.rest import documents, jsontext, shortcuts, tensors

NAMES = st.sampled_from(["x", "y", "\xe4", "n" * 300, ""])
NUMBERS = st.sampled_from([0, 1, -1, 1.0, 1.5, 255, 256, 1 << 31, 1 << 63, 1 << 64, 1e39, -0.0])
ODD = st.sampled_from([None, "1", [], [1], {}])


@st.composite
def inputs(draw):
    """Draws an input that is valid in most cases."""
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 0, 1.0, "1", -1]), max_size=3))
    elements = int(np.prod([size if type(size) is int and size > 0 else 1 for size in shape]))
    count = draw(st.sampled_from([elements] * 5 + [elements + 1]))
    data = draw(st.lists(NUMBERS | (ODD if draw(st.integers(0, 9)) == 0 else NUMBERS), min_size=count, max_size=count))
    if draw(st.booleans()) and len(shape) > 1 and all(type(size) is int and size > 0 for size in shape):
        if len(data) == elements:
            data = np.array(data, object).reshape(shape).tolist()
        elif draw(st.booleans()):
            data = [data[:1], data[1:]]  # as many in all, in rows of different lengths
    item = {
        "name": draw(NAMES),
        "shape": shape,
        "datatype": draw(st.sampled_from(["FP32", "FP64", "INT8", "INT64", "UINT64", "BOOL", "BYTES", "FP16", "X"])),
        "data": data,
    }
    if draw(st.integers(0, 9)) == 0:
        item["parameters"] = {"a": 1}
    if draw(st.integers(0, 9)) == 0:
        del item[draw(st.sampled_from(sorted(item)))]
    return item


MEMBERS = st.fixed_dictionaries(
    {"inputs": st.lists(inputs(), min_size=0, max_size=3)},
    optional={"id": st.sampled_from(["", "7", "\xe4", 7, None, "\ud800"]), "outputs": st.just([{"name": "y"}])},
)


def long_way(body):
    """Returns the message that the long way makes from a body, or None if it refuses the body."""
    try:
        return documents.decode_request("m", "2", body, None)[0]
    except MeshError:
        return None


@given(st.lists(MEMBERS, min_size=1, max_size=3))
def test_a_request_becomes_the_message_of_the_long_way_or_none(requests):
    """Whatever requests came before, the short way makes the same message as the long way. It makes none if the long
    way refuses the body."""
    known = shortcuts.Requests()
    for members in requests:
        body = json.dumps(members).encode()
        loaded = jsontext.load(body)
        for _ in range(2):  # as a new one, and as one that is known
            frame = None if loaded.careful else known.encode("m", "2", loaded.members)
            if frame is not None:
                assert pb.ModelInferRequest.FromString(framing.unpack(frame, limit=1 << 20)) == long_way(body)


@pytest.mark.parametrize(
    "item",
    [
        {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2.5, 3]},
        {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [[1, 2.5, 3]]},
        {"name": "x", "shape": [3, 1], "datatype": "INT8", "data": [[1], [2], [3]]},
        {"name": "x", "shape": [], "datatype": "UINT64", "data": [18446744073709551615]},
        {"name": "x", "shape": [0], "datatype": "FP64", "data": []},
    ],
)
def test_plain_requests_take_the_short_way(item):
    """Inputs of numbers without parameters take the short way, flat or nested, with or without an id."""
    known = shortcuts.Requests()
    for members in ({"inputs": [item]}, {"id": "7", "inputs": [item, item | {"name": "y"}]}):
        frame = known.encode("m", "", members)
        assert frame is not None
        found = pb.ModelInferRequest.FromString(framing.unpack(frame, limit=1 << 20))
        assert found == documents.decode_request("m", "", json.dumps(members).encode(), None)[0]


def test_memory_of_inputs_is_bounded():
    """Names and shapes come from clients, so the memory for them must not grow without limit."""
    known = shortcuts.Requests()
    for number in range(3 * shortcuts._MAX_KNOWN):
        item = {"name": f"x{number}", "shape": [1], "datatype": "FP32", "data": [1]}
        assert known.encode("m", "", {"inputs": [item]}) is not None
        assert len(known._known) <= shortcuts._MAX_KNOWN


def reply(arrays, *, request_id="", version="1", typed=False, parameters=False):
    """Returns the frame of a reply that has these arrays as outputs."""
    response = pb.ModelInferResponse(model_name="m", model_version=version, id=request_id)
    for index, array in enumerate(arrays):
        datatype = next(name for name, dtype in tensors.DTYPES.items() if dtype == array.dtype)
        output = response.outputs.add(name=f"y{index}", datatype=datatype, shape=array.shape)
        if parameters:
            output.parameters["a"].int64_param = 1
        if typed:
            output.contents.fp32_contents.extend(array.astype(np.float32).ravel().tolist())
        else:
            response.raw_output_contents.append(array.tobytes())
    return framing.pack(response.SerializeToString())


def long_reply(frame):
    """Returns the body that the long way makes from a frame, or None if it refuses the frame, and the parsed reply."""
    response = pb.ModelInferResponse.FromString(framing.unpack(frame, limit=1 << 20))
    try:
        return b"".join(documents.encode_parts(response, documents.ALL_JSON)[0]), response
    except MeshError:
        return None, response


def written(known, frame):
    """Returns the body that the shortcut makes from a frame, checks it against the long way, and learns the frame."""
    text, (expected, response) = known.write("m", frame), long_reply(frame)
    assert text is None or text == expected
    if expected is not None:
        known.learn("m", frame, response)
    return text


ARRAYS = st.lists(
    st.sampled_from(sorted(tensors.DTYPES)).flatmap(
        lambda datatype: st.lists(
            st.sampled_from([0, 1, 2, 100])
            | (st.sampled_from([0.1, np.nan, np.inf]) if "FP" in datatype else st.just(1)),
            max_size=20,
        ).map(lambda values: np.array(values).astype(tensors.DTYPES[datatype]))
    ),
    max_size=3,
)


@given(st.lists(st.tuples(ARRAYS, st.sampled_from(["", "7", "8", "\xe4", '"', "12"])), min_size=1, max_size=6))
def test_a_reply_becomes_the_body_of_the_long_way_or_none(replies):
    """Whatever replies came before, the short way writes the same body as the long way. It writes none if the long way
    refuses the frame."""
    known = shortcuts.Replies()
    for arrays, request_id in replies:
        for _ in range(2):
            written(known, reply(arrays, request_id=request_id))


@pytest.mark.parametrize("request_id", ["", "7"])
@pytest.mark.parametrize("size", [1, 40])
def test_plain_replies_take_the_short_way_from_the_second_on(request_id, size):
    """From the second one on, replies of a known form are written without being parsed, unless they contain NaN."""
    known = shortcuts.Replies()
    arrays = [np.full(size, 0.5, "<f4"), np.arange(size, dtype="<i8"), np.ones(size, bool)]
    assert written(known, reply(arrays, request_id=request_id)) is None
    arrays[0] *= 3
    assert written(known, reply(arrays, request_id=request_id and "8")) is not None
    arrays[0][0] = np.nan
    assert written(known, reply(arrays, request_id=request_id)) is None


@given(st.binary(max_size=60), st.integers(0, 100))
def test_a_broken_reply_of_a_known_length_is_not_taken_for_a_good_one(noise, at):
    """If a frame takes the short way although noise has replaced some of its bytes, its body is the one of the long
    way."""
    known = shortcuts.Replies()
    frame = reply([np.array([1, 2], "<i4"), np.array([3], "<i8")], request_id="77")
    written(known, frame)
    at %= len(frame)
    other = (frame[:at] + noise + frame[at + len(noise) :])[: len(frame)]
    assume(other[:5] == frame[:5])
    text = known.write("m", other)
    if text is not None:
        assert text == long_reply(other)[0]


@pytest.mark.parametrize("odd", [{"typed": True}, {"parameters": True}])
def test_replies_that_are_not_plain_are_never_learnt(odd):
    """Replies with typed contents, or with parameters of outputs, take the long way each time."""
    known = shortcuts.Replies()
    for _ in range(3):
        assert written(known, reply([np.ones(1, "<f4")], **odd)) is None


def test_a_model_whose_replies_are_never_alike_is_given_up():
    """After a number of attempts, the replies of a model whose replies always differ are no longer learnt. Those of
    other models still are."""
    known = shortcuts.Replies()
    for size in range(2 * shortcuts._MAX_TRIES):
        written(known, reply([np.ones(size, "<f4")]))
    assert len(known._known) == shortcuts._MAX_TRIES
    frame = reply([np.ones(1, "<f4")])
    known.learn("other", frame, long_reply(frame)[1])
    assert known.write("other", frame) is not None
