"""Bodies that arrive in pieces. They give the same parts as whole bodies, and are copied once into a message."""

import itertools
import json
import tracemalloc

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mesh.pb import inference_pb2 as pb
from mesh.wire import framing
from mesh.wire.localcall import LocalAnswer
from router.inference.models import Models
from router.rest import documents
from router.rest.asked import ModelPath
from router.rest.conversions import Conversions
from router.rest.inference import Inference
from router.rest.pieces import Body

SIZE = 1 << 20


def pieces_of(data, places):
    """Returns the data, cut at those places."""
    places = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[start:stop] for start, stop in itertools.pairwise(places)]


@given(st.binary(max_size=60), st.lists(st.integers(0, 100), max_size=5), st.integers(0, 70), st.integers(0, 70))
def test_a_cut_is_that_of_the_whole(data, places, start, stop):
    """Any part of a body has the same bytes, whatever the pieces in which the body arrived."""
    body = Body(pieces_of(data, places))
    assert body.size == len(data)
    stop = min(max(start, stop), len(data))
    assert b"".join(body.cut(start, stop)) == data[start:stop]
    assert body.beginning(stop) == data[:stop]
    assert body.joined() == data


def request(size, *, text=False):
    """Returns a body with one or two binary inputs, and the length of its JSON."""
    inputs = [
        {"name": "x", "shape": [size], "datatype": "UINT8", "parameters": {"binary_data_size": size}},
        {"name": "s", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": 6}},
    ][: 1 + text]
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    return head + bytes(range(256)) * (size // 256) + (b"\2\0\0\0ab" if text else b""), len(head)


@given(st.lists(st.integers(0, 1000), max_size=5), st.booleans())
def test_a_body_in_pieces_becomes_the_message_of_the_whole(places, text):
    """Each body is converted twice, because the second conversion finds the JSON part known."""
    data, length = request(512, text=text)
    expected, _ = documents.decode_request("m", "", data, length)
    models = Models(lambda call: None, max_message=SIZE)
    inference = Inference(models, Conversions(max_message=SIZE), max_message=SIZE)

    for _ in range(2):
        frame, form = inference.quick(ModelPath("m", "", "infer"), Body(pieces_of(data, places)), length)
        assert pb.ModelInferRequest.FromString(framing.unpack(frame, limit=SIZE)) == expected
        assert form.is_binary("anything")


def test_binary_tensors_are_copied_once_into_the_message_and_never_out_of_a_reply():
    """A binary request of 1 MiB needs little more memory than its frame, whether its JSON is known or not. The body of
    a reply needs less than an eighth of the reply's size."""
    data, length = request(SIZE)
    pieces = pieces_of(data, [1000, SIZE // 3])
    inference = Inference(
        Models(lambda call: None, max_message=2 * SIZE), Conversions(max_message=2 * SIZE), max_message=2 * SIZE
    )
    target = ModelPath("m", "", "infer")
    inference.quick(ModelPath("other", "", "infer"), Body(pieces), length)  # allocates what is allocated once
    for _ in range(2):
        tracemalloc.start()
        quick = inference.quick(target, Body(pieces), length)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert quick is not None
        assert SIZE <= peak < SIZE + SIZE // 8
        del quick

    response = pb.ModelInferResponse(model_name="m")
    for name in ("y", "z"):
        response.outputs.add(name=name, datatype="UINT8", shape=[SIZE // 2])
        response.raw_output_contents.append(np.arange(SIZE // 2, dtype=np.uint8).tobytes())
    frame = framing.pack(response.SerializeToString())
    tracemalloc.start()
    (head, *blobs), json_length = inference.quick_answer("m", LocalAnswer(0, frame=frame), documents.Form(binary=True))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(head) == json_length
    assert [bytes(blob) for blob in blobs] == list(response.raw_output_contents)
    assert peak < SIZE // 8
