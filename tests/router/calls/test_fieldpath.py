"""The reader of fields in encoded messages, which agrees with protobuf's own decoder and survives any other bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.pb import inference_pb2, modelmesh_pb2
from router.calls import fieldpath
from tests.support.anymessage import Made, made

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)


@given(made())
def test_the_string_at_any_path_of_any_message_is_the_one_that_protobuf_reads(one: Made):
    assert fieldpath.extract(one.encoded, one.path) == one.text
    assert fieldpath.extract(b"12345" + one.encoded, one.path, 5) == one.text


@given(name=TEXT, version=TEXT, tensors=st.lists(TEXT, max_size=3), blob=st.binary(max_size=500))
def test_the_first_field_of_a_request_is_read(name, version, tensors, blob):
    """Protobuf omits an empty string, which is then read as missing."""
    request = inference_pb2.ModelInferRequest(model_name=name, model_version=version, raw_input_contents=[blob])
    for tensor in tensors:
        request.inputs.add(name=tensor, shape=[1, -1], datatype="FP32")
    message = request.SerializeToString()
    assert (fieldpath.extract(message, (1,)) or "") == name
    assert (fieldpath.extract(b"12345" + message, (1,), 5) or "") == name
    assert (fieldpath.extract(message, (2,)) or "") == version


@given(name=TEXT, version=TEXT, more=st.booleans())
def test_name_and_version_of_a_v2_request_are_read_together(name, version, more):
    request = inference_pb2.ModelInferRequest(model_name=name, model_version=version)
    if more:
        request.id = "7"
        request.inputs.add(name="x", shape=[1], datatype="FP32")
    message = request.SerializeToString()
    found, asked = fieldpath.name_and_version(b"12345" + message, 5)
    assert (found or "", asked) == (name, version)


@given(st.binary(max_size=200), st.integers(0, 10))
def test_any_bytes_give_a_name_and_a_version_or_a_value_error(message, start):
    """If bytes can be read as a name and a version, `extract` finds the same name in them."""
    try:
        name, version = fieldpath.name_and_version(message, start)
    except ValueError:
        return
    assert isinstance(version, str)
    assert name == fieldpath.extract(message, (1,), start)


@given(TEXT, TEXT, st.data())
def test_a_cut_name_or_version_is_refused(name, version, data):
    message = inference_pb2.ModelMetadataRequest(name=name, version=version).SerializeToString()
    cut = message[: data.draw(st.integers(0, len(message)))]
    try:
        found = fieldpath.name_and_version(cut)
    except ValueError:
        return
    assert found in ((name or None, version), (name or None, ""), (None, ""))


@given(type_=TEXT, path=TEXT, key=TEXT, used=st.integers(0, 2**64 - 1), load=st.booleans())
def test_nested_fields_are_read_past_numbers_and_flags(type_, path, key, used, load):
    request = modelmesh_pb2.RegisterModelRequest(modelId="m", loadNow=load, lastUsedTime=used)
    request.modelInfo.type, request.modelInfo.path, request.modelInfo.key = type_, path, key
    message = request.SerializeToString()
    assert (fieldpath.extract(message, (2, 3)) or "") == key
    assert (fieldpath.extract(message, (2, 1)) or "") == type_
    assert fieldpath.extract(message, (4, 1)) is None


@given(st.floats(), st.floats(width=32), TEXT)
def test_fixed_width_fields_are_passed_over(double, single, text):
    """Fields of wire types 1 and 5 are skipped if they come before the wanted field."""
    message = inference_pb2.InferParameter(double_param=double).SerializeToString()
    contents = b"\x0d" + b"\0\0\0\0"  # field 1, 32 bit
    raw = text.encode()
    tail = bytes([0x3A]) + varint(len(raw)) + raw  # field 7
    assert fieldpath.extract(message + tail, (7,)) == text
    assert fieldpath.extract(contents + tail, (7,)) == text


@given(st.binary(max_size=200), st.lists(st.integers(1, 20), min_size=1, max_size=3), st.integers(0, 10))
def test_any_bytes_give_a_string_nothing_or_a_value_error(message, path, start):
    try:
        found = fieldpath.extract(message, path, start)
    except ValueError:
        return
    assert found is None or isinstance(found, str)


@given(st.binary(max_size=40))
def test_cut_anywhere_it_never_reads_beyond(name):
    """A message that is cut off within the field is refused, instead of giving a shortened string."""
    message = bytes([0x0A]) + varint(len(name) + 5) + name
    with pytest.raises(ValueError, match="longer than the rest"):
        fieldpath.extract(message, (1,))


def test_the_first_of_several_counts():
    """If a message contains the wanted field several times, the first one counts, as in ModelMesh."""
    message = b"\x0a\x01a\x0a\x01b"
    assert fieldpath.extract(message, (1,)) == "a"


@pytest.mark.parametrize(
    ("message", "says"),
    [
        pytest.param(b"\x08\x01", "neither a string nor a message", id="a-number-at-the-path"),
        pytest.param(b"\x02\x00", "the number 0", id="field-0"),
        pytest.param(b"\x10" + b"\xff" * 11, "a varint is cut off, or longer", id="endless-number"),
        pytest.param(b"\x0a\x02\xff\xfe", "utf-8", id="not-text"),
        pytest.param(b"\x11\x00", "longer than the rest", id="cut-64-bit"),
    ],
)
def test_what_is_no_such_message_is_refused(message, says):
    with pytest.raises(ValueError, match=says):
        fieldpath.extract(message, (1,))


def varint(number: int) -> bytes:
    out = b""
    while number > 0x7F:
        out += bytes([number & 0x7F | 0x80])
        number >>= 7
    return out + bytes([number])


NUMBERS = st.integers(2, 40)


def fields(depth):
    """Returns a strategy for unknown fields as a handmade message may contain them, including nested groups."""
    plain = st.one_of(
        st.tuples(NUMBERS, st.integers(0, 2**63)).map(lambda f: varint(f[0] << 3) + varint(f[1])),
        st.tuples(NUMBERS, st.binary(max_size=10)).map(lambda f: varint(f[0] << 3 | 2) + varint(len(f[1])) + f[1]),
        st.tuples(NUMBERS, st.binary(min_size=4, max_size=4)).map(lambda f: varint(f[0] << 3 | 5) + f[1]),
    )
    if not depth:
        return st.lists(plain, max_size=3).map(b"".join)
    inner = st.one_of(fields(depth - 1), st.just(b"\x0a\x05wrong"))  # what looks like the id, and lies in a group
    group = st.tuples(NUMBERS, inner).map(lambda f: varint(f[0] << 3 | 3) + f[1] + varint(f[0] << 3 | 4))
    return st.lists(st.one_of(plain, group), max_size=4).map(b"".join)


@given(before=fields(3), name=TEXT.filter(bool), after=fields(2))
def test_unknown_fields_and_groups_are_passed_over_as_protobuf_does(before, name, after):
    raw = name.encode()
    message = before + b"\x0a" + varint(len(raw)) + raw + after
    assert fieldpath.extract(message, (1,)) == name


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(b"\x3b", id="does not end"),
        pytest.param(b"\x3c\x0a\x01m", id="not open"),
        pytest.param(b"\x3b\x44\x0a\x01m", id="ends as another"),
        pytest.param(b"\x3b" * 101 + b"\x3c" * 101 + b"\x0a\x01m", id="too deep"),
    ],
)
def test_groups_that_do_not_close_are_refused(message):
    with pytest.raises(ValueError, match="group"):
        fieldpath.extract(message, (1,))
