"""The shortcut past the parser, which gives the parser's result for every request that it accepts."""

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mesh.pb import inference_pb2 as pb
from mesh.runtime.server.v2.intake import Intake
from mesh.runtime.server.v2.reply import ReplyWriter
from mesh.runtime.server.v2.shortcuts import MAX_BYTES, Shortcuts
from mesh.runtime.server.v2.tensors import Tensor
from mesh.v2.datatypes import DATATYPES
from mesh.wire import framing
from tests.support.examples import examples

KINDS = {kind.name: kind for kind in DATATYPES}
ANSWER = ReplyWriter("m", [])


def a_request(request_id: str = "", raw: bytes = bytes(8), shape: Any = (2,), **more: Any) -> pb.ModelInferRequest:
    return pb.ModelInferRequest(
        model_name="m",
        id=request_id,
        inputs=[{"name": "x", "datatype": "FP32", "shape": shape}],
        raw_input_contents=[raw],
        **more,
    )


def frame_of(request: pb.ModelInferRequest) -> bytes:
    return framing.pack(request.SerializeToString())


def learnt(*requests: pb.ModelInferRequest, kind: str = "FP32") -> Shortcuts:
    shortcuts = Shortcuts()
    for request in requests:
        shortcuts.learn(frame_of(request), Tensor("x", KINDS[kind], None), tuple(request.inputs[0].shape), ANSWER)
    return shortcuts


def test_names_of_equal_length_are_recognised_beside_each_other():
    """A model may be called by its id and by an alias. Learning the requests of one name does not displace those of
    another."""
    requests = [a_request(), a_request(), a_request()]
    for request, name in zip(requests, ("m", "a", ""), strict=True):
        request.model_name = name
    shortcuts = learnt(*requests)
    for request in requests:
        assert shortcuts.find(frame_of(request)) is not None


def test_a_version_does_not_make_a_request_costlier():
    """A request that names a version is recognised like any other, because the router has already checked the
    version."""
    request = pb.ModelInferRequest.FromString(a_request().SerializeToString())
    request.model_version = "8"
    assert learnt(request).find(frame_of(request)) is not None
    assert learnt(request).find(frame_of(a_request())) is None


IDS = st.text(max_size=4)
RAWS = st.binary(min_size=8, max_size=8)


@given(IDS, RAWS, IDS, RAWS, st.booleans())
@settings(max_examples=examples(200), deadline=None)
@example("abc", bytes(8), "é!", bytes(8), True)
def test_what_is_taken_is_what_parsing_gives(first_id, first_raw, second_id, second_raw, outputs):
    """A request that differs from a known one only in its contents, and in an id of the same length, gives the same
    result as with protobuf, bit by bit."""
    more = {"outputs": [{"name": "y"}]} if outputs else {}
    shortcuts = learnt(a_request(first_id, first_raw, **more))
    request = a_request(second_id, second_raw, **more)
    found = shortcuts.find(frame_of(request))
    if len(first_id.encode()) == len(second_id.encode()) and second_id.isascii():
        assert found is not None
    if found is not None:
        feed, size, answer, raw, request_id = found
        expected, expected_size = Intake({"x": Tensor("x", KINDS["FP32"], None)}).decode(
            request.inputs, request.raw_input_contents
        )
        assert feed["x"].tobytes() == expected["x"].tobytes()
        assert (feed["x"].dtype, feed["x"].shape) == (np.float32, (2,))
        assert (size, raw, request_id.decode()) == (expected_size, True, second_id)
        assert answer is ANSWER


@given(st.binary(min_size=1, max_size=3), st.integers(0, 60))
@settings(max_examples=examples(200), deadline=None)
def test_any_other_difference_is_parsed(change, at):
    """A request that differs from a known one in any byte other than its contents and id is parsed."""
    request = a_request("id", bytes(8))
    shortcuts = learnt(request)
    frame = frame_of(request)
    head = frame.index(b"id")
    start = at % (len(frame) - 8)
    if start + len(change) > len(frame) - 8:
        return
    changed = frame[:start] + change + frame[start + len(change) :]
    same_but_id = changed[:head] == frame[:head] and changed[head + 2 : -8] == frame[head + 2 : -8]
    found = shortcuts.find(changed)
    assert (found is not None) == (same_but_id and changed[head : head + 2].isascii())


@pytest.mark.parametrize(
    ("request_", "kind"),
    [
        pytest.param(a_request(parameters={"p": {"bool_param": True}}), "FP32", id="parameters"),
        pytest.param(a_request(), "BYTES", id="texts"),
        pytest.param(a_request(), "BOOL", id="booleans"),
        pytest.param(a_request(raw=bytes(MAX_BYTES)), "FP32", id="large"),
    ],
)
def test_only_plain_requests_are_learnt(request_, kind):
    """A request that needs more than a comparison is parsed every time."""
    assert learnt(request_, kind=kind).find(frame_of(request_)) is None


def test_compressed_frames_are_not_learnt():
    """The bytes of a compressed frame are not the message."""
    shortcuts = Shortcuts()
    frame = b"\1" + frame_of(a_request())[1:]
    shortcuts.learn(frame, Tensor("x", KINDS["FP32"], None), (2,), ANSWER)
    assert shortcuts.find(frame) is None


def test_fields_out_of_order_are_not_learnt():
    """Protobuf accepts fields in any order, but the shortcut needs the contents last."""
    message = a_request(raw=bytes(8)).SerializeToString()
    moved = framing.pack(message[-10:] + message[:-10])
    shortcuts = Shortcuts()
    shortcuts.learn(moved, Tensor("x", KINDS["FP32"], None), (2,), ANSWER)
    assert shortcuts.find(moved) is None


def test_what_is_remembered_is_bounded():
    shortcuts = Shortcuts()
    tensor = Tensor("x", KINDS["FP32"], None)
    for count in range(300):
        request = a_request(raw=bytes(4 * count + 4), shape=(count + 1,))
        shortcuts.learn(frame_of(request), tensor, (count + 1,), ANSWER)
    assert len(shortcuts._known) <= 32
    known = a_request(raw=bytes(4), shape=(1,))
    assert shortcuts.find(frame_of(known)) is not None


def test_large_contents_are_recognised_up_to_the_memory_of_the_event_loop():
    """Contents are recognised, and copied completely, even if their frame is almost as large as MAX_BYTES allows."""
    size = MAX_BYTES - 64
    contents = np.random.default_rng(0).integers(0, 256, size, np.uint8).tobytes()
    request = a_request("7", contents, (size // 4,))
    shortcuts = learnt(a_request("7", bytes(size), (size // 4,)))
    found = shortcuts.find(frame_of(request))
    assert found is not None
    assert found[0]["x"].tobytes() == contents
