import base64
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from mesh.pb import inference_pb2 as pb
from mesh.statuses import MeshError, Reason
from mesh.v2.datatypes import OF_NAME
from router.rest import jsontext, tensors

NUMBERS = sorted(tensors.DTYPES)


@st.composite
def arrays(draw):
    """Draws a datatype and a finite array of it, of any small shape."""
    datatype = draw(st.sampled_from(NUMBERS))
    dtype = tensors.DTYPES[datatype]
    elements = {"allow_nan": False, "allow_infinity": False} if dtype.kind == "f" else None
    shape = draw(npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    return datatype, draw(npst.arrays(dtype, shape, elements=npst.from_dtype(dtype, **(elements or {}))))


def read(data):
    """Returns the numbers of flat JSON data after they were written to a JSON text and read again."""
    return json.loads(jsontext.dump({"data": data}))["data"]


@given(arrays(), st.booleans(), st.booleans())
def test_json_data_flat_or_nested_becomes_the_same_bytes_and_comes_back(pair, nested, careful):
    """An array is unchanged after conversion to raw contents and back, whether it is sent flat or nested."""
    datatype, array = pair
    data = json.loads(json.dumps(array.tolist() if nested else array.ravel().tolist()))
    raw = tensors.raw_from_json("x", datatype, array.shape, data, careful=careful)
    assert raw == array.tobytes()
    tensors.check_raw("x", datatype, array.shape, [raw])
    back = read(tensors.json_from_raw("x", datatype, raw))
    assert back == array.ravel().tolist(), "a client that reads 64 bits reads all digits"
    assert np.array(back, array.dtype).tobytes() == raw


@given(arrays())
def test_typed_contents_say_the_same_as_raw(pair):
    datatype, array = pair
    contents = pb.InferTensorContents()
    getattr(contents, OF_NAME[datatype].field).extend(array.ravel().tolist())
    contents = pb.InferTensorContents.FromString(contents.SerializeToString())
    assert tensors.raw_from_typed("x", datatype, contents) == array.tobytes()
    typed, raw = tensors.json_from_typed("x", datatype, contents), tensors.json_from_raw("x", datatype, array.tobytes())
    assert read(typed) == read(raw)


def test_any_byte_but_zero_is_true():
    """BOOL contents are written as booleans even if the model server uses bytes other than 0 and 1."""
    assert read(tensors.json_from_raw("x", "BOOL", b"\0\1\2\xff")) == [False, True, True, True]


NUMBER = st.one_of(
    st.integers(-(1 << 70), 1 << 70),
    st.sampled_from([0, 127, 128, 255, 256, -128, -129, 65535, 65536, 1 << 31, (1 << 63) - 1, 1 << 63, 1 << 64]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([1.0, 3.4028235677973366e38, 3.4028235677973362e38, 1e39, -0.0, 5e-324]),
)


@given(st.sampled_from(NUMBERS), st.lists(NUMBER | st.none() | st.text(max_size=2) | st.just([]), max_size=5))
def test_the_short_way_takes_and_refuses_what_the_careful_one_does(datatype, items):
    """Numbers that are checked together give the same bytes, or the same refusal, as numbers that are checked one by
    one."""

    def outcome(careful):
        try:
            return tensors.raw_from_json("x", datatype, (len(items),), items, careful=careful)
        except MeshError as error:
            return error.reason, error.text

    assert outcome(careful=False) == outcome(careful=True)


@given(st.lists(st.text(st.characters(codec="utf-8"))))
def test_strings_survive(strings):
    raw = tensors.raw_from_json("x", "BYTES", (len(strings),), strings)
    tensors.check_raw("x", "BYTES", (len(strings),), [raw])
    assert tensors.json_from_raw("x", "BYTES", raw) == strings
    contents = pb.InferTensorContents(bytes_contents=[text.encode() for text in strings])
    assert tensors.raw_from_typed("x", "BYTES", contents) == raw
    assert tensors.json_from_typed("x", "BYTES", contents) == strings


def test_a_whole_number_written_with_a_point_is_one():
    assert (
        tensors.raw_from_json("x", "INT64", (2,), [1.0, 9007199254740993])
        == np.array([1, 9007199254740993], "<i8").tobytes()
    )


@pytest.mark.parametrize(
    ("literal", "value"),
    [
        ("1.0", 1),
        ("-1.5e1", -15),
        ("1e18", 10**18),
        ("9007199254740992.0", 1 << 53),
        ("9007199254740994.0", (1 << 53) + 2),
        ("-9.223372036854775808e18", -(1 << 63)),
        ("-0.0", 0),
        ("0e400", 0),
        ("100e-2", 1),
    ],
)
def test_an_integer_written_as_a_float_is_that_integer_or_none(literal, value):
    """An integer that is written as a float is read exactly, alone and in a nested list."""
    raw = exactly("INT64", f"[{literal}]")
    assert raw == np.array([value], "<i8").tobytes()
    assert exactly("INT64", f"[[5, {literal}]]", (1, 2))[8:] == raw


@pytest.mark.parametrize(
    ("literal", "says"),
    [
        ("1.00000000000000000001", "1.00000000000000000001 is not a valid INT64"),
        ("9007199254740993.0", "9007199254740993.0 is not a valid INT64"),
        ("1.000000000000000001e18", "1.000000000000000001e18 is not a valid INT64"),
        ("9.223372036854775807e18", "is not a valid INT64"),
        ("0.99999999999999999999", "is not a valid INT64"),
        ("1e-400", "1e-400 is not a valid INT64"),
        ("9007199254740993.5", "is not a valid INT64"),
        ("9.223372036854775808e18", "out of the range"),
        ("1e300", "out of the range"),
        ("-1e999999", "out of the range"),
        ("1e99999999999999999999", "is not a valid INT64"),
    ],
)
def test_what_is_no_integer_is_refused_however_near_it_is(literal, says):
    with pytest.raises(MeshError) as caught:
        exactly("INT64", f"[{literal}]")
    assert caught.value.reason is Reason.BAD_REQUEST
    assert says in caught.value.text


@given(
    st.sampled_from([name for name in NUMBERS if tensors.DTYPES[name].kind in "iu"]),
    st.integers(-(1 << 66), 1 << 66),
    st.sampled_from(["{}.0", "{}e0", "{}.000e-0", "{}0e-1", "{}.5", "{}.00000000000000000000001"]),
)
def test_any_integer_written_as_a_float_is_kept_or_refused(datatype, value, form):
    bounds = np.iinfo(tensors.DTYPES[datatype])
    whole = not form.endswith(("5", "1")) or form.endswith("e-1")
    try:
        raw = exactly(datatype, f"[{form.format(value)}]")
    except MeshError as error:
        assert not whole or not bounds.min <= value <= bounds.max or int(float(value)) != value, error
    else:
        assert whole
        assert raw == np.array([value], tensors.DTYPES[datatype]).tobytes()


def exactly(datatype, text, shape=(1,)):
    """Returns the raw contents made from a JSON text in the way a request's data are read."""
    return tensors.raw_from_json(
        "x", datatype, shape, json.loads(text), exact=lambda: json.loads(text, parse_float=tensors.whole)
    )


@given(st.lists(st.binary(max_size=40)))
def test_strings_in_base64_become_their_bytes(items):
    encoded = [base64.b64encode(item).decode() for item in items]
    raw = tensors.raw_from_json("x", "BYTES", (len(items),), encoded, base64=True)
    assert raw == b"".join(len(item).to_bytes(4, "little") + item for item in items)


@pytest.mark.parametrize("item", ["a", "YQ=", "YQ==YQ==", "Y Q=", "ä", "YQ==\n", 1, None])
def test_what_is_not_base64_is_refused(item):
    with pytest.raises(MeshError) as caught:
        tensors.raw_from_json("x", "BYTES", (1,), [item], base64=True)
    assert caught.value.reason is Reason.BAD_REQUEST


def test_an_unnested_value_is_a_tensor_without_dimensions():
    assert tensors.raw_from_json("x", "FP32", (), 1.5) == tensors.raw_from_json("x", "FP32", (), [1.5])


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "says"),
    [
        ("FP32", (3,), [1, 2], "data has 2 elements, but its shape"),
        ("FP32", (2, 2), [[1, 2], [3]], "not nested like"),
        ("FP32", (2, 2), [[1, 2], 3], "not nested like"),
        ("FP32", (2, 2), [[1, 2, 3, 4]], "1 rows"),
        ("FP32", (4,), [[1, 2], [3, 4]], "2 elements"),
        ("FP32", (2,), [[1], [2]], "a list is not a valid FP32"),
        ("FP32", (1,), ["1"], "'1' is not a valid FP32"),
        ("FP32", (1,), [None], "None is not a valid FP32"),
        ("FP32", (1,), [True], "True is not a valid FP32"),
        ("FP32", (1,), [{}], "an object is not a valid FP32"),
        ("FP32", (1,), [1e39], "out of the range of FP32"),
        ("FP64", (1,), [10**400], "out of the range of FP64"),
        ("FP64", (1,), [math.inf], "out of the range"),
        ("FP32", (1,), 1, "data must be a list"),
        ("FP32", (1,), {"0": 1}, "data must be a list"),
        ("FP32", (1,), None, "data must be a list"),
        ("INT8", (1,), [128], "128 is out of the range of INT8"),
        ("UINT8", (1,), [-1], "-1 is out of the range of UINT8"),
        ("UINT64", (1,), [-1], "out of the range"),
        ("UINT64", (1,), [1 << 64], "out of the range"),
        ("INT64", (1,), [1 << 63], "out of the range"),
        ("INT32", (1,), [1.5], "1.5 is not a valid INT32"),
        ("INT32", (1,), [False], "False is not a valid INT32"),
        ("INT32", (1,), [1e300], "out of the range"),
        ("BOOL", (1,), [2], "must be true, false"),
        ("BOOL", (1,), ["true"], "'true' is not a valid BOOL"),
        ("BYTES", (1,), [1], "1 is not a valid BYTES"),
        ("BYTES", (1,), ["\ud800"], "half of a surrogate pair"),
        ("FP16", (1,), [1.0], "FP16 cannot be sent as JSON"),
        ("BF16", (1,), [1.0], "BF16 cannot be sent as JSON"),
        ("FP32", ((1 << 63) - 1, (1 << 63) - 1), [1], "elements, but its shape"),
    ],
)
def test_wrong_json_data_is_refused_with_what_is_wrong(datatype, shape, data, says):
    with pytest.raises(MeshError) as caught:
        tensors.raw_from_json("input 'x'", datatype, shape, data)
    assert caught.value.reason is Reason.BAD_REQUEST
    assert caught.value.text.startswith("input 'x': ")
    assert says in caught.value.text


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        (None, "must be a list"),
        ("1", "must be a list"),
        ([-1], "-1"),
        ([1.0], "1.0"),
        ([True], "True"),
        ([1 << 63], "whole numbers"),
        (["1"], "'1'"),
        ([1] * 65, "65 dimensions"),
    ],
)
def test_wrong_shapes_are_refused(shape, says):
    with pytest.raises(MeshError) as caught:
        tensors.check_shape("input 'x'", shape)
    assert caught.value.reason is Reason.BAD_REQUEST
    assert says in caught.value.text


@pytest.mark.parametrize(
    ("datatype", "shape", "raw"),
    [
        ("FP32", (2,), b"\0" * 7),
        ("FP16", (2,), b"\0" * 8),
        ("BOOL", ((1 << 63) - 1,), b"\0"),
        ("BYTES", (1,), b""),
        ("BYTES", (1,), b"\2\0\0\0a"),
        ("BYTES", (1,), b"\0\0\0"),
        ("BYTES", (1,), b"\xff\xff\xff\xff"),
        ("BYTES", (1,), b"\0\0\0\0\0\0\0\0"),
    ],
)
def test_a_blob_that_is_not_the_tensor_declared_is_refused(datatype, shape, raw):
    with pytest.raises(MeshError) as caught:
        tensors.check_raw("x", datatype, shape, [raw[:1], raw[1:]])
    assert caught.value.reason is Reason.BAD_REQUEST


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_json_cannot_carry_is_said_to_need_binary(value):
    raw = np.array([value], "<f4").tobytes()
    for refused in (
        lambda: tensors.json_from_raw("x", "FP32", raw),
        lambda: tensors.json_from_typed("x", "FP32", pb.InferTensorContents(fp32_contents=[value])),
        lambda: tensors.json_from_raw("x", "FP16", b"\0\0"),
        lambda: tensors.json_from_raw("x", "BYTES", b"\1\0\0\0\xff"),
    ):
        with pytest.raises(MeshError, match="binary_data") as caught:
            refused()
        assert caught.value.reason is Reason.BAD_REQUEST


@pytest.mark.parametrize(("datatype", "raw"), [("FP32", b"\0"), ("NEW", b""), ("BYTES", b"\2\0\0\0a")])
def test_broken_contents_of_a_model_server_are_its_fault(datatype, raw):
    with pytest.raises(MeshError) as caught:
        tensors.json_from_raw("x", datatype, raw)
    assert caught.value.reason is Reason.INTERNAL


def test_typed_contents_out_of_range_are_the_model_servers_fault():
    with pytest.raises(MeshError) as caught:
        tensors.raw_from_typed("x", "INT8", pb.InferTensorContents(int_contents=[300]))
    assert caught.value.reason is Reason.INTERNAL
    with pytest.raises(MeshError) as caught:
        tensors.json_from_typed("x", "FP16", pb.InferTensorContents())
    assert caught.value.reason is Reason.INTERNAL
