"""Large requests: read with the same results as small ones, aligned in memory, and refused before they cost
anything."""

import gzip
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.pb import inference_pb2 as pb
from mesh.runtime.server.v2 import alignment, contents, requests
from mesh.runtime.server.v2.intake import Intake
from mesh.runtime.server.v2.tensors import MAX_TEXTS, Tensor
from mesh.statuses import MeshError, Reason
from mesh.v2.datatypes import DATATYPES
from mesh.wire import encoding, framing
from tests.support.examples import examples

from .test_tensors import TYPED, arrays, contents_of, raw_of, same, sent, tensor

LIMIT = 64 << 20
UNKNOWN = (b"\x50\x01", b"\x52\x03abc", b"\x55abcd", b"\x51abcdefgh", b"\x53\x08\x01\x5b\x5c\x54", b"\x53\x54")
"""A field that V2 does not have, of each wire type; the last two are groups, one with another inside."""


def heavy(message: bytes) -> requests.Heavy:
    return requests.Heavy(framing.pack(message), b"", LIMIT)


def fed(taking: Intake, request: requests.Request, **more):
    """Returns the tensors that a model is given, by name."""
    message, raws, typed = request
    return taking.decode(message.inputs, raws, typed, **more)[0]


def small(message: bytes) -> requests.Request:
    found = requests.light(framing.pack(message), b"", limit=LIMIT)
    assert not isinstance(found, requests.Heavy)
    return found


def input_field(message: pb.ModelInferRequest.InferInputTensor, *, after: bytes = b"", inside: bytes = b"") -> bytes:
    """Returns an input encoded as a field of a request, with extra bytes in it and in its contents."""
    encoded_contents = message.contents.SerializeToString() + inside if message.HasField("contents") else None
    bare = pb.ModelInferRequest.InferInputTensor()
    bare.CopyFrom(message)
    bare.ClearField("contents")
    encoded = bare.SerializeToString() + after
    if encoded_contents is not None:
        encoded += b"\x2a" + encoding.varint(len(encoded_contents)) + encoded_contents
    return b"\x2a" + encoding.varint(len(encoded)) + encoded


@given(arrays(TYPED), st.sampled_from(("", *UNKNOWN)), st.sampled_from(("", *UNKNOWN)), st.sampled_from(("", *UNKNOWN)))
@settings(max_examples=examples(200), deadline=None)
def test_typed_contents_are_the_same_read_small_or_large(sample, top, after, inside):
    """Datatypes and shapes of all kinds are tried, also with unknown fields and groups in between."""
    kind, array = sample
    top, after, inside = (more or b"" for more in (top, after, inside))
    field = input_field(sent(kind, array, contents=contents_of(kind, array)), after=after, inside=inside)
    message = b"\x0a\x01m" + top + field + b"\x1a\x01i"
    taking = Intake({"x": tensor(kind)})
    for request in (small(message), requests.read(heavy(message))):
        assert (request[0].model_name, request[0].id) == ("m", "i")
        found = fed(taking, request)["x"]
        if array.dtype.kind == "f":  # a signalling NaN may become a quiet one on the way through protobuf's own code
            np.testing.assert_array_equal(found, array)
        else:
            assert same(found, array)


@given(arrays(list(DATATYPES)), st.sampled_from(("", *UNKNOWN)), st.sampled_from(("", *UNKNOWN)))
@settings(max_examples=examples(200), deadline=None)
def test_raw_contents_are_the_same_read_small_or_large(sample, top, after):
    """Datatypes and shapes of all kinds are tried, also with unknown fields and groups in between."""
    kind, array = sample
    top, after = (more or b"" for more in (top, after))
    raw = raw_of(array)
    message = input_field(sent(kind, array), after=after) + top + b"\x3a" + encoding.varint(len(raw)) + raw
    taking = Intake({"x": tensor(kind)})
    for request in (small(message), requests.read(heavy(message))):
        assert same(fed(taking, request)["x"], array)


@pytest.mark.parametrize("kind", TYPED, ids=lambda kind: kind.name)
@pytest.mark.parametrize("packed", [True, False])
def test_many_elements_are_read_in_pieces(kind, packed, monkeypatch):
    """Many elements are read in pieces, packed or one by one as protobuf allows, even if a piece ends within a
    number."""
    monkeypatch.setattr(contents, "_PIECE", 64)
    rng = np.random.default_rng(5)
    if kind.dtype.hasobject:
        array = np.array([str(number) * (number % 30) for number in range(500)], object)
    elif kind.dtype.kind == "f":
        array = rng.normal(size=500).astype(kind.dtype)
    elif kind.dtype.kind == "b":
        array = rng.random(500) > 0.5
    else:
        bounds = np.iinfo(kind.dtype)
        array = rng.integers(bounds.min, bounds.max, 500, kind.dtype, endpoint=True)
    encoded = contents_of(kind, array).SerializeToString()
    if not packed and not kind.dtype.hasobject:
        encoded = b"".join(_unpacked(kind, value) for value in array.tolist())
    assert same(contents.read(tensor(kind), memoryview(encoded), 500, (500,)), array)
    for wrong in (499, 501):
        with pytest.raises(MeshError, match=f"takes {wrong}"):
            contents.read(tensor(kind), memoryview(encoded), wrong, (wrong,))


def _unpacked(kind, value) -> bytes:
    number = pb.InferTensorContents.DESCRIPTOR.fields_by_name[kind.field].number
    if kind.field in ("fp32_contents", "fp64_contents"):
        wire, form = (5, "<f") if kind.field == "fp32_contents" else (1, "<d")
        return bytes((number << 3 | wire,)) + struct.pack(form, value)
    return bytes((number << 3,)) + encoding.varint(int(value) & (1 << 64) - 1)


@pytest.mark.parametrize(
    ("kind", "encoded", "says"),
    [
        pytest.param("FP32", pb.InferTensorContents(fp64_contents=[1]), "some fp64_contents", id="another-field"),
        pytest.param("FP32", pb.InferTensorContents(bytes_contents=[b""]), "some bytes_contents", id="an-empty-text"),
        pytest.param("INT8", pb.InferTensorContents(int_contents=[1, 300]), "outside INT8: 1 to 300", id="too-large"),
        pytest.param("FP32", b"", "no contents", id="none"),
        pytest.param("FP32", b"\x32\x05abcde", "cannot be read", id="half-a-number"),
        pytest.param("INT64", b"\x1a\x0c" + b"\xff" * 11 + b"\0", "cannot be read", id="a-number-too-long"),
        pytest.param("BYTES", pb.InferTensorContents(bytes_contents=[b"a", b"\xff"]), "element 1 is not UTF-8", id="u"),
    ],
)
def test_large_contents_that_do_not_fit_are_refused(kind, encoded, says):
    data = encoded if isinstance(encoded, bytes) else encoded.SerializeToString()
    with pytest.raises(MeshError, match=says) as error:
        contents.read(tensor(kind), memoryview(data), 2, (2,))
    assert error.value.reason is Reason.BAD_REQUEST


@pytest.mark.parametrize("kind", DATATYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("length", range(0, 70, 7))
def test_whatever_is_fed_begins_at_a_boundary(kind, length):
    """Every tensor begins at an aligned address: from small and large requests, raw and typed, in the loop's memory and
    in newly allocated memory."""
    if kind.dtype.hasobject:
        return
    array = np.ones((3, 5), kind.dtype)
    ways = [pb.ModelInferRequest(id="i" * length, inputs=[sent(kind, array)], raw_input_contents=[raw_of(array)])]
    if kind.field:
        inputs = [sent(kind, array, contents=contents_of(kind, array))]
        ways.append(pb.ModelInferRequest(id="i" * length, inputs=inputs))
    for request in ways:
        message = request.SerializeToString()
        for found in (small(message), requests.read(heavy(message))):
            for put in (alignment.put, alignment.Scratch(1 << 10).put, alignment.Scratch(8).put):
                feed = fed(Intake({"x": tensor(kind)}), found, put=put)
                assert feed["x"].ctypes.data % alignment.BOUNDARY == 0
                assert alignment.own(feed)["x"].ctypes.data % alignment.BOUNDARY == 0
                assert same(feed["x"], array)


def test_inputs_of_one_request_share_the_memory_of_the_loop_and_do_not_overlap():
    """`own` copies the inputs into arrays that the next request does not change."""
    scratch = alignment.Scratch(1 << 10)
    first = {name: scratch.put(bytes([value]) * 12, (3,), np.dtype(np.float32)) for value, name in enumerate("abc")}
    kept = alignment.own(first)
    assert [array.tobytes() for array in first.values()] == [bytes([value]) * 12 for value in range(3)]
    scratch.begin()
    scratch.put(b"\xff" * 200, (200,), np.dtype(np.uint8))
    assert [array.tobytes() for array in kept.values()] == [bytes([value]) * 12 for value in range(3)]
    assert first["a"].tobytes() == b"\xff" * 12


# -- what is refused before it costs anything


@pytest.mark.parametrize(
    ("size", "kinds"),
    [
        pytest.param(100, (tuple, tuple), id="small"),
        pytest.param(20_000, (tuple, tuple), id="medium"),
        pytest.param(200_000, (tuple, requests.Heavy), id="large"),
    ],
)
def test_what_is_read_in_the_loop_is_what_costs_little(size, kinds):
    """The loop reads only what is cheap: it cuts out raw contents of any size, and parses typed ones up to a bound.
    Both ways give the same tensors."""
    array = np.arange(size // 4, dtype=np.float32)
    kind = tensor("FP32").kind
    inputs = [sent(kind, array, contents=contents_of(kind, array))]
    raw = pb.ModelInferRequest(inputs=[sent(kind, array)], raw_input_contents=[raw_of(array)])
    for message, expected in zip((raw, pb.ModelInferRequest(inputs=inputs)), kinds, strict=True):
        found = requests.light(framing.pack(message.SerializeToString()), b"", limit=LIMIT)
        assert isinstance(found, expected)
        read = requests.read(found) if isinstance(found, requests.Heavy) else found
        assert same(fed(Intake({"x": tensor("FP32")}), read)["x"], array)


class Counting:
    """A count of the encoded fields that are read."""

    def __init__(self, monkeypatch):
        self.count = 0
        real = encoding.fields

        def counted(*args, **kwargs):
            for field in real(*args, **kwargs):
                self.count += 1
                yield field

        monkeypatch.setattr(encoding, "fields", counted)


@pytest.mark.parametrize(
    ("field", "says"),
    [
        pytest.param(b"\x2a\x00", "more than", id="inputs"),
        pytest.param(b"\x32\x00", "more than", id="outputs"),
        pytest.param(b"\x22\x00", "more than", id="parameters"),
        pytest.param(b"\x3a\x00", "more than", id="raw-contents"),
        pytest.param(b"\x50\x01", "more than", id="unknown"),
        pytest.param(b"\x53\x54", "more than", id="groups"),
    ],
)
def test_messages_of_nothing_but_small_fields_are_refused(monkeypatch, field, says):
    """Messages with countless small fields are refused in the loop, which counts fields first and stops at the
    bound."""
    counting = Counting(monkeypatch)
    with pytest.raises(MeshError, match=says) as error:
        requests.light(framing.pack(field * 200_000), b"", limit=LIMIT)
    assert error.value.reason is Reason.BAD_REQUEST
    assert counting.count <= encoding.MAX_FIELDS
    packed = gzip.compress(field * 200_000)
    unfolding = requests.Heavy(b"\1" + len(packed).to_bytes(4, "big") + packed, b"gzip", LIMIT)
    with pytest.raises(MeshError, match=says):  # in a thread, too
        requests.read(unfolding)


def test_fields_within_inputs_count_too(monkeypatch):
    """A few inputs with very many dimensions, parameters or names are refused."""
    counting = Counting(monkeypatch)
    for inside in (b"\x18\x01", b"\x22\x00", b"\x0a\x00", b"\x53\x54"):
        field = b"\x2a" + encoding.varint(len(inside) * 100_000) + inside * 100_000
        with pytest.raises(MeshError, match="fields"):
            requests.read(heavy(field * 2))
    assert counting.count <= 4 * (encoding.MAX_FIELDS + 2)


@pytest.mark.parametrize("dimensions", [33, 3_000_000])
def test_shapes_of_too_many_dimensions_are_refused(dimensions):
    """A shape with too many dimensions is refused in small and large requests. The error gives the number of dimensions
    instead of the shape."""
    message = pb.ModelInferRequest(inputs=[{"name": "x", "datatype": "FP32", "shape": [1] * dimensions}])
    found = requests.light(framing.pack(message.SerializeToString()), b"", limit=LIMIT)

    def feed() -> None:
        fed(Intake({"x": tensor("FP32")}), requests.read(found) if isinstance(found, requests.Heavy) else found)

    with pytest.raises(MeshError, match="dimensions") as error:
        feed()
    assert len(error.value.text) < 200


@pytest.mark.parametrize("typed", [True, False])
def test_more_texts_than_a_request_may_have_are_refused_by_their_number(typed):
    """A request with too many strings is refused before the first one is read. The bytes in this test could not be read
    as strings."""
    kind = tensor("BYTES")
    broken = memoryview(b"\xff" * 100)
    message = pb.ModelInferRequest(inputs=[{"name": "x", "datatype": "BYTES", "shape": [MAX_TEXTS + 1]}])
    one = [broken]
    with pytest.raises(MeshError, match=f"may have {MAX_TEXTS}"):
        Intake({"x": kind}).decode(message.inputs, [] if typed else one, one if typed else None)


def test_texts_are_counted_over_all_inputs(monkeypatch):
    """Two inputs that are each one text below the bound exceed it together."""
    monkeypatch.setattr("mesh.runtime.server.v2.intake.MAX_TEXTS", 8)
    names = ("x", "y")
    message = pb.ModelInferRequest(inputs=[{"name": name, "datatype": "BYTES", "shape": [7]} for name in names])
    taking = Intake({name: tensor("BYTES", name=name) for name in names})
    with pytest.raises(MeshError, match="more than 8 strings"):
        taking.decode(message.inputs, [b"\1\0\0\0a" * 7] * 2)


def test_a_compressed_request_says_in_its_metadata_which_model_it_is_for():
    """The server does not decompress megabytes to find the model's name."""
    assert requests.name(heavy(b"\x0a\x01a" + b"\x1a\xff\xff\x01" + bytes(32767) + b"\x0a\x01m")) == b"m"
    with pytest.raises(MeshError, match="mm-model-id"):
        requests.name(requests.Heavy(b"\1\0\0\0\0", b"gzip", LIMIT))


@given(st.binary(max_size=80))
@settings(max_examples=examples(300), deadline=None)
def test_garbage_is_refused_large_as_small(data):
    """Any bytes are either refused as the caller's mistake, or read with the same result as by protobuf. What protobuf
    reads is refused only if the requests have a limit of their own for it."""
    try:
        expected = pb.ModelInferRequest.FromString(data)
    except Exception:
        expected = None
    try:
        message, raws, typed = requests.read(heavy(data))
    except MeshError as error:
        assert error.reason is Reason.BAD_REQUEST
        assert expected is None, error.text
        return
    if expected is None:
        return  # within contents, which are read later
    assert [bytes(raw) for raw in raws] == list(expected.raw_input_contents)
    assert [one.name for one in message.inputs] == [one.name for one in expected.inputs]
    for one, encoded in zip(expected.inputs, typed, strict=True):
        assert pb.InferTensorContents.FromString(bytes(encoded)) == one.contents


def test_groups_that_do_not_close_are_malformed():
    """Groups that are not closed, are closed twice or in the wrong order, or are nested more than 100 deep make a
    message malformed."""
    for message in (b"\x53", b"\x54", b"\x53\x5b\x54\x5c", b"\x53\x50", b"\x53\x57", b"\x53" * 101 + b"\x54" * 101):
        with pytest.raises(ValueError):
            list(encoding.fields(memoryview(message)))
    assert [end for _, _, end in encoding.fields(memoryview(b"\x53" * 100 + b"\x54" * 100))] == [200]


def test_names_of_any_length_leave_errors_short():
    """Errors stay short, however long the names and datatypes of a request are, and however many inputs the model
    has."""
    taking = Intake({"x": Tensor("x", tensor("FP32").kind, None)})
    for one in ({"name": "n" * 1_000_000}, {"name": "x", "datatype": "d" * 10_000}):
        message = pb.ModelInferRequest(inputs=[{"shape": [1], **one}])
        with pytest.raises(MeshError) as error:
            taking.decode(message.inputs, [b"1234"])
        assert len(error.value.text) < 400
    many = Intake({f"{number}" * 500: tensor("FP32", name=f"{number}" * 500) for number in range(500)})
    for inputs, raws in (([], []), ([{"name": "q"}], [b""])):
        with pytest.raises(MeshError) as error:
            many.decode(pb.ModelInferRequest(inputs=inputs).inputs, raws)
        assert len(error.value.text) < 3000
