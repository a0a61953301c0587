"""The codec of Mesh's handler for TorchServe, compared with the Protobuf library."""

import contextlib
import importlib.util
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.modelservers import environments
from mesh.pb import inference_pb2 as pb

_found = importlib.util.spec_from_file_location("mesh_v2", environments.handlers() / "mesh_v2.py")
assert _found is not None
assert _found.loader is not None
mesh_v2: Any = importlib.util.module_from_spec(_found)
_found.loader.exec_module(mesh_v2)

RANGES = {
    **{f"INT{bits}": st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in (8, 16, 32, 64)},
    **{f"UINT{bits}": st.integers(0, 2**bits - 1) for bits in (8, 16, 32, 64)},
    "FP32": st.floats(width=32),
    "FP64": st.floats(),
    "BOOL": st.booleans(),
    "BYTES": st.binary(max_size=8),
}
FIELDS = {
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "INT64": "int64_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BOOL": "bool_contents",
    "BYTES": "bytes_contents",
}
tensors = st.sampled_from(sorted(RANGES)).flatmap(
    lambda kind: st.tuples(st.just(kind), st.text(max_size=5), st.lists(RANGES[kind], max_size=6))
)


def packed(kind: str, numbers: list[Any]) -> bytes:
    """Returns raw contents, as another program writes them."""
    if kind == "BYTES":
        return b"".join(struct.pack("<I", len(one)) + one for one in numbers)
    return b"".join(struct.pack("<" + mesh_v2.CODES[kind], one) for one in numbers)


@given(st.lists(tensors, max_size=4), st.booleans(), st.text(max_size=9), st.lists(st.text(max_size=3), max_size=2))
def test_any_request_is_read_as_protobuf_reads_it(given_: list[Any], typed: bool, name: str, wanted: list[str]) -> None:
    """A request's tensors have the same raw form after reading, whether its contents were raw or typed."""
    request = pb.ModelInferRequest(model_name=name, id="7")
    request.outputs.extend(pb.ModelInferRequest.InferRequestedOutputTensor(name=one) for one in wanted)
    for kind, title, numbers in given_:
        tensor = request.inputs.add(name=title, datatype=kind, shape=[1, len(numbers)])
        if typed:
            getattr(tensor.contents, FIELDS[kind]).extend(numbers)
        else:
            request.raw_input_contents.append(packed(kind, numbers))
    read = mesh_v2.read_request(request.SerializeToString())
    expected = [(title, kind, [1, len(numbers)], packed(kind, numbers)) for kind, title, numbers in given_]
    assert read == (name, "7", expected, wanted, typed or not given_)
    for (_, kind, _, raw), (_, _, numbers) in zip(read[2], given_, strict=True):
        assert mesh_v2.pack(kind, mesh_v2.values(kind, raw)) == packed(kind, numbers)


@given(st.lists(tensors, max_size=4), st.booleans(), st.text(max_size=9))
def test_any_answer_is_one_that_protobuf_reads(given_: list[Any], typed: bool, name: str) -> None:
    """Answers have typed contents if the request had them."""
    made = [(title, kind, [len(numbers)], packed(kind, numbers)) for kind, title, numbers in given_]
    answer = pb.ModelInferResponse.FromString(mesh_v2.response(name, "7", made, typed))
    assert (answer.model_name, answer.id) == (name, "7")
    for place, (kind, title, numbers) in enumerate(given_):
        tensor = answer.outputs[place]
        assert (tensor.name, tensor.datatype, list(tensor.shape)) == (title, kind, [len(numbers)])
        if typed:
            assert packed(kind, list(getattr(tensor.contents, FIELDS[kind]))) == packed(kind, numbers)
        else:
            assert answer.raw_output_contents[place] == packed(kind, numbers)


@given(st.binary(max_size=60))
def test_no_bytes_do_anything_but_read_or_refuse(message: bytes) -> None:
    """Any bytes are read, or refused with BadRequest."""
    with contextlib.suppress(mesh_v2.BadRequest):
        mesh_v2.read_request(message)


@pytest.mark.parametrize("field", [1, 3, 5, 6, 7])
def test_a_number_where_bytes_belong_is_refused(field: int) -> None:
    """A number in place of a field's bytes is refused, however large the number is."""
    for number in (0, 1 << 62):
        with pytest.raises(mesh_v2.BadRequest, match="is a number"):
            mesh_v2.read_request(mesh_v2._encoded(field << 3) + mesh_v2._encoded(number))


@pytest.mark.parametrize(("datatype", "field"), [("", 0), ("FP32", 6), ("FP64", 7), ("BYTES", 8)])
def test_a_number_in_place_of_typed_contents_is_refused(datatype: str, field: int) -> None:
    """A request is refused if it has a number where a tensor's typed contents belong, or where floats or texts in them
    belong."""
    number = mesh_v2._encoded(field << 3) + mesh_v2._encoded(1 << 62)
    contents = mesh_v2._field(5, number) if field else mesh_v2._encoded(5 << 3) + mesh_v2._encoded(1 << 62)
    tensor = mesh_v2._field(2, (datatype or "FP32").encode()) + contents
    with pytest.raises(mesh_v2.BadRequest, match="is a number"):
        mesh_v2.read_request(mesh_v2._field(5, tensor))


@pytest.mark.parametrize(
    ("kind", "shape", "raw", "says"),
    [
        ("FP32", [3], bytes(8), "has 3 elements, but 2 were sent"),
        ("FP32", [2], bytes(7), "7 bytes are not a whole number"),
        ("FP32", [-1], bytes(4), "negative size"),
        ("FP32", [1 << 40, 1 << 40], b"", "too large"),
        ("COMPLEX", [1], bytes(8), "is not a datatype of V2"),
        ("BYTES", [1], b"\x05\0\0\0abc", "longer than the rest of them"),
    ],
)
def test_contents_that_do_not_fit_their_shape_are_refused(kind: str, shape: list[int], raw: bytes, says: str) -> None:
    request = pb.ModelInferRequest(raw_input_contents=[raw])
    request.inputs.add(name="x", datatype=kind, shape=shape)
    with pytest.raises(mesh_v2.BadRequest, match=says):
        mesh_v2.read_request(request.SerializeToString())


def test_half_precision_has_no_typed_contents() -> None:
    """The error says that such a tensor needs raw contents."""
    request = pb.ModelInferRequest()
    request.inputs.add(name="x", datatype="FP16", shape=[1]).contents.fp32_contents.append(1.0)
    with pytest.raises(mesh_v2.BadRequest, match="send raw_input_contents"):
        mesh_v2.read_request(request.SerializeToString())


def test_readiness_is_what_protobuf_reads() -> None:
    assert pb.ModelReadyResponse.FromString(mesh_v2.READY).ready


def test_metadata_is_what_protobuf_reads() -> None:
    """The answer has the name from the request, where the relay has put the model's id."""
    request = pb.ModelMetadataRequest(name="a/ä", version="3").SerializeToString()
    answer = pb.ModelMetadataResponse.FromString(mesh_v2.metadata(mesh_v2.read_name(request), "pytorch"))
    assert (answer.name, answer.platform) == ("a/ä", "pytorch")
