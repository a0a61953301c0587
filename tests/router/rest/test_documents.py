import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.pb import inference_pb2 as pb
from mesh.statuses import MeshError, Reason
from mesh.wire import framing
from router.rest import documents, jsontext
from router.rest.pieces import Body

FP32 = np.array([1, 2, 3], "<f4").tobytes()


def request(*inputs, blobs=b"", header=True, **more):
    """Returns a body and the length of its JSON part, or None as the length if `header` is false."""
    head = json.dumps({"inputs": list(inputs), **more}).encode()
    return head + blobs, len(head) if header else None


def tensor(name="x", datatype="FP32", shape=(3,), **more):
    return {"name": name, "datatype": datatype, "shape": list(shape), **more}


def decode(*args, **kwargs):
    return documents.decode_request("m", "2", *request(*args, **kwargs))


def test_a_request_becomes_a_message_with_raw_contents_throughout():
    message, form = decode(
        tensor("a", data=[1, 2, 3]),
        tensor("b", parameters={"binary_data_size": 12, "content_type": "np"}),
        tensor("c", "BYTES", (1, 1), data=[["ä"]]),
        blobs=FP32,
        id="42",
        parameters={"s": "text", "b": True, "i": -5, "u": 1 << 63, "f": 0.5, "binary_data_output": True},
        outputs=[{"name": "p", "parameters": {"binary_data": False, "classification": 3}}, {"name": "q"}],
    )
    assert (message.model_name, message.model_version, message.id) == ("m", "2", "42")
    assert [(t.name, t.datatype, list(t.shape)) for t in message.inputs] == [
        ("a", "FP32", [3]),
        ("b", "FP32", [3]),
        ("c", "BYTES", [1, 1]),
    ]
    assert list(message.raw_input_contents) == [FP32, FP32, b"\2\0\0\0\xc3\xa4"]
    assert message.inputs[1].parameters.keys() == {"content_type"}
    shown = {name: getattr(p, p.WhichOneof("parameter_choice")) for name, p in message.parameters.items()}
    assert shown == {"s": "text", "b": True, "i": -5, "u": 1 << 63, "f": 0.5}
    assert message.parameters["b"].WhichOneof("parameter_choice") == "bool_param"
    assert [output.name for output in message.outputs] == ["p", "q"]
    assert message.outputs[0].parameters["classification"].int64_param == 3
    assert (form.is_binary("p"), form.is_binary("q"), form.is_binary("unnamed")) == (False, True, True)


def test_integers_written_as_floats_are_read_exactly_and_floats_as_floats():
    body = (
        b'{"inputs": [{"name": "f", "datatype": "FP64", "shape": [2], "data": [0.1, 9007199254740993.0]},'
        b' {"name": "i", "datatype": "INT64", "shape": [2], "data": [9007199254740993, 9007199254740994.0]},'
        b' {"name": "j", "datatype": "UINT64", "shape": [1], "data": [18446744073709549568.0]}]}'
    )
    message, _ = documents.decode_request("m", "", body, None)
    assert [
        np.frombuffer(raw, kind).tolist()
        for raw, kind in zip(message.raw_input_contents, ("f8", "i8", "u8"), strict=True)
    ] == [
        [0.1, 9007199254740992.0],
        [9007199254740993, 9007199254740994],
        [18446744073709549568],
    ]


@pytest.mark.parametrize("content_type", ["base64", "b64"])
def test_bytes_said_to_be_base64_are_decoded(content_type):
    """Bytes marked as base64 are decoded and the mark is removed, as in ModelMesh's REST proxy."""
    message, _ = decode(
        tensor("a", "BYTES", (2,), data=["AP8=", "YQ=="], parameters={"content_type": content_type, "x": 1}),
        tensor("b", "BYTES", (1,), data=["YQ=="], parameters={"content_type": "str"}),
        header=False,
    )
    assert list(message.raw_input_contents) == [b"\2\0\0\0\0\xff\1\0\0\0a", b"\4\0\0\0YQ=="]
    assert [sorted(item.parameters) for item in message.inputs] == [["x"], ["content_type"]]


@pytest.mark.parametrize("where", ["inputs", "outputs"])
@pytest.mark.parametrize("name", ["shared_memory_region", "shared_memory_byte_size", "shared_memory_offset"])
def test_shared_memory_is_refused_by_its_name(where, name):
    region = {"parameters": {name: "r"}}
    body = {"inputs": [tensor(data=[1, 2, 3])]} | {
        where: [tensor(**region) if where == "inputs" else {"name": "y", **region}]
    }
    with pytest.raises(MeshError) as caught:
        documents.decode_request("m", "", json.dumps(body).encode(), None)
    assert caught.value.reason is Reason.UNSUPPORTED
    assert name in caught.value.text


def framed(message, raws):
    """Returns the message that a model server reads from a frame of these parts."""
    return pb.ModelInferRequest.FromString(
        framing.unpack(documents.framed(message.SerializeToString(), raws), limit=1 << 30)
    )


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16_383, 16_384, 3_000_000])
def test_raw_contents_are_framed_as_protobuf_would(size):
    raw = bytes(range(256)) * (size // 256) + bytes(size % 256)
    body, length = request(
        tensor("a", "UINT8", (size,), parameters={"binary_data_size": size}), tensor("b", data=[1, 2, 3]), blobs=raw
    )
    message, raws, _ = documents.decode_parts("m", "2", Body([body]), length)
    assert framed(message, raws) == documents.decode_request("m", "2", body, length)[0]


def test_blobs_are_taken_in_the_order_of_the_inputs():
    message, _ = decode(
        tensor("a", "INT8", (1,), parameters={"binary_data_size": 1}),
        tensor("b", "INT8", (0,), parameters={"binary_data_size": 0}),
        tensor("c", "INT8", (2,), parameters={"binary_data_size": 2}),
        blobs=b"\1\2\3",
    )
    assert list(message.raw_input_contents) == [b"\1", b"", b"\2\3"]


BINARY = {"binary_data_size": 12}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (request(tensor()), "neither data nor"),
        (request(tensor(parameters=BINARY), blobs=FP32, header=False), "not UTF-8"),
        (request(tensor(parameters=BINARY), blobs=b"0" * 12, header=False), "not JSON"),
        (request(tensor(parameters=BINARY), header=False), "Inference-Header-Content-Length is missing"),
        (request(tensor(parameters=BINARY), blobs=FP32[:-1]), "is 12, but only 11 bytes"),
        (request(tensor(parameters=BINARY), blobs=FP32 + b"x"), "1 bytes of binary data are left over"),
        (request(tensor(data=[1, 2, 3]), blobs=b"x"), "left over"),
        (request(tensor(parameters=BINARY, data=[1, 2, 3]), blobs=FP32), "both data and"),
        (request(tensor(shape=(4,), parameters=BINARY), blobs=FP32), "12 bytes, but FP32 of the shape [4]"),
        (request(tensor(parameters={"binary_data_size": -1}), blobs=FP32), "a whole number, 0 or more"),
        (request(tensor(parameters={"binary_data_size": True}), blobs=FP32), "a whole number, 0 or more"),
        (request(tensor(parameters={"binary_data_size": 1 << 70}), blobs=FP32), "only 12 bytes"),
        (request(tensor(parameters=[]), blobs=FP32), "parameters must be an object"),
        (request(tensor(parameters={"x": [1]}, data=[1, 2, 3])), "parameter 'x'"),
        (request(tensor(parameters={"x": 1 << 64}, data=[1, 2, 3])), "parameter 'x'"),
        (request(tensor(parameters={"x": -(1 << 63) - 1}, data=[1, 2, 3])), "parameter 'x'"),
        (request(tensor("", data=[1, 2, 3])), "the name of an input must be a non-empty string"),
        (request(tensor(7, data=[1, 2, 3])), "the name of an input must be a non-empty string"),
        (request(tensor("\ud800", data=[1, 2, 3])), "its name is not valid Unicode"),
        (request(tensor(data=[1, 2, 3]), tensor(data=[1, 2, 3])), "occurs twice"),
        (request(tensor(datatype="FLOAT", data=[1, 2, 3])), "datatype 'FLOAT' is not one of BOOL"),
        (request(tensor(datatype=None, data=[1, 2, 3])), "no valid datatype"),
        (request(tensor(datatype=[], data=[1, 2, 3])), "no valid datatype"),
        (request({"name": "x", "datatype": "FP32", "data": [1]}), "shape must be a list"),
        (request(3), "inputs must be a list of objects"),
        (request(tensor(data=[1, 2, 3]), outputs={}), "outputs must be a list"),
        (request(tensor(data=[1, 2, 3]), outputs=[{"name": "p", "parameters": {"binary_data": 1}}]), "binary_data"),
        (request(tensor(data=[1, 2, 3]), parameters={"binary_data_output": "yes"}), "binary_data_output"),
        (request(tensor(data=[1, 2, 3]), id=5), "id must be a string"),
        (request(tensor(data=[1, 2, 3]), id="\udc00"), "not valid Unicode"),
        ((b"{}", None), "inputs must be a list"),
        ((b"", None), "not JSON"),
        ((b"[]", None), "not a JSON object"),
        ((b"\xff{}", None), "not UTF-8"),
        ((b'{"inputs": [NaN]}', None), "NaN is not valid JSON"),
        ((b'{"inputs": [-Infinity]}', None), "-Infinity is not valid JSON"),
        ((b"[" * 100_000, None), "nested too deeply"),
        ((b'{"inputs": ' + b"1" * 5000 + b"}", None), "thousands of digits"),
        ((b"{}", 3), "the body has only 2 bytes"),
    ],
)
def test_wrong_requests_are_refused_with_what_is_wrong(body, says):
    with pytest.raises(MeshError) as caught:
        documents.decode_request("m", "", *body)
    assert caught.value.reason is Reason.BAD_REQUEST
    assert says in caught.value.text


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["FP32", "BYTES", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["name", "shape", "datatype", "data", "parameters", "binary_data_size", "inputs", "outputs"]
            ),
            inner,
            max_size=6,
        )
    ),
    max_leaves=20,
)


@given(
    st.fixed_dictionaries({"inputs": st.lists(anything, max_size=2)}, optional={"outputs": anything, "id": anything})
)
def test_no_document_does_anything_but_pass_or_be_refused(document):
    body = json.dumps(document).encode()
    refused = []
    for length in (None, len(body)):
        try:
            message, _ = documents.decode_request("m", "", body, length)
        except MeshError as error:
            refused.append(error.reason)
        else:
            assert pb.ModelInferRequest.FromString(message.SerializeToString()) == message
    assert set(refused) <= {Reason.BAD_REQUEST}


@given(st.binary(max_size=200), st.none() | st.integers(0, 250))
def test_random_bytes_are_refused(body, length):
    with pytest.raises(MeshError):
        documents.decode_request("m", "", body, length)


def response(raw=True):
    answer = pb.ModelInferResponse(model_name="m", model_version="1", id="7")
    answer.parameters["p"].string_param = "v"
    answer.outputs.add(name="a", datatype="FP32", shape=[3])
    answer.outputs.add(name="b", datatype="BYTES", shape=[1])
    if raw:
        answer.raw_output_contents.extend([FP32, b"\1\0\0\0s"])
    else:
        answer.outputs[0].contents.fp32_contents.extend([1, 2, 3])
        answer.outputs[1].contents.bytes_contents.append(b"s")
    return answer


@pytest.mark.parametrize("raw", [True, False])
def test_a_response_is_json_where_nothing_is_binary(raw):
    body, length = documents.encode_response(response(raw), documents.Form())
    assert length is None
    assert json.loads(body) == {
        "model_name": "m",
        "model_version": "1",
        "id": "7",
        "parameters": {"p": "v"},
        "outputs": [
            {"name": "a", "datatype": "FP32", "shape": [3], "data": [1.0, 2.0, 3.0]},
            {"name": "b", "datatype": "BYTES", "shape": [1], "data": ["s"]},
        ],
    }


@pytest.mark.parametrize("raw", [True, False])
def test_binary_outputs_follow_the_json_in_order(raw):
    body, length = documents.encode_response(response(raw), documents.Form(binary=True))
    assert [o["parameters"] for o in json.loads(body[:length])["outputs"]] == [
        {"binary_data_size": 12},
        {"binary_data_size": 5},
    ]
    assert body[length:] == FP32 + b"\1\0\0\0s"


@pytest.mark.parametrize("raw", [True, False])
def test_binary_and_json_outputs_mix(raw):
    body, length = documents.encode_response(response(raw), documents.Form(outputs={"b": True}))
    first, second = json.loads(body[:length])["outputs"]
    assert first["data"] == [1.0, 2.0, 3.0]
    assert "data" not in second
    assert body[length:] == b"\1\0\0\0s"


def test_an_answer_with_too_few_raw_contents_is_the_model_servers_fault():
    answer = response()
    del answer.raw_output_contents[1]
    with pytest.raises(MeshError) as caught:
        documents.encode_response(answer, documents.Form())
    assert caught.value.reason is Reason.INTERNAL


def metadata(*inputs):
    return pb.ModelMetadataResponse(
        name="m",
        inputs=[pb.ModelMetadataResponse.TensorMetadata(name=n, datatype=d, shape=s) for n, d, s in inputs],
    )


@pytest.mark.parametrize(
    ("datatype", "declared", "body", "shape", "raw"),
    [
        ("FP32", [-1], FP32, [3], FP32),
        ("FP32", [-1, 3], FP32, [1, 3], FP32),
        ("FP32", [3], FP32, [3], FP32),
        ("FP16", [2, -1], b"\0" * 8, [2, 2], b"\0" * 8),
        ("FP32", [-1, 3], b"", [0, 3], b""),
        ("BYTES", [-1, 1], b"text", [1, 1], b"\4\0\0\0text"),
        ("BYTES", [], b"", [], b"\0\0\0\0"),
    ],
)
def test_a_body_without_json_takes_its_shape_from_the_metadata(datatype, declared, body, shape, raw):
    message, raws, form = documents.raw_request("m", "1", Body([body]), metadata(("x", datatype, declared)))
    message = framed(message, raws)
    assert (message.inputs[0].name, message.inputs[0].datatype) == ("x", datatype)
    assert list(message.inputs[0].shape) == shape
    assert list(message.raw_input_contents) == [raw]
    assert form.is_binary("anything")


@pytest.mark.parametrize(
    ("inputs", "body"),
    [
        ([], b""),
        ([("x", "FP32", [1]), ("y", "FP32", [1])], FP32),
        ([("x", "FP32", [-1, -1])], FP32),
        ([("x", "FP32", [-1, 2])], FP32),
        ([("x", "FP32", [4])], FP32),
        ([("x", "FP32", [0, -1])], FP32),
        ([("x", "BYTES", [2])], b"x"),
        ([("x", "ODD", [2])], b"x"),
    ],
)
def test_a_body_without_json_that_fits_no_shape_is_refused(inputs, body):
    with pytest.raises(MeshError) as caught:
        documents.raw_request("m", "", Body([body]), metadata(*inputs))
    assert caught.value.reason is Reason.BAD_REQUEST


def test_a_number_of_thousands_of_digits_is_refused_in_words_for_the_caller():
    with pytest.raises(MeshError, match="a whole number with thousands of digits") as caught:
        jsontext.load_object(b'{"a": ' + b"1" * 5000 + b"}")
    assert caught.value.reason is Reason.BAD_REQUEST
    assert "sys." not in caught.value.text
